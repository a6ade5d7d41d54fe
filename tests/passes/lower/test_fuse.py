"""Each rewrite where it applies, where it almost does, and what all of them do to whole models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qfx
from qfx.lowering import lower_graph
from qfx.modules.linear import QLinear
from qfx.passes.discover.capture import capture
from qfx.passes.lower.fuse import rewrite
from tests.kernels.law import make_case
from tests.zoo import ZOO

WIDE = 32
Body = Callable[["Model", Tensor], Any]


def linear(scheme: str = "W8A8", bias: bool = True, out: int = WIDE) -> QLinear:
    case = make_case((5,), WIDE, out, scheme)
    static = {"input_scale": 0.02 if case.static[0] is not None else None}
    static["input_zero"] = 3 if case.static[1] is not None else None
    return QLinear.from_qtensor(case.weight, case.bias if bias else None, case.scheme, dtype=torch.float32, **static)


class Model(nn.Module):
    """Two quantized linears, a float one, a gain and a bias, and whatever a test does with them."""

    def __init__(self, body: Body, scheme: str = "W8A8") -> None:
        super().__init__()
        self.body = body
        self.a, self.b, self.plain = linear(scheme), linear(scheme, bias=False), nn.Linear(WIDE, WIDE)
        self.gain, self.bias = nn.Parameter(torch.rand(WIDE) + 0.5), nn.Parameter(torch.randn(WIDE))
        self.norm = nn.LayerNorm(WIDE)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Fused:
    """A model's graph before and after, run on one input."""

    @torch.no_grad()
    def __init__(
        self, body: Body, scheme: str = "W8A8", dtype: torch.dtype = torch.float32, kernel: str | None = None
    ) -> None:
        torch.manual_seed(0)
        model = Model(body, scheme).eval().to(dtype)
        for layer in (model.a, model.b) if kernel else ():
            layer.use_kernel(kernel)
        self.x = torch.randn(2, 3, WIDE, dtype=dtype)
        graph = capture(model, {"x": self.x})
        want = graph.run({"x": self.x})
        self.rewrites = {r.name: r for r in rewrite(graph.fx)}
        graph.touch()
        got = graph.run({"x": self.x})
        self.pairs = list(zip(tree_leaves(want), tree_leaves(got), strict=True))
        calls = [n for n in graph.nodes if n.op == "call_function"]
        self.ops = [str(n.target).removesuffix(".default") for n in calls if "getitem" not in n.name]

    def equal(self) -> bool:
        return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in self.pairs)

    def close(self) -> None:
        for a, b in self.pairs:
            torch.testing.assert_close(a, b)

    def why(self, name: str) -> list[str]:
        return [m.why for m in self.rewrites[name].misses]

    def changed(self, name: str) -> int:
        return self.rewrites[name].changed


def rms(m: Model, x: Tensor, last: int = -1) -> Tensor:
    f = x.float()
    return m.gain * (f * torch.rsqrt(f.pow(2).mean(last, keepdim=True) + 1e-6)).to(x.dtype)


def rms_late(m: Model, x: Tensor) -> Tensor:
    f = x.float()
    return (f * torch.rsqrt((f * f).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.gain.float())).type_as(x)


def layer(m: Model, x: Tensor) -> Tensor:
    f = x.float()
    f = f - f.mean(-1, keepdim=True)
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5) * m.gain.float() + m.bias.float()).to(x.dtype)


def test_an_input_is_quantized_by_an_op_of_its_own() -> None:
    f = Fused(lambda m, x: m.a(x))
    assert f.ops == ["qfx.quantize_rows", "qfx.int8_gemm"] and f.equal()
    assert f.why("left alone") == ["its input is quantized by itself: it comes from 'an input'"]
    assert f.why("end products") == ["its product goes to 'output'"]
    assert Fused(lambda m, x: m.a(x), "W8A8_STATIC").equal()
    f = Fused(lambda m, x: m.a(x), "FP8_DYNAMIC", torch.bfloat16)
    assert f.ops == ["qfx.quantize_rows", "qfx.fp8_gemm"] and f.equal()


@pytest.mark.parametrize(
    ("scheme", "why"),
    [("W8A8_STATIC_ASYM", "its input has a zero point"), ("W4A16_G16", None), ("W4A8_G16", None)],
)
def test_what_no_product_of_codes_takes_stays(scheme: str, why: str | None) -> None:
    f = Fused(lambda m, x: m.a(x), scheme)
    assert len(f.ops) == 1 and f.ops[0].endswith("_linear") and f.equal()
    assert f.why("quantize apart") == ([why] if why else [])


@pytest.mark.parametrize(("scheme", "second"), [("W4A8_DQ", True), ("W4A8", False)])
@torch.no_grad()
def test_a_product_of_codes_in_tiles_takes_all_that_the_linear_took(scheme: str, second: bool) -> None:
    case = make_case((2, 3), 128, 24, scheme)
    model = nn.Sequential(QLinear.from_qtensor(case.weight, case.bias, case.scheme, dtype=torch.float32))
    model[0].use_kernel("w4a8_linear")
    graph = capture(model, {"input": case.x})
    want = graph.run({"input": case.x})
    (before,) = (n for n in graph.nodes if n.target == torch.ops.qfx.w4a8_linear.default)
    taken = before.args[1:4], before.args[5], before.args[6:9]
    rewrite(graph.fx)
    graph.touch()
    (after,) = (n for n in graph.nodes if n.target == torch.ops.qfx.w4a8_gemm.default)
    assert (after.args[2:5], after.args[5], after.args[6:9]) == taken
    assert (taken[1] is not None) == second and (not second or "kernel_second" in str(taken[1].target))
    torch.testing.assert_close(graph.run({"input": case.x}), want, rtol=0, atol=0)


def test_codes_are_shared_by_readers_of_one_value() -> None:
    f = Fused(lambda m, x: (m.a(x), m.b(x)))
    assert f.changed("share codes") == 1 and f.ops.count("qfx.quantize_rows") == 1 and f.equal()
    f = Fused(lambda m, x: (m.a(x), m.b(x + 1)))
    assert f.changed("share codes") == 0 and f.ops.count("qfx.quantize_rows") == 2 and f.equal()
    f = Fused(lambda m, x: (m.a(x), m.b(x)), "W8A8_STATIC")  # each has a scale buffer of its own
    assert f.ops.count("qfx.quantize_rows") == 2
    assert f.why("share codes") == ["reads what a reads, but on another grid or scale"] and f.equal()


GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu spelled out": lambda v: v * torch.sigmoid(v),
    "gelu": F.gelu,
    "tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    "relu": F.relu,
}


@pytest.mark.parametrize("act", GATED)
def test_gated_products_give_codes(act: str) -> None:
    f = Fused(lambda m, x: m.a(GATED[act](m.plain(x)) * m.plain(x + 1)))
    assert f.changed("quantize gated products") == 1
    assert f.ops == ["aten.linear", "aten.add.Tensor", "aten.linear", "qfx.gated_quantize", "qfx.int8_gemm"]
    f.close()
    f = Fused(lambda m, x: m.a(m.plain(x + 1) * GATED[act](x)))
    assert f.changed("quantize gated products") == 1
    f.close()
    f = Fused(lambda m, x: m.a(GATED[act](m.plain(x))))
    assert f.ops == ["aten.linear", "qfx.gated_quantize", "qfx.int8_gemm"]
    f.close()


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.a(x.tanh() * m.plain(x)),
        lambda m, x: m.a(x * torch.sigmoid(1.702 * x) * m.plain(x)),
        lambda m, x: m.a(F.silu(x) * m.gain),
        lambda m, x: m.a(F.silu(x) * x[:1, :1]),
        lambda m, x: m.a(F.silu(x) * 2),
        lambda m, x: m.a(F.silu(x) + x),
    ],
    ids=["another function", "quick gelu", "a gain", "broadcast", "a number", "a sum"],
)
def test_what_only_looks_like_a_gated_product_stays(body: Body) -> None:
    f = Fused(body)
    assert f.changed("quantize gated products") == 0 and "qfx.gated_quantize" not in f.ops and f.equal()


def test_a_gated_product_that_others_read_stays() -> None:
    def body(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.silu(x) * m.plain(x)
        return m.a(y), y

    f = Fused(body)
    assert f.why("quantize gated products") == ["'mul' is read 2 times"] and f.equal()


@pytest.mark.parametrize("act", [None, *GATED])
@pytest.mark.parametrize("residual", [False, True])
def test_a_product_ends_with_its_function_and_its_sum(act: str | None, residual: bool) -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        y = GATED[act](y) if act else y
        return (x + y if act == "relu" else y + x) if residual else y

    f = Fused(body)
    assert f.changed("end products") == int(residual or act is not None)
    assert f.ops == ["qfx.quantize_rows", "qfx.int8_gemm"]
    f.close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: (lambda y: (F.silu(y), y))(m.a(x)), "its product is read 2 times"),
        (lambda m, x: (lambda y: y + y)(m.a(x)), "its product goes to 'add'"),
        (lambda m, x: m.a(x) + m.gain, "its product goes to 'add'"),
        (lambda m, x: m.a(x) + x[:1], "its product goes to 'add'"),
        (lambda m, x: torch.add(m.a(x), x, alpha=2), "its product goes to 'add'"),
        (lambda m, x: m.a(x).double() + x.double(), "its product goes to 'to'"),
        (lambda m, x: m.a(x).view(-1, WIDE), "its product goes to 'view'"),
    ],
)
def test_a_product_that_ends_otherwise_stays(body: Body, why: str) -> None:
    f = Fused(body)
    assert f.changed("end products") == 0 and f.why("end products") == [why] and f.equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [rms, rms_late, layer])
@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W8A8_STATIC"])
def test_a_norm_gives_codes(norm: Callable[[Model, Tensor], Tensor], scheme: str, dtype: torch.dtype) -> None:
    """Bit for bit, in low precision, too: it rounds where the model does."""
    f = Fused(lambda m, x: m.a(norm(m, x)), scheme, dtype)
    assert f.ops[-2:] == ["qfx.norm_quantize", f.ops[-1]] and f.changed("quantize norms") == 1
    assert f.ops.count("qfx.quantize_rows") == 0 and not {"aten.rsqrt", "aten.mean.dim"} & set(f.ops)
    assert f.equal()


def test_a_norm_in_one_op_gives_codes() -> None:
    for body in (lambda m, x: m.a(m.norm(x)), lambda m, x: m.a(F.rms_norm(x, [WIDE], m.gain, 1e-6))):
        f = Fused(body)
        assert f.ops == ["qfx.norm_quantize", "qfx.int8_gemm"]
        f.close()
    f = Fused(lambda m, x: m.plain(m.norm(x)))
    assert f.ops == ["aten.layer_norm", "aten.linear"] and f.equal()
    assert f.why("quantize norms") == ["no quantized linear reads it"]
    assert f.why("fuse norms") == ["no linear with quantized weights and a float input reads it"]
    assert f.why("fuse other norms") == ["it is one op, and there is no residual sum in front of it"]


def test_what_else_reads_a_norm_gets_its_values() -> None:
    f = Fused(lambda m, x: (lambda y: (m.a(y), m.b(y), m.plain(y)))(rms(m, x)))
    assert f.ops.count("qfx.norm_quantize") == 1 and "qfx.quantize_rows" not in f.ops and f.equal()
    f = Fused(lambda m, x: (lambda y: (m.a(y), m.b(y)))(rms(m, x)), "W8A8_STATIC")
    assert f.ops.count("qfx.quantize_rows") == 1 and f.equal()  # two scales: one of the two in the norm


def test_the_sum_in_front_of_a_norm_is_taken_in_and_kept() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        h = x + m.plain(x)
        return m.a(rms(m, h)), m.plain(h.tanh()), h

    f = Fused(body, dtype=torch.bfloat16)
    assert f.changed("quantize norms") == 1 and f.why("quantize norms") == []
    before = f.rewrites["quantize norms"].before
    assert f.rewrites["quantize norms"].after == before - 9  # add, two casts, pow, mean, add, rsqrt, 2 mul, quantize
    assert f.equal()


def test_without_a_quantized_reader_a_norm_takes_its_sum_in() -> None:
    f = Fused(lambda m, x: (lambda h: m.plain(m.norm(h)) + h)(x + m.plain(x)))
    assert f.ops.count("qfx.norm") == 1 and f.changed("fuse other norms") == 1 and "aten.layer_norm" not in f.ops
    f.close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: m.a(m.norm(x + x[:1, :1])), "the summands in front of the norm differ in shape or dtype"),
        (
            lambda m, x: (lambda h: m.plain(h) + m.a(m.norm(h)))(x + m.plain(x)),
            "the sum in front of the norm is read before it, by 'linear'",
        ),
    ],
)
def test_a_sum_that_cannot_be_taken_in_is_a_miss(body: Body, why: str) -> None:
    f = Fused(body)
    assert f.why("quantize norms") == [why] and f.changed("quantize norms") == 1
    f.close()


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.a(rms(m, x, last=1)),
        lambda m, x: m.a(x * torch.rsqrt((x.abs() ** 3).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.a(x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.a(F.layer_norm(x, x.shape[-2:])),
        lambda m, x: m.a(x * torch.rsqrt((x * m.gain).pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1].square())),
    ],
    ids=["another axis", "another power", "of another value", "two axes", "weighted", "no eps"],
)
def test_what_only_looks_like_a_norm_stays(body: Body) -> None:
    f = Fused(body)
    assert "qfx.norm_quantize" not in f.ops and f.equal()


def test_two_norms_of_one_sum_and_norms_in_a_row() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        h = m.norm(x) + m.plain(x)
        return m.a(rms(m, h)) + m.b(rms_late(m, h)) + m.a(m.norm(m.norm(h)))

    f = Fused(body)
    assert "aten.rsqrt" not in f.ops and "qfx.quantize_rows" not in f.ops
    f.close()


def test_rows_are_taken_back_where_the_output_is_shaped_as_the_input() -> None:
    f = Fused(lambda m, x: m.a(rms(m, x).view(-1, WIDE)).view(x.shape))
    assert f.changed("keep shapes") == 1 and f.changed("quantize norms") == 1 and f.equal()
    for body in (
        lambda m, x: m.a(rms(m, x).view(-1, WIDE)).view(-1, 3, WIDE // 2, 2),
        lambda m, x: m.a(rms(m, x).reshape(x.shape[0], -1, WIDE)[:, :2].reshape(-1, WIDE)).view(-1, 1, WIDE),
    ):
        f = Fused(body)
        assert f.changed("keep shapes") == 0 and f.equal()
        assert f.why("keep shapes") == ["its output is shaped otherwise than its input was"]


def test_a_hadamard_transform_gives_codes() -> None:
    f = Fused(lambda m, x: m.a(torch.ops.qfx.hadamard(x, 16)[0]))
    assert f.ops == ["qfx.hadamard", "qfx.int8_gemm"] and f.changed("quantize hadamards") == 1 and f.equal()
    f = Fused(lambda m, x: (lambda y: m.a(y) + y)(torch.ops.qfx.hadamard(x, 16)[0]))
    assert f.why("quantize hadamards") == ["what the transform gives is read 2 times"] and f.equal()
    f = Fused(lambda m, x: m.a(torch.ops.qfx.hadamard(x, 16, "int8_narrow")[0].float()))
    assert f.changed("quantize hadamards") == 0 and f.equal()


COUNTS = {
    # ops that compute: captured, and after each of the rewrites
    "llama": (97, [97, 97, 105, 105, 101, 101, 97, 73, 73, 73, 68, 68]),
    "opt": (38, [38, 38, 46, 46, 44, 44, 40, 35, 35, 35, 35, 35]),
    "bert": (42, [42, 42, 51, 51, 49, 49, 44, 39, 39, 39, 39, 39]),
}


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_whole_models(name: str, scheme: str) -> None:
    """Equal but for codes that the last bits of a sum move, at sizes other than those of the capture, too."""
    model, inputs = ZOO[name].load()
    q = qfx.quantize(model, {"schemes": {"*": scheme}, "ignore": ["@head"]}, [inputs], progress=False)
    qfx.lower(q, inputs, device="cuda")
    graph = lower_graph(q, inputs)
    rewrites = graph.meta["rewrites"]
    first, counts = COUNTS[name]
    assert rewrites[0].before == first and [r.after for r in rewrites] == counts
    shared = {t.data_ptr() for t in q.state_dict().values()}
    assert all(t.data_ptr() in shared for n, t in graph.named_buffers() if n.endswith("weight_scale"))
    for length in (12, 5):
        cut = {k: v[:1, :length] for k, v in inputs.items()}
        exact, want, got = (m(**cut).logits for m in (model, q, graph))
        apart = (want - got).abs().amax(-1) / want.abs().max()
        assert apart.max() < (want - exact).abs().max() / exact.abs().max()
        assert (apart < 1e-5).float().mean() > 0.7
    if name == "llama":
        assert torch.equal(graph(**inputs).logits, q(**inputs).logits)
