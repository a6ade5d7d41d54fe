"""Kernels of 4-bit weights, in Triton's interpreter and on a GPU, against exact arithmetic on the dequantized weight.

The kernel multiplies codes (exact in every dtype of the tensor cores) and scales in float32 behind the sum over a
group. With u = 2⁻²⁴, a term passes K - 1 additions, 1 product, up to 3 scales and 1 bias: γ_{K+8} as in law.py, with
the tensor cores' additions counted as two roundings each, since they truncate. Rounding to the output's dtype follows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.qtensor import quantize_scale
from qfx.core.spec import parse_scheme
from qfx.kernels import nf4_linear, w4a8_linear, w4a16_linear
from qfx.kernels.pack import plain_scale, store
from qfx.kernels.quantize_rows import quantize_activation
from tests.kernels.law import U32, Case, make_case

triton = pytest.importorskip("triton")

from qfx.kernels.gpu import decode4, dequantize4  # noqa: E402
from qfx.kernels.gpu import w4 as gpu  # noqa: E402
from qfx.kernels.gpu.launch import INTERPRET  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not (INTERPRET or CUDA), reason="needs Triton's interpreter (TRITON_INTERPRET=1) or a GPU"
)

CONFIGS = [
    gpu.Config(64, 16, 1, 4, 3),
    gpu.Config(128, 32, 3, 8, 4),
    gpu.Config(64, 64, 1, 4, 3, 2),
    gpu.Config(256, 16, 2, 8, 3, unroll=2),
    gpu.Config(32, 8, 2, 2, 3, unroll=2),
    gpu.Config(16, 8, 1, 4, 3, shared=True),
]
LARGER = [((1,), 4096, 512), ((17,), 1152, 333), ((130,), 640, 1000), ((300,), 2048, 264), ((16,), 14336, 128)]


def worst(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, extra: float = 0.0) -> float:
    """Largest violation of the bound: at most 1 if the law holds. `extra`: relative error of a weight."""
    x, w, y64 = x.double().cpu(), w.double().cpu(), y.double().cpu()
    b = torch.zeros(()).double() if bias is None else bias.double().cpu()
    exact = x @ w.t() + b
    n = 2 * (w.shape[1] + 8) * U32
    bound = (n / (1 - n) + extra) * (x.abs() @ w.abs().t() + b.abs())
    info = torch.finfo(y.dtype)
    rounding = info.eps if INTERPRET and y.dtype == torch.bfloat16 else info.eps / 2  # the interpreter truncates
    bound = bound + rounding * (exact.abs() + bound) + info.smallest_normal * info.eps
    assert y64.isfinite().all()
    return float(((y64 - exact).abs() / bound).max()) if y.numel() else 0.0


def group_of(case: Case) -> int:
    groups = case.weight.scale.shape[1]
    return -1 if groups == 1 else case.weight.codes.shape[1] // groups


def prepared(case: Case, module, **more) -> dict[str, Tensor | None]:
    grid = case.weight.spec.grid
    size = {"bits": grid.bits, "in_features": case.weight.codes.shape[1], "signed": grid.signed}
    spec = case.weight.spec
    stored = plain_scale(store(case.weight), spec)
    # as W4A8.prepare does: integers of a whole row are summed where groups are whole tiles
    whole = spec.scale is not None and spec.block[1] % 128 == 0
    given = {**stored, "second": quantize_scale(case.weight.scale, spec)[1]} if whole else stored
    made = module.prepare(given, **size, **more)
    back = module.restore(made, out_features=len(case.weight.codes), **size, **more)
    assert back["codes"].equal(stored["codes"]) and back["scale"].equal(stored["scale"].expand_as(back["scale"]))
    assert all((stored[k] is None) == (back[k] is None) for k in ("zero", "g_idx"))
    return {k: None if v is None else v.to(DEVICE) for k, v in made.items()}


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.bn}x{c.bt}x{c.split}x{c.unroll}{'shared' * c.shared}")
def config(request, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "pick", lambda *_: request.param)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", w4a16_linear.CASES, ids=str)
def test_w4a16(shape, dtype, act_order, config) -> None:
    check_w4a16(shape, dtype, act_order)


def check_w4a16(shape, dtype, act_order) -> None:
    case = make_case(*shape, dtype, act_order=act_order)
    parts = prepared(case, w4a16_linear)
    flat = case.x.reshape(-1, shape[1])
    w = case.weight.dequantize()
    if parts["order"] is not None:
        order = parts["order"].cpu().long()
        flat, w = flat[:, order], w[:, order]
    bias = None if case.bias is None else case.bias.to(DEVICE)
    args = parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case), decode4.INT4
    y = gpu.w4(flat.to(DEVICE), *args)
    assert worst(y, flat, w, case.bias) <= 1
    strided = torch.zeros(len(flat), shape[1] + 8, dtype=dtype, device=DEVICE)[:, : shape[1]]
    strided.copy_(flat)
    assert gpu.w4(strided, *args).equal(y)  # and two runs are equal bit for bit


@pytest.mark.parametrize("shape", w4a8_linear.CASES, ids=str)
def test_w4a8(shape, config) -> None:
    case = make_case(*shape, torch.bfloat16)
    grid = case.input["x_grid"]
    parts = prepared(case, w4a8_linear, x_grid=grid)
    codes, scale, _ = quantize_activation(case.x.reshape(-1, shape[1]), grid, None, None, False)
    decoder = decode4.eight_bit_decoder(codes.dtype, parts["zero"] is not None)
    bias = None if case.bias is None else case.bias.to(DEVICE)
    weight = parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case), decoder
    y = gpu.w4(codes.to(DEVICE), *weight, x_scale=scale.to(DEVICE), second=parts["second"], dtype=torch.bfloat16)
    # Hopper adds products of float8 with 14 bits: two roundings of 2⁻¹³ for each 32 columns
    fp8 = 0.0 if codes.dtype == torch.int8 or INTERPRET else 2 * shape[1] / 32 * 2.0**-13
    x = codes.double() * scale.double()
    assert worst(y, x, case.weight.dequantize(), case.bias, extra=fp8) <= 1


@pytest.mark.parametrize(
    ("tokens", "scheme", "kind"),
    [
        (40, "W4A8_DQ", "multiples"),
        (40, "W4A8_DQ_G256", "multiples"),
        (16, "W4A8_DQ", "int4_int8"),  # the forms for few tokens do not look at second scales
        (40, "W4A8_DQ_G64", "int4_int8"),
        (40, "W4A8_ASYM", "int4_int8"),
    ],
)
def test_scales_in_multiples_have_choices_of_their_own(tokens, scheme, kind, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(gpu, "pick", lambda op, key, rule, *_: (asked.append(key), rule)[1])
    case = make_case((tokens,), 512, 16, scheme, torch.bfloat16)
    parts = prepared(case, w4a8_linear, x_grid="int8_narrow")
    codes, scale, _ = quantize_activation(case.x, "int8_narrow", None, None, False)
    decoder = decode4.eight_bit_decoder(codes.dtype, parts["zero"] is not None)
    weight = parts["tiles"], parts["scale"], parts["zero"], None, 16, group_of(case), decoder
    second = torch.ones(128, device=DEVICE)  # also where it does not belong
    for most in (gpu.MOST, 512):  # from so many columns on, sums of whole rows may overflow
        monkeypatch.setattr(gpu, "MOST", most)
        gpu.w4(codes.to(DEVICE), *weight, x_scale=scale.to(DEVICE), second=second, dtype=torch.bfloat16)
    assert [key[0] for key in asked] == [kind, "int4_int8"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", nf4_linear.CASES, ids=str)
def test_nf4(shape, dtype, config) -> None:
    lead, columns, rows, group, name = shape
    x, w = torch.randn(*lead, columns).to(dtype), torch.randn(rows, columns) / columns
    codes, absmax = nf4_linear.quantize(w, group, name)
    tiles, scale = nf4_linear.prepare(codes, absmax)
    assert all(
        a.equal(b) for a, b in zip(nf4_linear.restore(tiles, scale, rows, columns), (codes, absmax), strict=True)
    )
    values = nf4_linear.table(name, torch.device("cpu"), dtype)
    decoder = decode4.table_decoder(nf4_linear.TABLES[name], dtype)
    flat = x.reshape(-1, columns)
    y = gpu.w4(
        flat.to(DEVICE), tiles.to(DEVICE), scale.to(DEVICE), None, None, rows, group, decoder, table=values.to(DEVICE)
    )
    exact = (values.double()[codes.long()].unflatten(1, (-1, group)) * absmax.double().unsqueeze(-1)).flatten(1)
    assert worst(y, flat, exact, None) <= 1


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_groups_with_8_bit_activations(group) -> None:
    for name in ("W4A8", "W4AFP8"):
        scheme = parse_scheme(name)
        assert w4a8_linear.supports(replace(scheme, weight=replace(scheme.weight, block=(1, group))), 256) is None
        odd = replace(scheme, weight=replace(scheme.weight, block=(1, 48)))
        assert "48" in (w4a8_linear.supports(odd, 96) or "")


def test_a_wrong_nibble_is_seen(config) -> None:
    case = make_case((16,), 128, 128, "W4A16_G128", torch.bfloat16)
    parts = prepared(case, w4a16_linear)
    parts["tiles"][0, 0, 5, 7] ^= 16
    y = gpu.w4(case.x.to(DEVICE), parts["tiles"], parts["scale"], None, case.bias.to(DEVICE), 128, 128, decode4.INT4)
    assert worst(y, case.x, case.weight.dequantize(), case.bias) > 1


@pytest.mark.parametrize("form", [gpu.Config(16, 8, 1, 4, 1, direct=True), gpu.Config(0, 128, 2, 0, 3, specialized=0)])
def test_what_is_measured_reads_the_weight_that_it_is_given(form, monkeypatch) -> None:
    case = make_case((3,), 256, 128, "W4A16_G128", torch.bfloat16)
    parts, runs, read = prepared(case, w4a16_linear), [], []

    def pick(op, key, rule, candidates, run, weight):
        runs.append(run)
        return gpu.Config(64, 16, 1, 4, 3)

    monkeypatch.setattr(gpu, "pick", pick)
    monkeypatch.setattr(gpu, "run_form", lambda config, x, x_scale, tiles, *_: read.append(tiles.data_ptr()))
    gpu.w4(case.x.to(DEVICE), parts["tiles"], parts["scale"], None, None, 128, 128, decode4.INT4)
    copy = (
        parts["tiles"].clone().view(torch.int16)
    )  # measuring takes turns between copies, so that none is in the cache
    runs[0](form, copy)
    assert read == [copy.data_ptr()]


@pytest.mark.gpu
@pytest.mark.parametrize("size", LARGER, ids=str)
@pytest.mark.parametrize("scheme", ["W4A16_G128", "W4A16_ASYM_G128", "W4A16_G64", "W4A16_ASYM_G32", "W4A16_CHANNEL"])
def test_larger_w4a16(size, scheme, config) -> None:
    dtype = (torch.bfloat16, torch.float16)[LARGER.index(size) % 2]  # half of the compilations
    check_w4a16((*size, scheme), dtype, act_order=False)


@pytest.mark.parametrize("shape", [s for s in w4a16_linear.CASES if s[0] != (0,)], ids=str)
def test_dequantized_for_cublas(shape, monkeypatch) -> None:
    case = make_case(*shape, torch.float16)
    parts = prepared(case, w4a16_linear)
    words = parts["tiles"].view(torch.int16)
    out = torch.empty(shape[2], shape[1], dtype=torch.float16, device=DEVICE)
    dequantize4.dequantize(words, parts["scale"], parts["zero"], None, out, group_of(case), decode4.INT4, 0)
    assert out.cpu().equal(case.weight.dequantize().half())
    monkeypatch.setattr(gpu, "pick", lambda *_: gpu.Config(0, 0, 1, 0, 0, chunk=128))
    flat = case.x.reshape(-1, shape[1]).to(DEVICE)
    bias = None if case.bias is None else case.bias.to(DEVICE)
    y = gpu.w4(flat, parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case), decode4.INT4)
    assert worst(y, flat, case.weight.dequantize().half(), case.bias) <= 1
