"""A kernel that does nothing but let warps of two kinds begin and end: a control for what a sanitizer says of that.

The first warps wait for each other meanwhile, as those of every kernel of two kinds do.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # later versions of Triton gave it another name


@gluon.jit
def _write(out, AT: gl.constexpr):
    if AT == 0:
        _barrier()
    gl.store(out + AT, 1.0)
    if AT == 0:
        _barrier()


@gluon.jit
def _two_kinds(out):
    gl.warp_specialize([(_write, (out, 0)), (_write, (out, 1))], [1], [24])


def two_kinds() -> None:
    """Runs it."""
    out = torch.zeros(2, device="cuda")
    _two_kinds[(1,)](out, num_warps=8)
    assert out.tolist() == [1.0, 1.0]
