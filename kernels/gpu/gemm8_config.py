"""Configurations of the 8-bit GEMMs: what to try, and what to take where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Config:
    """How one product is computed.

    Attributes:
        form: `few` (up to 8 tokens; the warps of a CTA share the columns), `skinny` (weights are the M operand),
            `large` (tokens are), `specialized` (tokens are; sm_90 only), or `cublas` (fp8 only).
        tokens: tokens in a tile.
        channels: output channels in a tile.
        depth: K in a step.
        stages: steps in flight.
        warps: warps in a CTA.
        split: CTAs that share a tile's K (`skinny`).
        tma: read through tensor descriptors.
        persistent: as many CTAs as the device has processors (`large` with `tma`).
        parts: column blocks in which a tile leaves (`large`).
        group: rows of tiles that are walked together (`large`).
        promote: fp8 products that are summed inside the tensor core, where sums keep about 14 bits, before float32
            takes over; 0 is all of K.
    """

    form: Literal["few", "skinny", "large", "specialized", "cublas"]
    tokens: int = 16
    channels: int = 64
    depth: int = 128
    stages: int = 4
    warps: int = 4
    split: int = 1
    tma: bool = True
    persistent: bool = False
    parts: int = 1
    group: int = 8
    promote: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))

    def __hash__(self) -> int:  # asked for in every launch
        return self._hash  # type: ignore[attr-defined, no-any-return]


class Operands(NamedTuple):
    """Checked operands of one product; `int8` says which family."""

    a: Tensor
    b: Tensor
    out: Tensor
    a_scale: Tensor
    b_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    a_zero: Tensor | None
    b_sums: Tensor | None
    xo: Tensor | None
    wo: Tensor | None
    activation: str
    int8: bool


_ROUNDS = hasattr(TensorDescriptor, "round_f32_to_tf32")  # of newer Tritons


def descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    """A `TensorDescriptor` without its checks, which cost more than the rest of a launch; callers made them."""
    d = object.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape, d.padding = x, list(x.shape), list(x.stride()), list(block), "zero"
    if _ROUNDS:
        d.round_f32_to_tf32 = False
    return d


def takes_tma(x: Tensor) -> bool:
    """Whether a tensor descriptor can read it: 16-byte alignment of the base and of the rows."""
    return x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(1) == 1


SKINNY_ONLY = 128
"""Up to so many tokens the tokens are never the M operand."""
NO_CUBLAS = 16
"""Up to so many tokens cuBLASLt is not tried."""
SHARED = 227 * 1024 - 1024
"""Bytes of shared memory of a CTA on sm_90, less what barriers and reductions take."""


def skinny_candidates(m: int, n: int, k: int, int8: bool, tma: bool = True) -> list[Config]:
    """At most 48 configurations of the skinny form for `[m, k] x [n, k]`."""
    tokens = min(256, max(16, 1 << (m - 1).bit_length()))
    found = []
    for channels, depth, warps, stages, by_tma in (
        (64, 128, 4, 8, True),
        (64, 128, 4, 5, True),
        (64, 256, 4, 5, True),
        (64, 256, 4, 3, True),
        (128, 128, 4, 5, True),
        (128, 128, 8, 6, True),
        (128, 128, 8, 4, True),
        (128, 256, 8, 4, True),
        (128, 256, 8, 3, True),
        (256, 128, 8, 5, True),
        (64, 128, 4, 6, False),
        (64, 128, 4, 4, False),
        (64, 256, 4, 4, False),
        (64, 256, 4, 3, False),
        (128, 128, 8, 4, False),
        (128, 128, 8, 3, False),
    ):
        for width in (tokens, 128) if tokens == 256 else (tokens,):
            # fp8 needs a second set of sums for promotion: both have to fit in registers
            if channels * width * (1 if int8 else 2) > warps * 4096 or (channels + width) * depth * stages > SHARED:
                continue
            if (by_tma and not tma) or (width == 256 and not by_tma):  # addresses take registers too
                continue
            base = Config("skinny", width, channels, depth, stages, warps, tma=by_tma)
            for split in _splits(-(-m // width) * -(-n // channels), -(-k // depth)):
                found.append(replace(base, split=split))
    return found


def _splits(tiles: int, steps: int) -> list[int]:
    """Up to three ways to split K: CTAs from one to four for each of 132 processors, and 4 steps or more for each."""
    wanted = {max(1, min(round(132 * per / tiles), steps // 4, 16)) for per in (1, 2, 4)}
    wanted |= {split for split in (2, 3)[: 3 - len(wanted)] if steps >= 8 * split}
    return sorted(wanted)


def large_candidates(m: int, n: int, k: int, int8: bool, tma: bool = True) -> list[Config]:
    """At most 24 configurations of the large form for `[m, k] x [n, k]`."""
    if not tma:
        return [
            Config("large", 128, 128, 128, 3, 8, tma=False, promote=0),
            Config("large", 128, 128, 64, 4, 8, tma=False, promote=0),
            Config("large", 128, 256, 64, 4, 8, tma=False, promote=0),
            Config("large", 64, 128, 128, 4, 4, tma=False, promote=0),
        ]
    found = []
    for tokens, channels, depth, stages, warps in (
        (128, 256, 128, 3, 8),
        (128, 256, 128, 4, 8),
        (256, 128, 128, 3, 8),
        (256, 128, 128, 4, 8),
        (128, 256, 256, 2, 8),
        (256, 128, 256, 2, 8),
        (128, 128, 128, 4, 8),
        (128, 128, 128, 3, 4),
        (128, 128, 256, 3, 8),
    ):
        for persistent in (True, False):
            if persistent and (depth == 256 or (tokens == 256 and stages == 4)):
                continue  # no room for the tile on its way out
            parts = 2 if stages == 4 and tokens * channels > 16384 and persistent else 1
            found.append(Config("large", tokens, channels, depth, stages, warps, 1, True, persistent, parts, promote=0))
    found.append(replace(found[0], group=16))
    found.append(replace(found[1], group=16))
    if m <= 512:
        found.append(Config("large", 64, 128, 128, 5, 4, promote=0))
        found.append(Config("large", 64, 256, 128, 4, 4, promote=0))
    return found


def candidates(
    m: int, n: int, k: int, int8: bool, tma: bool = True, cublas: bool = False, hopper: bool = False
) -> list[Config]:
    """What `tune.pick` tries for `[m, k] x [n, k]`."""
    found = []
    if m <= 8:
        for depth, stages, warps in ((128, 3, 8), (128, 4, 8), (128, 4, 4), (128, 6, 4), (256, 3, 4), (256, 3, 8)):
            found.append(Config("few", 8, 16, depth, stages, warps, tma=False, promote=0))
        for depth, stages, warps in ((128, 3, 4), (128, 4, 4), (128, 3, 8), (256, 3, 4)):
            found.append(Config("few", 8, 32, depth, stages, warps, tma=False, promote=0))
    if m <= 256:
        found += skinny_candidates(m, n, k, int8, tma)
    if m > SKINNY_ONLY:
        found += large_candidates(m, n, k, int8, tma)
    if m > SKINNY_ONLY and tma and hopper:
        found += specialized_candidates(m, n, k, int8)
    if cublas and m > NO_CUBLAS:
        found.append(Config("cublas"))
    return found


def specialized_candidates(m: int, n: int, k: int, int8: bool) -> list[Config]:
    """At most 24 configurations of the specialized form for `[m, k] x [n, k]`."""
    base = Config("specialized", 128, 256, 128, 3, 8, promote=0)
    found = [
        base,
        replace(base, group=16),
        replace(base, group=4),
        replace(base, depth=64, stages=6),
        replace(base, tokens=256, channels=128),
        replace(base, tokens=256, channels=128, group=4),
    ]
    if m <= 2048:
        found += [replace(base, channels=128, stages=5), replace(base, channels=128, stages=5, group=16)]
    return found


@cache
def default(m: int, n: int, k: int, int8: bool, tma: bool = True, cublas: bool = False) -> Config:
    """What to take for `[m, k] x [n, k]` where nothing was measured."""
    if m <= 128 or (int8 and m <= 256 and n <= 8192):
        tokens = min(128, max(16, 1 << (m - 1).bit_length()))
        channels, warps, stages = (64, 4, 8) if tokens <= 64 else (128, 8, 4)
        split = max(1, min(round(264 / (-(-m // tokens) * -(-n // channels))), -(-k // 512), 16))
        if not tma:  # fits in the 99 KB of sm_89
            stages = 4 if tokens <= 64 else 3
        return Config("skinny", tokens, channels, 128, stages, warps, split, tma)
    if cublas:
        return Config("cublas")
    if not tma:
        return Config("large", 128, 128, 128, 3, 8, tma=False, promote=0)
    return Config("large", 128, 256, 128, 3, 8, persistent=True, promote=0)
