"""The forms of `w4` that are written in Gluon: whether a call may take them, and the call.

They are imported where they are used: a Triton without Gluon, or with another one, has the other forms.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qfx.kernels.gpu.decode4 import Decoder
from qfx.kernels.gpu.launch import capability
from qfx.kernels.gpu.w4_config import MEETING, Config


@cache
def takes_direct(tokens: int, group: int, decoder: Decoder) -> bool:
    """Whether `w4_direct` computes this."""
    try:
        from qfx.kernels.gpu import w4_direct
    except ImportError:  # a Triton without Gluon, or with another one
        return False
    return w4_direct.takes(tokens, group, decoder)


def takes_specialized(x: Tensor, rows: int, group: int, zero: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `w4_large` does, or `w4a8_large` for activations of 8 bits."""
    try:
        from qfx.kernels.gpu import w4_large, w4a8_large
    except ImportError:  # a Triton without Gluon, or with another one
        return False
    if x.dtype.itemsize == 1:
        return w4a8_large.supports(x, rows, group, zero, dtype) is None
    return w4_large.supports(x, rows, group) is None


def run_form(
    config: Config,
    x: Tensor,
    x_scale: Tensor | None,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    rows: int,
    group: int,
    decoder: Decoder,
    flags: tuple[bool, bool, bool, bool],
    second: Tensor | None,
) -> None:
    """The form that a configuration names.

    Arguments as those of `w4.w4`; besides, the output, and which operands there are.
    """
    whole, programs = config.split == 1, config.specialized
    if config.direct:
        from qfx.kernels.gpu import w4_direct

        tokens, columns = x.shape
        warps = config.warps if tokens <= 8 else min(config.warps, MEETING // config.bn)
        shape = warps, config.unroll, config.bn, config.stages - 1, config.registers
        even = columns % (128 * warps * config.unroll) == 0
        w4_direct.launcher(shape, decoder, group, (*flags, even), tokens > 8, capability(x.device) >= 90)(
            (-(-rows // config.bn), 1, 1), x, x_scale, tiles.view(torch.int32), scale, zero, bias, y,
            tokens, rows, columns, scale.shape[0], x.stride(0), scale.shape[1],
        )  # fmt: skip
    elif x_scale is None:
        from qfx.kernels.gpu import w4_large

        cut = w4_large.Config(
            config.bt or 128, config.stages or 3, config.tokens, whole, programs, config.bn or 256
        )  # zeros are of tables that were made before there was a choice
        w4_large.w4_large(x, tiles, scale, zero, bias, rows, group, cut, y, decoder.table)
    else:
        from qfx.kernels.gpu import w4a8_large

        cut8 = w4a8_large.Config(config.bt, config.stages, config.tokens, whole, programs, bn=config.bn or 256)
        w4a8_large.w4a8_large(x, x_scale, tiles, scale, bias, rows, group, y.dtype, cut8, y, second)
