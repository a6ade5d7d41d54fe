"""Triton kernels behind the ops: what runs on a GPU, how a configuration is chosen, and how it is launched.

Imported only when an op meets a CUDA tensor (or by tests, in Triton's interpreter), so that qfx works without Triton.
"""
