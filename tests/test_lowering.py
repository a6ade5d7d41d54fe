"""`qfx.lower`: the same logits, tokens and files, fewer and faster ops, and a reason for everything."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import qfx
from qfx import lowering
from qfx.core.lowering import LoweringReport
from qfx.modules.linear import QLinear
from qfx.modules.merged import Whole
from qfx.report import plain, render_lowering
from tests.plain import Plain
from tests.zoo import ZOO

CASES = [
    ("llama", "W8A8"),
    ("llama", "W4A16_G32"),
    ("llama", "NF4_DQ_G32"),
    ("opt", "FP8_DYNAMIC"),
    ("bert", "W8A8_STATIC"),
    ("qwen2", "W4A8_G16"),
    ("qwen2", "W4A8_DQ_G32"),
    ("whisper", "W8A8"),
]
GROUPS = {"llama": 4, "opt": 2, "bert": 2, "qwen2": 4, "whisper": 4}

Case = tuple[nn.Module, dict[str, Tensor]]


@pytest.fixture(scope="module")
def quantized() -> Callable[[str, str], Case]:
    """A copy of each quantized model, which the test may change."""
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, scheme: str) -> Case:
        if (name, scheme) not in made:
            model, inputs = ZOO[name].load()
            recipe = {"schemes": {"*": scheme}, "ignore": ["@head"]}
            made[name, scheme] = qfx.quantize(model, recipe, [inputs], progress=False), inputs
        model, inputs = made[name, scheme]
        return copy.deepcopy(model), inputs

    return get


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in tree_leaves(model(**inputs)) if isinstance(t, Tensor)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    alike = all(torch.equal(a[k].float(), b[k].float()) and a[k].dtype == b[k].dtype for k in a)
    return list(a) == list(b) and alike


def tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_model_computes_the_same_and_restore_takes_it_back(
    name: str, scheme: str, quantized: Callable[[str, str], Case]
) -> None:
    model, inputs = quantized(name, scheme)
    want, before, classes = outputs(model, inputs), state(model), [type(m) for m in model.modules()]
    report = qfx.lower(model, inputs, device="cuda")
    got = outputs(model, inputs)
    if scheme.startswith("W8A8"):  # integer sums
        assert equal(got, want)
    assert report.error is not None and report.error < 1e-3
    assert len(report.groups) == GROUPS[name] == sum(isinstance(m, Whole) for m in model.modules())
    assert same(state(model), before)
    assert model.qfx.lowering is report
    lowering.restore(model)
    assert equal(outputs(model, inputs), want) and same(state(model), before)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(("name", "scheme"), [("llama", "W4A16_G32"), ("llama", "W8A8")])
def test_what_a_lowered_model_saves(
    name: str, scheme: str, quantized: Callable[[str, str], Case], tmp_path: Path
) -> None:
    model, inputs = quantized(name, scheme)
    qfx.save(model, tmp_path / "before")
    report = qfx.lower(model, inputs, device="cuda")
    assert report.groups and not all(m.as_stored for m in model.modules() if isinstance(m, QLinear))
    want = outputs(model, inputs)
    qfx.save(model, tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "after").iterdir())
    for file in (f for f in files if f.endswith(".safetensors") or f == "qfx.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    loaded = qfx.load(tmp_path / "after")
    assert same(state(loaded), state(model))
    qfx.lower(loaded, device="cuda")
    assert equal(outputs(loaded, inputs), want)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16_G32"])
def test_it_generates(scheme: str, quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("llama", scheme)
    want = tokens(model, inputs)
    assert qfx.lower(model, device="cuda").groups
    assert torch.equal(tokens(model, inputs), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16_G32"])
@torch.no_grad()
def test_it_compiles_as_a_whole(scheme: str, backend: str, quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("llama", scheme)
    qfx.lower(model, inputs, device="cuda")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    want = model(**inputs).logits
    torch.testing.assert_close(compiled(**inputs).logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(**inputs).logits, want, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    ops = [n for g in counter.graphs for n in g.graph.nodes if "qfx" in str(n.target)]
    assert len(ops) == 2 * 4  # qkv, o, gate_up, down


def test_the_report_names_every_layer_and_reason(quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("whisper", "W8A8")
    report = qfx.lower(model, inputs, device="cuda")
    layers = {n for n, m in model.named_modules() if isinstance(m, QLinear) and not isinstance(m, Whole)}
    assert {x.name for x in report.layers} == layers and all(x.reason and x.kernel for x in report.layers)
    assert report.device == "cuda" and report.kernels() == {"int8_linear": len(layers)}
    why = {m.where: m.why for m in report.misses}
    lead = "model.encoder.layers.0.self_attn."
    assert why[lead + "k_proj"] == f"reads what {lead}q_proj reads, but has another form: only one has a bias"
    assert [lead + "q_proj", lead + "v_proj"] in report.groups
    shown = plain(render_lowering(report), 160)
    assert "model.encoder.layers.*.self_attn.q_proj" in shown and "only one has a bias" in shown
    assert "merged into 4" in shown and str(report).startswith(report.headline())
    assert LoweringReport(**{**report.to_dict(), "layers": report.layers, "misses": report.misses}) == report
    assert len(plain(render_lowering(report, verbose=True), 160).splitlines()) > len(shown.splitlines())


def test_on_a_cpu_nothing_is_changed_and_it_says_so(quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("llama", "W4A16_G32")
    want, buffers = outputs(model, inputs), dict(model.named_buffers())
    report = qfx.lower(model, inputs)
    assert report.notes == ["nothing was changed: the weights are on cpu, the kernels are for CUDA devices"]
    assert report.kernels() == {"wna16_linear": 14} and not report.groups and report.error is None
    assert all(b is buffers[n] for n, b in model.named_buffers()) and equal(outputs(model, inputs), want)
    assert model.qfx.lowering is report
    assert "no quantized linear" in qfx.lower(nn.Linear(2, 2)).notes[0]


def test_twice_is_once_and_back_to_the_cpu(quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("llama", "W8A8")
    before = state(model)
    first = qfx.lower(model, inputs, device="cuda")
    names = [n for n, _ in model.named_buffers()]
    second = qfx.lower(model, inputs, device="cuda")
    assert first == second and [n for n, _ in model.named_buffers()] == names
    assert qfx.lower(model, inputs).notes and same(state(model), before)
    assert all(m.as_stored for m in model.modules() if isinstance(m, QLinear))


def test_without_inputs_kernels_are_chosen_and_nothing_is_merged() -> None:
    model = Plain(0.5)
    q = qfx.quantize(model, {"schemes": {"*": "W4A16_G32"}}, [{"x": torch.randn(2, 64)}], progress=False)
    report = qfx.lower(q, device="cuda")
    assert report.kernels() == {"w4a16_linear": 3} and "pass lower(model, example)" in report.notes[0]
    assert report.error is None


class Pairs(nn.Module):
    """A pair that reads a value, one that needs contiguous outputs, and one that reads copies of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))
        self.flat = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))
        self.copied = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, z = x * 2, x * 3
        good = self.good[0](x) + self.good[1](x)
        flat = self.flat[0](y).view(-1) + self.flat[1](y).view(-1)
        # what the capture takes for the same value, and is another object
        copied = self.copied[0](z) + self.copied[1](z.to(z.dtype, copy=True))
        return good.reshape(-1) + flat + copied.reshape(-1)


def test_what_a_merge_does_not_serve_is_taken_back_with_a_reason() -> None:
    inputs = {"x": torch.randn(3, 5, 64)}
    q = qfx.quantize(Pairs(), {"schemes": {"*": "W8A8"}}, [inputs], progress=False)
    want = outputs(q, inputs)
    report = qfx.lower(q, inputs, device="cuda")
    assert report.groups == [["good.0", "good.1"]]
    why = {m.where: m.why for m in report.misses}
    assert "merged, its output is a view, which fails: RuntimeError" in why["flat.0"] == why["flat.1"]
    assert why["copied.1"] == "merged, its members are called with copies of one value"
    assert equal(outputs(q, inputs), want)


def test_a_kernel_that_computes_something_else_is_taken_back(
    quantized: Callable[[str, str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qfx.modules.kernels import W4A16

    class Wrong(W4A16):
        def call(self, x: Tensor, *rest: Any) -> Tensor:
            return -super().call(x, *rest)

    for where in ("qfx.modules.kernels", "qfx.modules.linear", "qfx.lowering"):
        monkeypatch.setattr(f"{where}.KERNELS", {"w4a16_linear": Wrong()})
    model, inputs = quantized("llama", "W4A16_G32")
    want, before = outputs(model, inputs), state(model)
    report = qfx.lower(model, inputs, device="cuda")
    assert report.layer_error > 1 and "undone: it changed the output of model.layers.0" in report.notes[0]
    assert report.kernels() == {"wna16_linear": 14} and not report.groups
    assert equal(outputs(model, inputs), want) and same(state(model), before)


class Deep(nn.Module):
    """What one linear rounds otherwise, the end amplifies without bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) - self.second(x)
        return torch.sin(y * 1e6)


@pytest.mark.parametrize("wrong", [1e-3, 0.5])
def test_a_rounding_that_the_model_amplifies_is_no_reason_to_undo(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qfx.modules.kernels import W4A16

    class Rounded(W4A16):
        def call(self, x: Tensor, *rest: Any) -> Tensor:
            return super().call(x, *rest) * (1 + wrong)

    for where in ("qfx.modules.kernels", "qfx.modules.linear", "qfx.lowering"):
        monkeypatch.setattr(f"{where}.KERNELS", {"w4a16_linear": Rounded()})
    inputs = {"x": torch.randn(3, 5, 64)}
    q = qfx.quantize(Deep(), {"schemes": {"*": "W4A16_G32"}}, [inputs], progress=False)
    report = qfx.lower(q, inputs, device="cuda")
    assert report.error > 0.5 and report.layer_error == pytest.approx(wrong, rel=1e-3)
    assert report.kernels() == ({"w4a16_linear": 2} if wrong < 0.02 else {"wna16_linear": 2})
    assert bool(report.notes) == (wrong > 0.02)


def test_a_linear_alone_computes_from_its_stored_weight(quantized: Callable[[str, str], Case]) -> None:
    model, inputs = quantized("llama", "W4A16_G32")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    given = {n: torch.randn(3, m.in_features) for n, m in layers.items()}
    want = {n: m(given[n]) for n, m in layers.items()}
    qfx.lower(model, inputs, device="cuda")
    assert all(not m.as_stored for m in layers.values())
    for name, module in layers.items():
        alone = module.alone()
        assert alone.as_stored and not module.as_stored
        assert torch.equal(alone(given[name]), want[name])
