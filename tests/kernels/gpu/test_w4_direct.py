"""The kernel of 4-bit weights and few tokens that loads codes into registers, on a GPU; the bound of test_w4 holds."""

from __future__ import annotations

import pytest
import torch

from qfx.kernels import nf4_linear, w4a8_linear, w4a16_linear
from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.quantize_rows import quantize_activation
from tests.kernels.law import make_case

pytest.importorskip("triton.experimental.gluon")

from qfx.kernels.gpu import decode4
from qfx.kernels.gpu import w4 as gpu
from tests.kernels.gpu.test_w4 import check_w4a16, group_of, prepared, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIGS = [
    gpu.Config(16, 8, 1, 4, 1, direct=True),
    gpu.Config(16, 8, 1, 8, 2, unroll=2, direct=True),
    gpu.Config(32, 8, 1, 4, 1, registers=64, direct=True),
    gpu.Config(32, 8, 1, 16, 2, direct=True),
    gpu.Config(16, 8, 1, 2, 2, unroll=4, direct=True),
    gpu.Config(16, 8, 1, 4, 4, direct=True),
    gpu.Config(32, 8, 1, 4, 3, direct=True),
]
SHAPES = [
    ((1,), 4096, 512), ((1,), 136, 24), ((8,), 1152, 333), ((5,), 2048, 130), ((2, 3), 14336, 128), ((7,), 40, 17),
    ((1,), 1000, 1),
]  # fmt: skip
MORE = [((16,), 1152, 333), ((9,), 2048, 130), ((3, 4), 14336, 128)]
"""With tables."""
SCHEMES = ["_G128", "_ASYM_G128", "_G256", "_CHANNEL", "_ASYM_CHANNEL"]
SMALL_GROUPS = ["_ASYM_G64", "_G64", "_ASYM_G32"]


def fits(shape, scheme: str) -> bool:
    scheme = "W4AFP8_G128" if scheme == "W4AFP8" else scheme
    return "_G" not in scheme or shape[1] % int(scheme.rpartition("_G")[2]) == 0


def cases(schemes: list[str]) -> list:
    return [(*shape, scheme) for shape in SHAPES for scheme in schemes if fits(shape, scheme)]


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.bn}x{c.warps}x{c.unroll}, {c.stages - 1} ahead")
def ran(request, monkeypatch) -> list[bool]:
    """The configuration; it fills when the kernel ran."""
    kept: list[bool] = []
    run = gpu.run_form
    monkeypatch.setattr(gpu, "pick", lambda *_: request.param)
    monkeypatch.setattr(gpu, "run_form", lambda config, *a: (kept.append(config.direct), run(config, *a)))
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases([f"W4A16{s}" for s in SCHEMES + SMALL_GROUPS]), ids=str)
def test_w4a16(case, dtype, ran) -> None:
    check_w4a16(case, dtype, act_order=dtype == torch.float16)
    assert len(ran) == 2  # twice, equal bit for bit


@pytest.mark.parametrize("case", cases([f"W4A8{s}" for s in SCHEMES] + ["W4AFP8"]), ids=str)
def test_w4a8(case, ran) -> None:
    made = make_case(*case, torch.bfloat16)
    grid = made.input["x_grid"]
    parts = prepared(made, w4a8_linear, x_grid=grid)
    codes, scale, _ = quantize_activation(made.x.reshape(-1, case[1]), grid, None, None, False)
    decoder = decode4.eight_bit_decoder(codes.dtype, parts["zero"] is not None)
    weight = parts["tiles"], parts["scale"], parts["zero"], made.bias.cuda(), case[2], group_of(made), decoder
    y = gpu.w4(codes.cuda(), *weight, x_scale=scale.cuda(), dtype=torch.bfloat16)
    assert ran
    fp8 = 0.0 if codes.dtype == torch.int8 else 2 * case[1] / 32 * 2.0**-13  # as in test_w4
    assert worst(y, codes.double() * scale.double(), made.weight.dequantize(), made.bias, extra=fp8) <= 1
    assert gpu.w4(codes.cuda(), *weight, x_scale=scale.cuda(), dtype=torch.bfloat16).equal(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(nf4_linear.TABLES))
@pytest.mark.parametrize(
    ("shape", "group"), [(s, g) for s in SHAPES + MORE for g in (32, 64, 128) if s[1] % g == 0], ids=str
)
def test_tables(shape, group, name, dtype, ran) -> None:
    lead, columns, rows = shape
    x, w = torch.randn(*lead, columns).to(dtype).reshape(-1, columns), torch.randn(rows, columns) / columns
    codes, absmax = nf4_linear.quantize(w, group, name)
    tiles, scale = nf4_linear.prepare(codes, absmax)
    values = nf4_linear.table(name, torch.device("cpu"), dtype)
    decoder = decode4.table_decoder(nf4_linear.TABLES[name], dtype)
    y = gpu.w4(x.cuda(), tiles.cuda(), scale.cuda(), None, None, rows, group, decoder, table=values.cuda())
    assert ran
    exact = (values.double()[codes.long()].unflatten(1, (-1, group)) * absmax.double().unsqueeze(-1)).flatten(1)
    assert worst(y, x, exact, None) <= 1


def test_a_wrong_nibble_is_seen(ran) -> None:
    case = make_case((3,), 512, 128, "W4A16_G128", torch.bfloat16)
    parts = prepared(case, w4a16_linear)
    parts["tiles"][0, 1, 5, 7] ^= 16
    y = gpu.w4(case.x.cuda(), parts["tiles"], parts["scale"], None, case.bias.cuda(), 128, 128, decode4.INT4)
    assert ran
    assert worst(y, case.x, case.weight.dequantize(), case.bias) > 1


@pytest.mark.parametrize("tokens", [3, 16])
def test_a_wrong_entry_is_seen(tokens, ran) -> None:
    x, w = torch.randn(tokens, 512).bfloat16(), torch.randn(128, 512)
    codes, absmax = nf4_linear.quantize(w, 64, "nf4")
    tiles, scale = nf4_linear.prepare(codes, absmax)
    exact = (nf4_linear.table("nf4", torch.device("cpu"), x.dtype).double()[codes.long()].unflatten(1, (-1, 64))
             * absmax.double().unsqueeze(-1)).flatten(1)  # fmt: skip
    for change, wrong in ((0.0, False), (0.01, True)):
        values = list(nf4_linear.TABLES["nf4"])
        values[3] += change
        decoder = decode4.table_decoder(tuple(values), x.dtype)
        y = gpu.w4(x.cuda(), tiles.cuda(), scale.cuda(), None, None, 128, 64, decoder)
        assert (worst(y, x, exact, None) > 1) == wrong
    assert ran


def test_more_tokens_take_another_kernel(ran) -> None:
    case = make_case((9,), 512, 128, "W4A16_G128", torch.bfloat16)
    parts = prepared(case, w4a16_linear)
    y = gpu.w4(case.x.cuda(), parts["tiles"], parts["scale"], None, None, 128, 128, decode4.INT4)
    assert not ran
    assert worst(y, case.x, case.weight.dequantize(), None) <= 1
