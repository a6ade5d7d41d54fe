"""A kernel that does nothing but let warps of two kinds begin and end: a control for what a sanitizer says of that."""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.jit
def _write(out, AT: gl.constexpr):
    gl.store(out + AT, 1.0)


@gluon.jit
def _two_kinds(out):
    gl.warp_specialize([(_write, (out, 0)), (_write, (out, 1))], [1], [24])


def two_kinds() -> None:
    """Runs it."""
    out = torch.zeros(2, device="cuda")
    _two_kinds[(1,)](out, num_warps=8)
    assert out.tolist() == [1.0, 1.0]
