"""What the GPU benchmarks share: timing, the ops, their peers, and compiling kernels in parallel.

Not on `sys.path` by itself: the scripts beside this folder put their own folder there for one import and take it away
again, because other libraries look for a package `kernels` and would find benchmarks/kernels.py.
"""
