"""Programmatic dependent launch: a kernel starts while the one before it drains (sm_90 and later).

A kernel that is launched with `launch_pdl=True` may begin before its predecessor on the stream has ended. It must call
`wait_for_previous` before it reads what others wrote and before it writes anything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qfx.kernels.gpu.launch import interpreted


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Lets the next kernel start as soon as there is room for its programs."""
    if PDL and not interpreted:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Returns when all that came before this kernel is done and visible."""
    if PDL and not interpreted:
        gdc_wait()
