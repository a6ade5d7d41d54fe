"""Programmatic dependent launch: a kernel starts while the one before it drains (sm_90 and later).

A kernel that is launched with `launch_pdl=True` may begin before its predecessor on the stream has ended. It must call
`wait_for_previous` before it reads what others wrote and before it writes anything.

Where there is room for programs that wait, a kernel lets the next one start right behind its own wait. Not before it:
what ran in front of a kernel's predecessor is done then, and a kernel may load weights before it waits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qfx.kernels.gpu.launch import interpreted

ROOM = 128
"""Programs that take no room from others: no more than a GPU of sm_90 and later has multiprocessors, or nearly so."""


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


@triton.jit
def prefetch(ptr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Brings D <= BLOCK values to the L2 cache before the wait; they may be written meanwhile, it sees that."""
    STEP: tl.constexpr = 256 // ptr.dtype.element_ty.primitive_bitwidth  # 32 bytes, which a cache loads at once
    if PDL and not interpreted and BLOCK >= STEP:
        at = tl.minimum(tl.arange(0, BLOCK // STEP) * STEP, D - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr + at], dtype=tl.int32, is_pure=False, pack=1
        )
