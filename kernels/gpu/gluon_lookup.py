"""Tables of 16 values in Gluon; `shared_table` writes the PTX."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.jit
def lookup(words, address, ASM: gl.constexpr, FLOAT: gl.constexpr):
    """The values of the four nibbles of each int16 of layout `pairs`, 32 columns apart; `address` is the table's."""
    TEXT: gl.constexpr = ASM[0]
    a, b, c, d = gl.inline_asm_elementwise(
        TEXT, "=r,=r,=r,=r,r,r,r", [words, address], (gl.int16, gl.int16, gl.int16, gl.int16), True, 2
    )
    return a.to(FLOAT, bitcast=True), b.to(FLOAT, bitcast=True), c.to(FLOAT, bitcast=True), d.to(FLOAT, bitcast=True)
