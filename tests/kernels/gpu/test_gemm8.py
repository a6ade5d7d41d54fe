"""The 8-bit GEMM against sums in float64: int8 products are exact, fp8 sums within what their accumulator keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qfx.kernels.gpu import gemm8 as module
from qfx.kernels.gpu.gemm8 import gemm8
from qfx.kernels.gpu.gemm8_config import (
    SHARED,
    Config,
    candidates,
    default,
    large_candidates,
    skinny_candidates,
    specialized_candidates,
)
from qfx.kernels.gpu.launch import INTERPRET

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
SMALL = [
    Config("skinny", 16, 64, 32, 2, 4),
    Config("skinny", 16, 64, 32, 2, 4, split=3),
    Config("skinny", 32, 64, 32, 2, 4, tma=False),
    Config("skinny", 16, 128, 64, 2, 4, split=2, tma=False),
    Config("large", 32, 64, 32, 2, 4),
    Config("large", 32, 64, 32, 2, 4, persistent=True, parts=2, group=2),
    Config("large", 32, 32, 32, 2, 4, tma=False, group=1),
]
SHAPES = [(1, 64, 32), (5, 70, 160), (20, 33, 80), (33, 130, 64), (3, 1, 16)]


def codes(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random codes with a row of zeros and one of extremes."""
    if dtype == INT8:
        x = torch.randint(-128, 128, (rows, columns), dtype=dtype)
    else:
        x = torch.randn(rows, columns).to(dtype)
    x[rows // 3] = 0
    x[rows // 2] = -128 if dtype == INT8 else torch.finfo(dtype).max / 256
    return x.to(device)


def expected(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias=None, residual=None, outliers=None) -> Tensor:
    """In float64, in which products and sums of codes are exact."""
    y = (a.double() @ b.double().t()) * a_scale.double() * b_scale.double()
    if outliers is not None:
        y = y + outliers[0].double() @ outliers[1].double().t()
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def lost(a: Tensor, b: Tensor, promote: int) -> Tensor:
    """How much of a sum of float8 products the tensor core may drop.

    A step of wgmma adds 32 products to the running sum after shifting all 33 to the largest one's exponent, where it
    keeps 13 bits behind the leading one: it drops less than 33 · 2⁻¹³ of the larger of the running sum and the
    products. The running sum starts anew every `promote` products (0: never); its own loss so far may enlarge it,
    which the exponential covers.
    """
    k = a.shape[1]
    pad = (0, -k % 32)
    x, w = (torch.nn.functional.pad(t.double(), pad).unflatten(1, (-1, 32)) for t in (a, b))
    sums, sizes = torch.einsum("mjk,njk->mnj", x, w), torch.einsum("mjk,njk->mnj", x.abs(), w.abs())
    steps = sums.shape[-1] if promote == 0 else promote // 32
    chunks = [c.cumsum(-1) - c for c in sums.split(steps, -1)]
    largest = torch.maximum(torch.cat(chunks, -1).abs(), sizes)
    each = 33 * 2.0**-13
    return each * largest.sum(-1) * torch.tensor(each * steps).exp()


def bound(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, y: Tensor, extra: Tensor) -> Tensor:
    """How far float32 may be from `expected`: one rounding each of the sum (int8), the products with two scales, and
    the additions, each at most 2⁻²⁴ of the absolute sum of all terms; fp8 also rounds in K additions.
    """
    k = a.shape[1]
    terms = (a.double().abs() @ b.double().abs().t()) * a_scale.double() * b_scale.double()
    roundings = 8 if a.dtype == INT8 else k + 8
    return roundings * 2.0**-24 * (terms + extra) + 2.0**-24 * y.abs()


def check(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    config: Config | None,
    device: str = "cpu",
    promote: int | None = None,
    *,
    forms: bool = True,
) -> None:
    """`promote` says how the tensor core sums float8, None: in float32. `forms`: more than a float32 output."""
    a, b = codes(m, k, dtype, device), codes(n, k, dtype, device)
    a_scale, b_scale = torch.rand(m, 1, device=device) + 0.1, torch.rand(n, device=device) + 0.1
    bias, residual = torch.randn(n, device=device), torch.randn(m, n, device=device) * 8
    for out_dtype in (torch.float32, torch.bfloat16) if forms else (torch.float32,):
        out = gemm8(a, b, a_scale, b_scale, bias, residual, "", out_dtype, config=config)
        y = expected(a, b, a_scale, b_scale, bias, residual)
        allowed = bound(a, b, a_scale, b_scale, y, bias.abs() + residual.abs())
        if promote is not None:
            allowed = allowed + lost(a, b, promote) * a_scale.double() * b_scale.double()
        if out_dtype == torch.bfloat16:
            allowed = allowed + 2.0**-8 * (y.abs() + allowed)
        assert out.shape == (m, n) and out.dtype == out_dtype
        assert ((out.double() - y).abs() <= allowed).all()
    # without scales integers come out as they are, as long as float32 holds them
    ones = torch.ones(1, device=device)
    if dtype == INT8 and forms:
        plain = gemm8(a, b, ones, ones, out_dtype=torch.float32, config=config)
        exact = a.double() @ b.double().t()
        assert torch.equal(plain.double()[exact.abs() <= 2**24], exact[exact.abs() <= 2**24])


@interpreted
@pytest.mark.parametrize("config", SMALL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exact(shape: tuple[int, int, int], config: Config) -> None:
    check(*shape, INT8, config)


@interpreted
@pytest.mark.parametrize("config", [SMALL[1], SMALL[2], SMALL[5]], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8(dtype: torch.dtype, config: Config) -> None:
    check(5, 70, 160, dtype, config)


@interpreted
@pytest.mark.parametrize("config", [SMALL[2], SMALL[3], SMALL[6]], ids=str)
def test_pointers_take_any_depth_and_stride(config: Config) -> None:
    check(7, 33, 41, INT8, config)
    check(2, 5, 3, INT8, config)
    a, b = codes(9, 61, INT8)[:, 3:50], codes(20, 70, INT8)[::2, 1:48]
    y = gemm8(a, b, torch.ones(1), torch.ones(1), out_dtype=torch.float32, config=config)
    assert torch.equal(y.double(), a.double() @ b.double().t())


@interpreted
@pytest.mark.parametrize("config", SMALL, ids=str)
def test_zero_point(config: Config) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    zero, sums = torch.tensor(-77, dtype=torch.int32), b.sum(1, dtype=torch.int32)
    out = gemm8(a, b, torch.ones(()), torch.ones(40), None, None, "", torch.float32, zero, sums, config=config)
    assert torch.equal(out.double(), (a.double() + 77) @ b.double().t())


ACTIVATIONS = {
    "": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


FEW = [Config("few", 8, 16, 32, 2, 4, tma=False, promote=0), Config("few", 8, 16, 64, 3, 2, tma=False, promote=0)]


@interpreted
@pytest.mark.parametrize("config", FEW, ids=str)
def test_few_tokens(config: Config) -> None:
    for m, n, k in ((1, 16, 128), (8, 33, 41), (3, 5, 300), (7, 70, 256)):
        check(m, n, k, INT8, config)
    check(5, 70, 160, E4M3, config)
    check(5, 70, 160, E5M2, config)


@interpreted
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("config", [SMALL[1], SMALL[5]], ids=str)
def test_activation_and_bfloat16(config: Config, name: str) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    a_scale, b_scale = torch.rand(6, 1) / 100, torch.rand(40) / 100
    bias, residual = torch.randn(40).bfloat16(), torch.randn(6, 40).bfloat16()
    y = expected(a, b, a_scale, b_scale, bias)
    y32 = ACTIVATIONS[name](y) + residual.double()
    out = gemm8(a, b, a_scale, b_scale, bias, residual, name, config=config)
    assert out.dtype == torch.bfloat16
    # float32 roundings of values below 64 and of exp, each a few units of 2⁻²⁴, then one rounding to bfloat16
    assert ((out.double() - y32).abs() <= 2.0**-8 * y32.abs() + 64 * 16 * 2.0**-24).all()


@interpreted
@pytest.mark.parametrize("config", [SMALL[0], SMALL[1], SMALL[4], SMALL[6], FEW[0]], ids=str)
def test_outliers(config: Config) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    a_scale, b_scale = torch.rand(6, 1), torch.rand(40)
    xo, wo = (torch.randn(6, 32) * 100).bfloat16(), torch.randn(40, 32).bfloat16()
    out = gemm8(a, b, a_scale, b_scale, out_dtype=torch.float32, outliers=(xo, wo), config=config)
    y = expected(a, b, a_scale, b_scale, outliers=(xo, wo))
    extra = 32 * (xo.double().abs() @ wo.double().abs().t())
    assert ((out.double() - y).abs() <= bound(a, b, a_scale, b_scale, y, extra)).all()


@interpreted
def test_split_sums_do_not_depend_on_each_other() -> None:
    a, b = codes(20, 96, E4M3), codes(70, 96, E4M3)
    scale = torch.ones(1)
    config = Config("skinny", 16, 64, 32, 2, 4, split=3)
    first = gemm8(a, b, scale, scale, out_dtype=torch.float32, config=config)
    assert all(torch.equal(gemm8(a, b, scale, scale, out_dtype=torch.float32, config=config), first) for _ in range(3))


def test_candidates_are_sound() -> None:
    for m, n, k in (
        (1, 33, 17),
        (1, 8192, 8192),
        (16, 28672, 8192),
        (100, 4096, 11008),
        (256, 8192, 28672),
        (8192,) * 3,
    ):
        for int8 in (True, False):
            for tma in (True, False):
                forms = [skinny_candidates] * (m <= 256) + [large_candidates]
                for found in (form(m, n, k, int8, tma) for form in forms):
                    assert 0 < len(found) <= 48 and len(set(found)) == len(found)
                    assert all((tma or not c.tma) and (c.split == 1 or 4 * c.split <= -(-k // 128)) for c in found)
                    assert all((c.tokens + c.channels) * c.depth * c.stages <= SHARED for c in found)
            assert len(specialized_candidates(m, n, k, int8)) <= 24
            for hopper in (True, False):
                forms = {c.form for c in candidates(m, n, k, int8, hopper=hopper)}
                assert ("specialized" in forms) == (hopper and m > 128)
            for chosen in (default(m, n, k, int8), default(m, n, k, int8, False)):
                assert (chosen.tokens + chosen.channels) * chosen.depth * chosen.stages <= SHARED
                assert chosen.form != "cublas" and chosen == default(m, n, k, int8, chosen.tma)


@interpreted
@pytest.mark.parametrize(
    ("columns", "out", "outliers", "kind"),
    [
        (64, torch.bfloat16, False, "int8"),
        (64, torch.float32, False, "int8-general"),
        (63, torch.bfloat16, False, "int8-general"),
        (64, torch.bfloat16, True, "int8-general"),
    ],
)
def test_what_the_specialized_form_does_not_take_has_choices_of_its_own(
    columns: int, out: torch.dtype, outliers: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pick(op, key, rule, tried, run, weight):
        asked.append((key[0], tried()))
        return rule

    monkeypatch.setattr(module.tune, "pick", pick)
    monkeypatch.setattr(module, "capability", lambda device: 90)
    a, b = codes(200, 64, INT8), codes(columns, 64, INT8)
    more = (torch.randn(200, 16).bfloat16(), torch.randn(columns, 16).bfloat16()) if outliers else None
    gemm8(a, b, torch.rand(200, 1), torch.rand(columns), out_dtype=out, outliers=more)
    ((found, tried),) = asked
    assert found == kind and any(c.form == "specialized" for c in tried) == (kind == "int8")


@interpreted
@pytest.mark.parametrize("tokens", [16, 17, 128])
def test_few_tokens_have_one_choice_whatever_else_there_is(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the specialized form nor, up to 16 tokens, cuBLASLt is tried, so their conditions do not split tables."""
    asked = []
    monkeypatch.setattr(module.tune, "pick", lambda op, key, rule, *_: asked.append(key[:3]) or rule)
    monkeypatch.setattr(module, "_cublas_takes", lambda o: o.residual is None)
    a, b, one = codes(tokens, 64, E4M3), codes(64, 64, E4M3), torch.ones(1)
    for residual in (None, torch.zeros(tokens, 64)):
        assert gemm8(a, b, one, one, residual=residual, out_dtype=torch.float32).shape == (tokens, 64)
    assert asked == [("fp8", True, tokens > 16), ("fp8", True, False)]


def test_no_tokens() -> None:
    y = gemm8(codes(3, 16, INT8)[:0], codes(5, 16, INT8), torch.ones(0, 1), torch.ones(5))
    assert y.shape == (0, 5) and y.dtype == torch.bfloat16


GPU_SHAPES = [(1, 512, 1024), (16, 1000, 1040), (70, 264, 1024), (200, 392, 2064), (300, 520, 1024)]
"""One for each class of candidates: the skinny form's by their tokens, and the large form's."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_every_candidate_on_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """All in one form, the first and the last in every one. Of E5M2, these two: only the instruction is another."""
    form = "large" if shape[0] == 300 else "skinny"
    found = [c for c in candidates(*shape, dtype == INT8) if c.form in (form, "few")]
    ends = (found[0], found[-1])
    for config in ends if dtype == E5M2 else found:
        promote = None if dtype == INT8 else min(config.promote, config.depth)
        check(*shape, dtype, config, "cuda", promote, forms=config in ends and dtype != E5M2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [INT8, E4M3])
@pytest.mark.parametrize("shape", [(128, 256, 128), (70, 264, 1024), (1000, 1032, 528), (3000, 4096, 1024)], ids=str)
def test_specialized_on_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma is of sm_90")
    m, n, k = shape
    a, b = codes(m, k, dtype, "cuda"), codes(n, k, dtype, "cuda")
    a_scale, b_scale = torch.rand(m, 1, device="cuda") + 0.1, torch.rand(n, device="cuda") + 0.1
    bias, residual = torch.randn(n, device="cuda"), torch.randn(m, n, device="cuda")
    y = expected(a, b, a_scale, b_scale, bias, residual)
    allowed = bound(a, b, a_scale, b_scale, y, bias.abs() + residual.abs())
    if dtype != INT8:
        allowed = allowed + lost(a, b, 0) * a_scale.double() * b_scale.double()
    allowed = allowed + 2.0**-8 * (y.abs() + allowed)
    for config in specialized_candidates(m, n, k, dtype == INT8):
        out = gemm8(a, b, a_scale, b_scale, bias, residual, config=config)
        assert ((out.double() - y).abs() <= allowed).all(), config


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_the_choice_of_the_tables_and_odd_strides_on_gpu(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 33, 70), (40, 65, 1023), (513, 129, 200)):
        check(m, n, k, dtype, None, "cuda", None if dtype == INT8 else 0)
    a, b = codes(9, 300, dtype, "cuda")[:, 3:150], codes(40, 300, dtype, "cuda")[::2, 1:148]
    one = torch.ones(1, device="cuda")
    y = gemm8(a, b, one, one, out_dtype=torch.float32)
    exact = a.double() @ b.double().t()
    assert ((y.double() - exact).abs() <= (0 if dtype == INT8 else lost(a, b, 0) + 1e-4 * exact.abs())).all()


@pytest.mark.gpu
def test_cublas() -> None:
    a, b = codes(70, 1024, E4M3, "cuda"), codes(528, 1024, E4M3, "cuda")
    b_scale, bias = torch.rand(528, device="cuda") + 0.1, torch.randn(528, device="cuda").bfloat16()
    for a_scale in (torch.rand(70, 1, device="cuda") + 0.1, torch.full((), 0.3, device="cuda")):
        y = expected(a, b, a_scale, b_scale, bias)
        allowed = bound(a, b, a_scale, b_scale, y, bias.abs()) + lost(a, b, 0) * a_scale.double() * b_scale.double()
        out = gemm8(a, b, a_scale, b_scale, bias, config=Config("cublas"))
        assert ((out.double() - y).abs() <= allowed + 2.0**-8 * (y.abs() + allowed)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_split_sums_are_the_same_every_time_and_in_graphs(dtype: torch.dtype) -> None:
    a, b = codes(16, 8192, dtype, "cuda"), codes(1024, 8192, dtype, "cuda")
    one = torch.ones(1, device="cuda")
    config = Config("skinny", 16, 64, 128, 4, 4, split=8)
    first = gemm8(a, b, one, one, out_dtype=torch.float32, config=config)
    assert all(torch.equal(gemm8(a, b, one, one, out_dtype=torch.float32, config=config), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm8(a, b, one, one, out_dtype=torch.float32, config=config)
    for _ in range(5):
        out.zero_()
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.gpu
def test_rows_past_two_to_the_31() -> None:
    m, k = 2**17 + 8, 2**14
    a = torch.zeros(m, k, dtype=INT8, device="cuda")
    a[-1], b = 3, codes(64, k, INT8, "cuda")
    one = torch.ones(1, device="cuda")
    for config in (Config("large", 128, 128, 128, 3, 8, tma=False), Config("large", 128, 128, 128, 3, 8)):
        y = gemm8(a, b, one, one, out_dtype=torch.float32, config=config)
        assert torch.equal(y[-1].double(), 3 * b.double().sum(1)) and not y[:-1].any()
