"""The kernels of 4-bit weights and many tokens, on a GPU of compute capability 9.0.

For activations of 16 bits, weights in groups are rounded to the dtype of the activations, as those of the op are: code
times scale, the scale as a sum of two floats, so twice the unit roundoff covers both. (One scale for a row is applied
in float32.) What is subnormal in float16 loses at most one step of 2⁻²⁴, twice. Sums are held to the bound of
test_w4.py.
"""

from __future__ import annotations

import pytest
import torch

from qfx.kernels import nf4_linear, w4a16_linear
from qfx.kernels.gpu import decode4
from tests.kernels.gpu.hopper import hopper_only
from tests.kernels.gpu.test_w4 import group_of, prepared, worst
from tests.kernels.law import make_case

pytest.importorskip("triton.experimental.gluon")

pytestmark = hopper_only

SHAPES = [
    ((128,), 128, 256),
    ((1,), 256, 8),
    ((130,), 1152, 344),
    ((300,), 2048, 264),
    ((257,), 8192, 1024),
    ((1024,), 512, 8192),
    ((128,), 14336, 128),
    ((200,), 136, 520),
]
SCHEMES = [
    "W4A16_G128", "W4A16_ASYM_G128", "W4A16_G256", "W4A16_ASYM_G64", "W4A16_CHANNEL", "W4A16_ASYM_CHANNEL",
]  # fmt: skip


def configs():
    from qfx.kernels.gpu.w4_large import Config

    return [
        Config(), Config(whole=True), Config(programs=7), Config(tokens=1, stages=2), Config(programs=2),
        Config(stages=4, rows=128), Config(stages=4, rows=128, whole=True), Config(256, 2, rows=128),
        Config(256, 2, whole=True, rows=128), Config(programs=5, rows=128), Config(64, 6, rows=128), Config(64, 5),
    ]  # fmt: skip


GROUPS = {scheme: int(scheme.rpartition("_G")[2]) if "_G" in scheme else 1 for scheme in SCHEMES}
WHOLE = [(shape, scheme) for shape in SHAPES for scheme in SCHEMES if shape[1] % GROUPS[scheme] == 0]
"""Cases in which the groups divide the columns."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "scheme"), WHOLE, ids=str)
def test_w4a16(shape, scheme, dtype) -> None:
    from qfx.kernels.gpu.w4_large import supports, w4_large

    columns = shape[1]
    case = make_case(*shape, scheme, dtype)
    parts = prepared(case, w4a16_linear)
    x, bias = case.x.cuda(), case.bias.cuda()
    args = parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case)
    assert supports(x, shape[2], args[-1]) is None
    w = case.weight.dequantize()
    u = torch.finfo(dtype).eps / 2
    extra = 0.0 if args[-1] < 0 else 2 * u
    if dtype == torch.float16 and extra:
        extra += float(2 * 2.0**-24 / w.abs().where(w != 0, w.new_ones(())).min())
    strided = torch.zeros(len(x), columns + 8, dtype=dtype, device="cuda")[:, :columns]
    strided.copy_(x)
    for config in configs():
        y = w4_large(x, *args, config)
        assert worst(y, case.x, w, case.bias, extra=extra) <= 1
        assert w4_large(x, *args, config).equal(y)  # and two runs are equal bit for bit
        assert w4_large(strided, *args, config).equal(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group"), [("nf4", 64), ("fp4_bnb", 64), ("nf4", 128), ("nf4", 2048)])
@pytest.mark.parametrize(("tokens", "rows"), [(130, 344), (300, 264), (1024, 4096)])
def test_tables(tokens, rows, name, group, dtype) -> None:
    from qfx.kernels.gpu.w4_large import w4_large

    columns = 2048 if group == 2048 else 1152
    x, w = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns) / columns**0.5
    codes, absmax = nf4_linear.quantize(w, group, name)
    tiles, scale = nf4_linear.prepare(codes, absmax)
    values = nf4_linear.table(name, torch.device("cpu"), dtype)
    exact = (values.double()[codes.long()].unflatten(1, (-1, group)) * absmax.double().unsqueeze(-1)).flatten(1)
    text = decode4.table_decoder(nf4_linear.TABLES[name], dtype).table
    extra = 0.0 if group == columns else torch.finfo(dtype).eps
    if dtype == torch.float16 and extra:
        extra += float(2 * 2.0**-24 / exact.abs().where(exact != 0, exact.new_ones(())).min())
    args = tiles.cuda(), scale.cuda(), None, None, rows, -1 if group == columns else group
    for config in configs():
        y = w4_large(x.cuda(), *args, config, None, text)
        assert worst(y, x, exact, None, extra=extra) <= 1
        assert w4_large(x.cuda(), *args, config, None, text).equal(y)


def test_a_wrong_nibble_is_seen() -> None:
    from qfx.kernels.gpu.w4_large import w4_large

    case = make_case((128,), 128, 256, "W4A16_G128", torch.bfloat16)
    parts = prepared(case, w4a16_linear)
    parts["tiles"][1, 0, 5, 7] ^= 128
    y = w4_large(case.x.cuda(), parts["tiles"], parts["scale"], None, case.bias.cuda(), 256, 128)
    assert worst(y, case.x, case.weight.dequantize(), case.bias, extra=2.0**-8) > 1
