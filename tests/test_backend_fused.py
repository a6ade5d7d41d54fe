"""The rewrites on Dynamo's graphs: what they change, that codes stay, that merged weights follow their parameters."""

import functools
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backend import Backend
from qfx.core.errors import RecipeError
from qfx.lowering import inductor_pass
from qfx.modules.linear import QLinear
from qfx.passes.lower import graph as lower_graph
from qfx.watched import WEIGHTS
from tests.test_backend import Branching, Feeds, Stack, quantized, same, times_made, unfused
from tests.zoo import ZOO
from tests.zoo.captured import distance, floats
from tests.zoo.codes import Codes, Difference, compare

pytestmark = pytest.mark.usefixtures("dynamo")


def changed(chosen: Backend) -> dict[str, int]:
    """How often each rewrite applied in all graphs."""
    found: dict[str, int] = {}
    for done in (r for graph in chosen.rewrites for r in graph):
        found[done.name] = found.get(done.name, 0) + done.changed
    return {name: n for name, n in found.items() if n}


def reasons(chosen: Backend, name: str) -> set[str]:
    return {m.why for graph in chosen.rewrites for r in graph if r.name == name for m in r.misses}


def both(model: nn.Module, recipe: Any, feeds: Feeds) -> tuple[list[Tensor], list[Tensor], Difference, Backend, Codes]:
    """Outputs without and with rewrites, how their codes differ, and what was compiled."""
    plain, fused = Codes(), Codes()
    want = floats(torch.compile(model, backend=unfused(recipe, then=plain))(**feeds))
    torch._dynamo.reset()
    chosen = qfx.backend(recipe, then=fused)
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    return want, got, compare(plain, fused), chosen, fused


# q, k, v and gate, up; linears left; gated or activated inputs; ends of products; norms
PRODUCTS = {"quantize apart": 8, "quantize gated products": 2, "end products": 4, "quantize norms": 4}
APPLIED = {
    "llama": {"merge linears": 4, **PRODUCTS},
    "qwen3": {"merge linears": 4, **PRODUCTS},
    "opt": {"merge linears": 2, **PRODUCTS},
    "bert": {"merge linears": 2, **PRODUCTS, "quantize apart": 9, "end products": 5, "quantize norms": 5},
    "gpt2": {"keep shapes": 8, **PRODUCTS},
}


@pytest.mark.parametrize(("name", "scheme"), [*((name, "W8A8") for name in APPLIED), ("llama", "FP8_DYNAMIC")])
def test_codes_stay(name: str, scheme: str) -> None:
    model, feeds = ZOO[name].load()
    want, got, difference, chosen, fused = both(model, scheme, feeds)
    assert changed(chosen) == APPLIED[name]
    assert difference.linears == len(chosen.layers)
    assert difference.first[1] <= 1 and difference.moved <= 1e-4 * difference.codes
    assert distance(want, got) < (1e-6 if not difference.moved else distance(floats(model(**feeds)), want))
    assert not any(op.endswith("8_linear") for op in fused.ops())
    assert all(m.why for graph in chosen.rewrites for r in graph for m in r.misses)


def test_the_comparison_sees_other_codes() -> None:
    model, feeds = Block().eval(), {"x": torch.randn(4, 12, 64)}
    plain, other = Codes(), Codes()
    torch.compile(model, backend=unfused(ALL, then=plain))(**feeds)
    torch._dynamo.reset()
    model.gain[3] *= 1.5
    torch.compile(model, backend=qfx.backend(ALL, then=other))(**feeds)
    difference = compare(plain, other)
    assert difference.moved > 1e-3 * difference.codes and difference.steps > 1


def test_a_solution_is_rewritten() -> None:
    model, feeds = ZOO["opt"].load()
    q = qfx.quantize(model, "w8a8-static-osplus", [feeds], progress=False)
    state = {k: v.clone() for k, v in q.state_dict().items()}
    chosen = qfx.backend(q, then="eager")
    fast = torch.compile(model, backend=chosen, dynamic=True)
    assert distance(floats(q(**feeds)), floats(fast(**feeds))) < 1e-6
    assert changed(chosen) == APPLIED["opt"]
    short = {k: v[:, :5].contiguous() for k, v in feeds.items()}
    assert distance(floats(q(**short)), floats(fast(**short))) < 1e-6
    assert len(chosen.solution.joined) == 2  # type: ignore[attr-defined]
    assert all(torch.equal(v, state[k]) for k, v in q.state_dict().items())


@pytest.mark.parametrize("solved", [False, True])
def test_linears_that_are_joined_in_one_graph_and_not_in_another(solved: bool) -> None:
    model, feeds = Pair().eval(), {"x": torch.randn(5, 64)}
    q = qfx.quantize(model, ALL, [feeds], progress=False)
    chosen = qfx.backend(q if solved else ALL, then="eager")
    fast = torch.compile(model, backend=chosen)
    for apart in (False, True, False):
        torch._dynamo.reset()
        assert torch.equal(fast(**feeds, apart=apart), q(**feeds, apart=apart))
    assert [graph[0].changed for graph in chosen.rewrites] == [1, 0, 1]


def test_without_rewrites_nothing_is_changed() -> None:
    model, feeds = ZOO["opt"].load()
    chosen = unfused("W8A8", then="eager")
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    assert chosen.rewrites == [] and same(got, floats(quantized(model, chosen, feeds)(**feeds)))


def test_a_graph_without_quantized_linears_is_not_rewritten() -> None:
    model, feeds = ZOO["opt"].load()
    chosen = qfx.backend({"schemes": {"*.nothing": "W8A8"}}, then="eager")
    assert same(floats(torch.compile(model, backend=chosen)(**feeds)), floats(model(**feeds)))
    assert chosen.rewrites == []


class Pair(nn.Module):
    """Two linears that read one value, and a third one."""

    def __init__(self, bias: bool = True, between: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 48, bias), nn.Linear(64, 32, bias)
        self.c = nn.Linear(64, 64)
        self.between = between

    def forward(self, x: Tensor, apart: bool = False) -> Tensor:
        a = self.a(x)
        self.between(x)
        b = self.b(x.tanh() if apart else x)
        return torch.cat([a, b, self.c(a @ torch.ones(48, 64))], -1)


class Block(nn.Module):
    """A norm that is spelled out, a gated product, and the sum behind it; twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.rand(64) + 0.5), 1e-6
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
            x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x


ALL = {"schemes": {"*": "W8A8"}}
TWICE = {"quantize apart": 4, "quantize gated products": 2, "quantize norms": 2, "merge linears": 2}


def _write(p: nn.Parameter) -> None:
    p.mul_(0.5)


def _point_elsewhere(p: nn.Parameter) -> None:
    p.data = p.data.flip(0)


@pytest.mark.parametrize("change", [_write, _point_elsewhere])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "a.bias", "b.bias"])
def test_a_joined_weight_follows_each_of_its_parameters(name: str, change: Callable[[nn.Parameter], None]) -> None:
    model, feeds = Pair().eval(), {"x": torch.randn(5, 64)}
    chosen = qfx.backend(ALL, then="eager")
    fast = torch.compile(model, backend=chosen)
    before = fast(**feeds)
    assert changed(chosen)["merge linears"] == 1 and torch.equal(fast(**feeds), before)
    assert torch.equal(before, quantized(model, chosen, feeds)(**feeds))
    change(model.get_parameter(name))
    after = fast(**feeds)
    assert not torch.equal(after, before)
    assert torch.equal(after, quantized(model, chosen, feeds)(**feeds))
    assert times_made(model) == [2, 1] and chosen.graphs == 1


def test_a_joined_weight_follows_a_new_parameter() -> None:
    model, feeds = Pair().eval(), {"x": torch.randn(5, 64)}
    chosen = qfx.backend(ALL, then="eager")
    fast = torch.compile(model, backend=chosen)
    before = fast(**feeds)
    model.b.weight = nn.Parameter(model.b.weight.flip(0))
    assert not torch.equal(fast(**feeds), before)
    assert torch.equal(fast(**feeds), quantized(model, chosen, feeds)(**feeds))
    assert len(WEIGHTS[model.a.weight]) == 1  # nothing is kept for the one that is gone


def test_what_is_not_merged_says_why() -> None:
    feeds = {"x": torch.randn(5, 64)}
    chosen = qfx.backend({"schemes": {"a": "W8A8", "b": "FP8_DYNAMIC", "c": "W8A8"}}, then="eager")
    torch.compile(Pair().eval(), backend=chosen)(**feeds)
    assert reasons(chosen, "merge linears") == {"reads what a reads, but has another scheme"}
    assert "merge linears" not in changed(chosen)
    torch._dynamo.reset()
    model = Pair().eval()
    model.b.bias = None
    chosen = qfx.backend(ALL, then="eager")
    got = torch.compile(model, backend=chosen)(**feeds)
    assert reasons(chosen, "merge linears") == {"reads what a reads, but has another form: only one has a bias"}
    assert torch.equal(got, quantized(model, chosen, feeds)(**feeds))


def test_a_value_that_is_written_to_is_left_alone() -> None:
    model = Pair(between=lambda x: x.add_(1)).eval()
    x, chosen = torch.randn(5, 64), qfx.backend(ALL, then="eager")
    want = torch.compile(model, backend=unfused(ALL, then="eager"))(x.clone())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend=chosen)(x.clone()), want)
    assert reasons(chosen, "quantize apart") == {"the model writes into its input, in place"}
    assert changed(chosen) == {"quantize apart": 1}


@pytest.mark.parametrize(
    ("scheme", "kernel"), [("W4A8_G32", "w4a8_linear"), ("W4A8_DQ_G32", "w4a8_linear"), ("W4A16_G32", "w4a16_linear")]
)
def test_layouts_of_kernels(scheme: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device: products of 4-bit weights in tiles take codes of their input."""
    monkeypatch.setattr(lower_graph, "fit_kernel", lambda module, device: module.use_kernel(kernel))
    model, feeds, codes = Block().eval(), {"x": torch.randn(2, 5, 64)}, Codes()
    chosen = qfx.backend({"schemes": {"*": scheme}}, then=codes)
    got = torch.compile(model, backend=chosen, dynamic=True)(**feeds)
    assert distance([quantized(model, chosen, feeds)(**feeds)], [got]) < 1e-5
    if kernel == "w4a8_linear":
        assert codes.ops().count("qfx.w4a8_gemm") == 4 and "qfx.w4a8_linear" not in codes.ops()
        assert changed(chosen) == TWICE
    else:
        assert [codes.ops().count(f"qfx.{op}") for op in ("w4a16_linear", "norm", "gated")] == [4, 2, 2]
        assert changed(chosen) == {"merge linears": 2, "fuse gated products": 2, "fuse norms": 2}


def test_graph_breaks() -> None:
    model, feeds = Stack().eval(), {"x": torch.randn(2, 5, 64)}
    chosen = qfx.backend("W8A8", then="eager")
    fast = torch.compile(model, backend=chosen)
    want = quantized(model, chosen, feeds)(**feeds)
    assert all(torch.equal(fast(**feeds), want) for _ in range(2))
    assert changed(chosen)["end products"] >= 1 and times_made(model) == [1] * 4


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8", "FP8_DYNAMIC"])
def test_sizes_that_vary_do_not_compile_again_and_again(scheme: str) -> None:
    model, feeds = Block().eval(), {"x": torch.randn(4, 12, 64)}
    chosen = qfx.backend({"schemes": {"*": scheme}}, then="eager")
    q, fast = quantized(model, chosen, feeds), torch.compile(model, backend=chosen, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for batch, length in ((2, 12), (2, 9), (2, 7), (3, 11), (4, 6), (3, 5)):
        x = torch.randn(batch, length, 64)
        assert distance([q(x)], [fast(x)]) < 1e-6, (batch, length)
    # one with the first sizes, one with another length, one with another batch
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == chosen.graphs <= 3
    assert times_made(model) == [1, 1]


def test_a_number_that_is_an_input_of_the_graph_is_guarded() -> None:
    model, feeds = Block().eval(), {"x": torch.randn(4, 12, 64)}
    chosen = qfx.backend(ALL, then="eager")
    q, fast = quantized(model, chosen, feeds), torch.compile(model, backend=chosen, dynamic=True)
    for graphs, eps in enumerate((1e-6, 1e-2), 1):
        q.eps = model.eps = eps
        assert distance([q(**feeds)], [fast(**feeds)]) < 1e-6
        assert chosen.graphs == graphs and changed(chosen)["quantize norms"] == 2 * graphs


@pytest.mark.parametrize(("cache", "most"), [("dynamic", 4), ("static", 3)])
def test_generate(cache: str, most: int) -> None:
    model, feeds = ZOO["llama"].load()
    settings: dict[str, Any] = {
        **{"max_new_tokens": 3, "do_sample": False, "use_cache": True, "cache_implementation": cache},
        **{"output_logits": True, "return_dict_in_generate": True, "disable_compile": True},
    }
    chosen = qfx.backend("W8A8", then="eager")
    q = quantized(model, chosen, feeds)
    q.compile(backend="eager")  # Dynamo itself moves the last bits of a static cache's attention
    want = q.generate(**feeds, **settings)
    model.compile(backend=chosen)
    got = model.generate(**feeds, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert distance(list(want.logits), list(got.logits)) < 1e-5
    assert chosen.graphs <= most and all(n == 1 for n in times_made(model))
    assert changed(chosen)["merge linears"] == 4 * chosen.graphs


def test_a_quantized_model_is_rewritten_without_a_recipe() -> None:
    model, feeds = ZOO["opt"].load()
    q = qfx.quantize(model, "w8a8-smoothquant", [feeds], progress=False)
    codes = Codes()
    chosen = qfx.backend(then=codes)
    got = floats(torch.compile(q, backend=chosen, fullgraph=True)(**feeds))
    assert distance(floats(q(**feeds)), got) < 1e-6
    assert changed(chosen) == {**PRODUCTS, "quantize apart": 12, "share codes": 4}
    assert "qfx.int8_linear" not in codes.ops() and chosen.layers == {} == chosen.floats
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="is not quantized"):
        torch.compile(model, backend="qfx")(**feeds)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_inductor_runs_the_rewrites_on_its_own_graph(dtype: torch.dtype) -> None:
    model = nn.Sequential(Block(), nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval().to(dtype)
    feeds, ops = {"input": torch.randn(2, 5, 64, dtype=dtype)}, []

    def spy(graph: torch.fx.Graph) -> None:
        inductor_pass(graph)
        ops.extend(str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function")

    q = qfx.quantize(model, ALL, [feeds], progress=False)
    got = torch.compile(q, fullgraph=True, options={"post_grad_custom_pre_pass": spy})(**feeds)
    assert distance([q(**feeds)], [got]) < (1e-6 if dtype is torch.float32 else 2e-2)
    assert [ops.count(f"qfx.{op}") for op in ("norm_quantize", "gated_quantize", "int8_gemm")] == [3, 3, 8]
    assert not {"qfx.quantize_rows", "qfx.int8_linear", "aten.rsqrt", "aten.var_mean.correction"} & set(ops)


def test_modes_and_options_go_to_the_next_backend() -> None:
    seen: list[dict[str, Any]] = []

    def then(gm: torch.fx.GraphModule, inputs: list[Any], **given: Any) -> Callable[..., Any]:
        seen.append(given)
        return gm.forward

    x = torch.randn(2, 64)
    fast: dict[str, Any] = {"recipe": "W8A8", "then": then, "mode": "max-autotune", "then_options": {"a": 1}}
    for how in (
        {"backend": "qfx", "options": fast},
        {"backend": qfx.backend(**fast)},
        {"backend": qfx.backend("W8A8", then=then, then_options={"a": 1}), "mode": "max-autotune"},
        {"backend": qfx.backend("W8A8", then=then, mode="max-autotune"), "options": {"a": 1}},
    ):
        torch._dynamo.reset()
        torch.compile(Branching(asks=False).eval(), **how)(x)
    assert seen == [{"mode": "max-autotune", "options": {"a": 1}}] * 4
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="mode='default-x' already") as e:
        torch.compile(Branching(asks=False), backend=qfx.backend("W8A8", mode="default-x"), mode="max-autotune")(x)
    assert isinstance(e.value.inner_exception, RecipeError)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor() -> None:
    model, feeds = Pair().eval(), {"x": torch.randn(5, 64)}
    chosen = qfx.backend(ALL, mode="max-autotune", then_options={"epilogue_fusion": False})
    got = torch.compile(model, backend=chosen, fullgraph=True)(**feeds)
    assert distance([quantized(model, chosen, feeds)(**feeds)], [got]) < 1e-6
    assert changed(chosen)["merge linears"] == 1


def test_inductor_refuses_options_that_it_does_not_know() -> None:
    fast = functools.partial(torch.compile, Branching(asks=False).eval())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no_such_option"):
        fast(backend=qfx.backend(ALL, then_options={"no_such_option": True}))(torch.randn(2, 64))


def test_layers_on_a_gpu_without_a_kernel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = {"x": torch.randn(4, 12, 64)}
    for scheme, told in (("W4A16_G32", True), ("W8A8", False)):  # int8 is read as it is stored
        torch._dynamo.reset()
        q = qfx.quantize(Block().eval(), {"schemes": {"*": scheme}}, [feeds], progress=False)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.compile(q, backend=qfx.backend(then="eager"))(**feeds)
            assert not [w for w in seen if "qfx.lower(model)" in str(w.message)]  # on a CPU there are no kernels
            torch._dynamo.reset()
            monkeypatch.setattr(QLinear, "device", torch.device("cuda"))
            torch.compile(q, backend=qfx.backend(then="eager"))(**feeds)
            monkeypatch.undo()
        assert bool([w for w in seen if "3 of the model's linears are on a GPU" in str(w.message)]) == told
