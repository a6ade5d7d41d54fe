"""`torch.compile(model, backend="qfx")`: the same numbers as `qfx.quantize`, whatever Dynamo makes of the model."""

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import watched
from qfx.backend import Backend
from qfx.core.errors import CalibrationError, CaptureError, QfxError, RecipeError
from qfx.core.spec import scheme_label
from qfx.watched import WEIGHTS
from tests.zoo import ZOO
from tests.zoo.captured import floats
from tests.zoo.decoders import token_ids

Feeds = dict[str, Tensor]
unfused = functools.partial(qfx.backend, fuse=False)  # as quantize to the last bit


pytestmark = pytest.mark.usefixtures("dynamo")


def quantized(model: nn.Module, chosen: Backend, feeds: Feeds) -> nn.Module:
    return qfx.quantize(model, chosen.recipe, [feeds], progress=False)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def times_made(model: nn.Module) -> list[int]:
    """How often each quantized parameter of a model was quantized."""
    return [w.made for p in model.parameters() if p in WEIGHTS for w in WEIGHTS[p].values()]


MODELS = ("llama", "opt", "gpt2", "bert", "mixtral", "t5")
SCHEMES = ("FP8_DYNAMIC", "W4A16_G32", "W4A16_ASYM_G32", "W4A8_G32", "W4A8_DQ_G32", "NF4_G32", "w8a8")


@pytest.mark.parametrize(("name", "scheme"), [*((m, "W8A8") for m in MODELS), *(("block_stack", s) for s in SCHEMES)])
def test_it_computes_what_quantize_computes(name: str, scheme: str) -> None:
    model, feeds = ZOO[name].load()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chosen = unfused(scheme, then="eager")
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    q = quantized(model, chosen, feeds)
    assert same(got, floats(q(**feeds)))
    assert not same(got, floats(model(**feeds)))  # or nothing would have been quantized
    layers = {layer.name: layer.scheme for layer in q.qfx.report.layers if layer.scheme}
    assert {n: scheme_label(s) for n, s in chosen.layers.items()} == layers
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("then", ["aot_eager", "inductor"])
def test_other_backends_compile_what_it_leaves(then: str) -> None:
    if then == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    model, feeds = ZOO["gpt2"].load()
    chosen = unfused("W8A8", then=then)
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    want = floats(torch.compile(quantized(model, chosen, feeds), backend=then)(**feeds))
    assert same(got, want)


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("W4A16_G32", "w4a16_linear"),
        ("W4A8_G32", "w4a8_linear"),
        ("W4A8_DQ_G32", "w4a8_linear"),
        ("NF4_G32", "nf4_linear"),
        ("W8A16", "wxa16_linear"),
    ],
)
def test_layouts_of_kernels(scheme: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched.quantized_weight

    def with_layout(*args: Any) -> Any:  # as on a CUDA device
        module = made(*args)
        module.use_kernel(kernel)
        return module

    monkeypatch.setattr(watched, "quantized_weight", with_layout)
    seen: list[str] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    model, feeds = ZOO["gpt2"].load()
    chosen = unfused(scheme, then=record)
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    assert seen.count(f"qfx.{kernel}.default") == len(chosen.layers) == 8
    assert same(got, floats(quantized(model, chosen, feeds)(**feeds)))


def test_it_is_found_by_name_without_an_import() -> None:
    code = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
assert "qfx" not in sys.modules
fast = torch.compile(model, backend="qfx", options={"recipe": "W8A8", "then": "eager"})
with torch.no_grad():
    x = torch.randn(3, 64)
    assert 0 < (fast(x) - model(x)).abs().max() < 0.1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Talking(nn.Module):
    """Breaks the graph in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        print("between")
        return x + self.down(h)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Talking(), Talking()])
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](x)))


class Branching(nn.Module):
    """Chooses by a value whether to negate, or does not ask."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        h = -h if self.asks and h.sum() < 0 else h
        return self.head(self.second(h))


def test_graph_breaks() -> None:
    model, feeds = Stack().eval(), {"x": torch.randn(2, 5, 64)}
    chosen = unfused("W8A8", then="eager")
    compiled = torch.compile(model, backend=chosen)
    got = [compiled(**feeds) for _ in range(3)]
    # layers keep their names in the model, so that a block's last linear is not taken for the head
    assert {"layers.0.up", "layers.0.down"} <= set(chosen.layers)
    assert set(chosen.floats) == {"head"}
    want = quantized(model, chosen, feeds)(**feeds)
    assert all(torch.equal(g, want) for g in got)
    # one graph may serve both blocks, each of which has codes of its own
    assert times_made(model) == [1, 1, 1, 1]


def test_a_graph_of_several_layers_is_no_place_for_their_names() -> None:
    model, feeds = Stack().eval(), {"x": torch.randn(2, 5, 64)}
    chosen = unfused({"schemes": {"layers.1.*": "W8A8"}}, then="eager")
    with pytest.raises(QfxError, match="cannot tell apart"):
        torch.compile(model, backend=chosen)(**feeds)


def test_patterns_on_names() -> None:
    model, feeds = ZOO["llama"].load()
    chosen = unfused({"schemes": {"*": "W8A8", "*.mlp.*": None}, "ignore": ["@head"]}, then="eager")
    got = floats(torch.compile(model, backend=chosen, fullgraph=True)(**feeds))
    assert len(chosen.layers) == 8
    assert same(got, floats(quantized(model, chosen, feeds)(**feeds)))


def test_a_branch_on_a_value() -> None:
    model, feeds = Branching(asks=True).eval(), {"x": torch.randn(2, 64)}
    plain = Branching(asks=False).eval()
    plain.load_state_dict(model.state_dict())
    chosen = unfused({"schemes": {"*": "W8A8"}}, then="eager")
    got = torch.compile(model, backend=chosen)(**feeds)
    assert chosen.graphs == 2
    assert torch.equal(got, quantized(plain, chosen, feeds)(**feeds))


@pytest.mark.parametrize(("dynamic", "most"), [(True, 1), (None, 2)])
def test_other_sizes_quantize_nothing_anew(dynamic: bool | None, most: int) -> None:
    model, feeds = ZOO["llama"].load()
    chosen = unfused("W8A8", then="eager")
    q, compiled = quantized(model, chosen, feeds), torch.compile(model, backend=chosen, dynamic=dynamic)
    for batch, length in ((2, 12), (3, 12), (3, 7), (2, 9), (4, 5)):
        ids = token_ids(length=length).repeat(2, 1)[:batch]
        assert same(floats(compiled(input_ids=ids)), floats(q(input_ids=ids))), (batch, length)
    assert chosen.graphs <= most + (dynamic is None)
    assert times_made(model) == [1] * len(chosen.layers)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    model, feeds = ZOO["llama"].load()
    chosen = unfused("W8A8", then="eager")
    q = quantized(model, chosen, feeds)
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "cache_implementation": cache,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    q.compile(backend="eager")  # Dynamo itself moves the last bits of a static cache's attention
    want = q.generate(**feeds, **settings)
    model.compile(backend=chosen)
    got = model.generate(**feeds, **settings)
    assert len(chosen.layers) == 14
    assert torch.equal(got.sequences, want.sequences)
    assert same(list(got.logits), list(want.logits))
    assert times_made(model) == [1] * 14


def _in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(0.9)


def _reloaded(model: nn.Module) -> None:
    model.load_state_dict({k: v.roll(1, 0) for k, v in model.state_dict().items()})


def _replaced(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(m.weight.flip(0))


def _pointed_elsewhere(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.flip(0)


@pytest.mark.parametrize("change", [_in_place, _reloaded, _replaced, _pointed_elsewhere])
def test_new_weights_are_noticed(change: Callable[[nn.Module], None]) -> None:
    model, feeds = Branching(asks=False).eval(), {"x": torch.randn(2, 64)}
    chosen = unfused("W8A8", then="aot_eager")
    compiled = torch.compile(model, backend=chosen)
    before = compiled(**feeds)
    assert torch.equal(compiled(**feeds), before)
    assert times_made(model) == [1, 1]
    change(model)
    after = compiled(**feeds)
    assert not torch.equal(after, before)
    assert torch.equal(after, quantized(copy.deepcopy(model), chosen, feeds)(**feeds))


def test_what_nothing_reads_any_more_is_not_handed_on() -> None:
    seen: list[Any] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.extend(inputs)
        return gm.forward

    model, feeds = ZOO["llama_tied"].load()
    chosen = unfused({"schemes": {"*": "W8A8"}}, then=record)
    torch.compile(model, backend=chosen)(**feeds)
    matrices = [x for x in seen if isinstance(x, nn.Parameter) and x.dim() > 1]
    assert [id(x) for x in matrices] == [id(model.model.embed_tokens.weight)]  # the embedding reads it still


def compiled(**options: Any) -> Any:
    return torch.compile(nn.Linear(64, 64), backend="qfx", options=options)


def _with_gradients() -> None:
    with torch.enable_grad():
        compiled(recipe="W8A8")(torch.randn(2, 64))


def _training() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    torch.compile(model, backend="qfx", options={"recipe": "W8A8", "then": "eager"})(torch.randn(2, 64))


def _autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compiled(recipe="W8A8", then="eager")(torch.randn(2, 64))


def _double() -> None:
    model = nn.Linear(64, 64).double()
    torch.compile(model, backend="qfx", options={"recipe": "W8A8"})(torch.randn(2, 64).double())


def _broken() -> None:
    model = nn.Linear(64, 64)
    model.weight[0, 0] = torch.nan
    torch.compile(model, backend=unfused({"schemes": {"*": "W8A8"}}, then="eager"))(torch.randn(2, 64))


REFUSED = [
    (lambda: compiled(recipe="W8A8", fast=True)(torch.randn(2, 64)), "unknown options"),
    (lambda: compiled(then="eager")(torch.randn(2, 64)), "no recipe"),
    (lambda: compiled(recipe="W9000")(torch.randn(2, 64)), "W9000"),
    (lambda: compiled(recipe="w8a8-smoothquant")(torch.randn(2, 64)), "measures activations"),
    (lambda: compiled(recipe="W8A8_STATIC")(torch.randn(2, 64)), "static inputs"),
    (lambda: torch.compile(nn.Linear(64, 64), backend="qfx", mode="max-autotune")(torch.randn(2, 64)), "no recipe"),
    (lambda: compiled(recipe="W8A8", then="nothing")(torch.randn(2, 64)), "no backend"),
    (lambda: compiled(recipe="W8A8", then="qfx")(torch.randn(2, 64)), "cannot be qfx"),
    (_with_gradients, "torch.no_grad"),
    (_training, "model.eval"),
    (_autocast, "autocast"),
    (_double, "float64"),
    (_broken, "not finite"),
]


@pytest.mark.parametrize(("call", "what"), REFUSED, ids=[what for _, what in REFUSED])
def test_refusals_can_be_read(call: Callable[[], None], what: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=what) as e:
        call()
    assert isinstance(e.value.inner_exception, QfxError)


def test_a_configured_backend_refuses_at_once() -> None:
    with pytest.raises(CalibrationError, match="measures activations"):
        qfx.backend("w8a8-gptq")
    with pytest.raises(RecipeError, match="preset"):
        qfx.backend("no-such-recipe")


def test_parameters_inside_of_the_graph_are_refused() -> None:
    with pytest.raises(CaptureError, match="inline_inbuilt_nn_modules"):
        unfused("W8A8")(torch.fx.symbolic_trace(nn.Linear(64, 64)), [torch.randn(2, 64)])


def test_what_torch_fuses_is_named() -> None:
    model, feeds = ZOO["torch_encoder_layer"].load()
    chosen = unfused("W8A8", then="eager")
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    assert same(got, floats(model(**feeds)))
    assert set(chosen.floats) == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert all("_transformer_encoder_layer_fwd" in why for why in chosen.floats.values())


def test_a_weight_of_two_products() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w.transpose(1, 2)
            return torch.bmm(torch.bmm(x, w).relu(), w)

    model, feeds = Twice(), {"x": torch.randn(2, 3, 64)}
    chosen = unfused({"schemes": {"*": "W8A8"}}, then="eager")
    got = torch.compile(model, backend=chosen)(**feeds)
    assert torch.equal(got, quantized(model, chosen, feeds)(**feeds))
    assert times_made(model) == [1]


def test_dynamo_does_not_fall_back_in_silence() -> None:
    with torch._dynamo.config.patch(suppress_errors=True), pytest.warns(RuntimeWarning, match="runs in float"):
        compiled(recipe="W9000")(torch.randn(2, 64))


def test_inference_mode() -> None:
    model, feeds = Branching(asks=False).eval(), {"x": torch.randn(2, 64)}
    chosen = unfused("W8A8", then="eager")
    fast = torch.compile(model, backend=chosen)
    with torch.inference_mode():
        got = fast(**feeds).clone()
    _in_place(model)  # codes that were made in that mode can be written to outside of it
    assert not torch.equal(fast(**feeds), got)
    assert torch.equal(fast(**feeds), quantized(model, chosen, feeds)(**feeds))


def test_two_compilations_share_the_codes() -> None:
    model, x = Branching(asks=False).eval(), torch.randn(2, 64)
    options = {"recipe": "W8A8", "then": "eager"}
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(model, backend="qfx", options=options)(x)
    assert times_made(model) == [1, 1]


def test_a_graph_without_linears_is_handed_on() -> None:
    x, chosen = torch.randn(3), unfused("W8A8", then="eager")
    assert torch.equal(torch.compile(torch.sin, backend=chosen)(x), x.sin())
    assert chosen.graphs == 1
