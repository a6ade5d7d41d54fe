"""Outlier Suppression: gains leave the norms, and one clipping ratio serves the model's output best."""

import math

import pytest
import torch
from torch import Tensor, nn

from qfx.core.errors import RecipeError
from qfx.core.passes import State
from qfx.core.site import Site
from qfx.passes.solve.rtn import Rtn
from qfx.passes.transform.outlier_suppression import OutlierSuppression
from tests.passes.discovered import TOKENS, Discovered, inputs_of, linear_of, zoo
from tests.zoo.captured import floats

STATIC = {"*": "W4A4_CHANNEL_STATIC_ASYM"}  # with few levels, clipping pays
CLIP = OutlierSuppression(migrate=False, width=0.3, step=0.05)


def norms(state: State) -> list[Site]:
    return [s for s in state.sites if s.kind == "norm"]


def gain(module: nn.Module, site: Site) -> Tensor:
    assert site.writer.gain is not None
    return site.writer.gain.slope * module.get_parameter(site.writer.gain.param) + site.writer.gain.offset


class OnePlus(nn.Module):
    """A linear behind a norm that multiplies by `1 + weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(16))
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (1 + self.weight))


@pytest.fixture(scope="module")
def one_plus() -> Discovered:
    return Discovered(OnePlus(), [{"x": torch.randn(2, 5, 16)}])


@pytest.mark.parametrize("name", ["llama", "opt", "one_plus"])
def test_migration_leaves_gains_of_one_and_moves_them_to_the_readers(name: str, one_plus: Discovered) -> None:
    found = one_plus if name == "one_plus" else zoo(name)
    state = found.fresh({"*": "W8A8"}, ignore=["@head"] if name != "one_plus" else [])
    sites = [s for s in norms(state) if s.readers[0].linear.weight in state.plan]
    assert len(sites) == (1 if name == "one_plus" else 4)
    want = [floats(state.graph.run(b)) for b in found.batches]
    OutlierSuppression(clip=False)(state)
    for site in sites:
        assert site.writer.gain is not None and site.writer.gain.offset == (name == "one_plus")
        assert (gain(state.graph.module, site) == 1).all()
        moved = gain(found.model, site)
        assert (moved - 1).abs().max() > 0.1
        for reader in site.readers:
            weight = found.model.get_parameter(reader.linear.weight)
            torch.testing.assert_close(state.graph.module.get_parameter(reader.linear.weight), weight * moved)
        if site.writer.norm_bias:
            bias = found.model.get_parameter(site.writer.norm_bias)
            torch.testing.assert_close(state.graph.module.get_parameter(site.writer.norm_bias), bias / moved)
    assert {f.site for f in state.report.folds} == {s.name for s in sites}
    for batch, before in zip(found.batches, want, strict=True):
        torch.testing.assert_close(floats(state.graph.module(**batch)), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_negative_gains_migrate_and_tiny_ones_stay(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8"})
    weight = state.graph.module.model.layers[0].input_layernorm.weight
    weight[:4] = torch.tensor([-1.5, -0.1, 1e-6, 0.0])
    want = state.graph.run(TOKENS[0]).logits
    OutlierSuppression(clip=False)(state)
    assert weight[:2].tolist() == [1, 1] and weight[4:].tolist() == [1] * 60
    assert weight[2:4].tolist() == pytest.approx([1e-6, 0], abs=1e-12)
    torch.testing.assert_close(state.graph.run(TOKENS[0]).logits, want, rtol=1e-4, atol=1e-4)


def test_a_negative_gain_does_not_pass_a_relu() -> None:
    found = Discovered(nn.Sequential(nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8)), [{"input": torch.randn(2, 5, 16)}])
    for value, folds in ((0.5, 1), (-0.5, 0)):
        state = found.fresh({"*": "W8A8"})
        state.graph.module[0].weight[3] = value
        misses = OutlierSuppression(clip=False)(state).misses
        assert len(state.report.folds) == folds and len(misses) == 1 - folds
        assert state.graph.module[0].weight[3].item() == (1 if folds else value)
    (miss,) = misses
    assert (miss.where, miss.step) == ("0", "outlier_suppression")
    assert miss.why.startswith("some gains are negative, and ") and not miss.why.endswith("None")


@pytest.fixture(scope="module")
def llama() -> Discovered:
    return zoo("llama")


def clip(state: State, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the search take this ratio."""
    with monkeypatch.context() as m:
        m.setattr(OutlierSuppression, "_error", lambda self, s, linears, found, tried, *_: abs(tried - ratio))
        CLIP(state)


def min_max(found: Discovered, state: State) -> dict[str, tuple[float, float]]:
    seen = {}
    for weight in state.plan:
        x = inputs_of(found.model, weight.removesuffix(".weight"))
        seen[weight] = (x.min().item(), x.max().item())
    return seen


def test_ratio_one_is_min_max(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    state = llama.fresh(STATIC)
    clip(state, 1.0, monkeypatch)
    want = min_max(llama, state)
    assert set(state.ranges) == set(want) == set(state.plan)
    for weight, ends in want.items():
        assert state.ranges[weight] == pytest.approx(ends, rel=1e-6)


def test_a_ratio_cuts_at_a_quantile_of_the_tokens_extremes(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    state = llama.fresh(STATIC)
    clip(state, 0.9, monkeypatch)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = inputs_of(llama.model, name)
        tops, bottoms = x.amax(1), x.amin(1)
        hi = tops[tops <= tops.abs().quantile(0.9)].max().item()
        lo = bottoms[bottoms >= -bottoms.abs().quantile(0.9)].min().item()
        assert state.ranges[f"{name}.weight"] == pytest.approx((lo, hi), rel=1e-5)


@torch.no_grad()
def output_error(found: Discovered, ranges: dict[str, tuple[float, float]]) -> float:
    """Squared error of the logits with every linear's input on 16 levels of its range, by hooks."""
    model, hooks = found.fresh({}).graph.module, []
    for weight, (lo, hi) in ranges.items():
        scale = (max(hi, 0.0) - min(lo, 0.0)) / 15
        zero = round(-min(lo, 0.0) / scale)

        def quantize(_: nn.Module, args: tuple[Tensor], s: float = scale, z: int = zero) -> Tensor:
            return ((args[0] / s).round() + z).clamp(0, 15).sub(z) * s

        hooks.append(model.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(quantize))
    return sum((model(**b).logits - found.model(**b).logits).square().sum().item() for b in TOKENS)


def test_the_chosen_ratio_is_the_best_of_those_tried(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: dict[float, float] = {}
    original = OutlierSuppression._error

    def recording(self: OutlierSuppression, *args: object) -> float:
        tried[round(args[3], 2)] = original(self, *args)  # type: ignore[arg-type, call-overload]
        return tried[round(args[3], 2)]  # type: ignore[call-overload]

    monkeypatch.setattr(OutlierSuppression, "_error", recording)
    state = llama.fresh(STATIC)
    text = str(state.graph.fx)
    result = CLIP(state)
    assert str(state.graph.fx) == text  # nothing is left of the trials
    assert list(tried) == [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7]
    best = min(tried, key=tried.__getitem__)
    assert result.notes == [f"token-wise clipping: ratio {best:.3g} of 15 static inputs"]
    assert best < 1 and result.changed == 15
    assert tried[best] == pytest.approx(output_error(llama, state.ranges), rel=0.02)
    assert tried[1] == pytest.approx(output_error(llama, min_max(llama, state)), rel=0.02)
    assert tried[best] < 0.7 * tried[1]


def test_the_solver_takes_the_ranges(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = {}
    for ratio in (1.0, 0.8):
        state = llama.fresh(STATIC)
        clip(state, ratio, monkeypatch)
        Rtn()(state)
        for weight, solved in state.solved.items():
            lo, hi = state.ranges[weight]
            scale = (max(hi, 0) - min(lo, 0)) / 15
            assert solved.input_scale is not None and solved.input_zero is not None
            assert solved.input_scale.item() == pytest.approx(scale, rel=1e-6)
            assert solved.input_zero.item() == round(-min(lo, 0) / scale)
        scales[ratio] = {w: s.input_scale.item() for w, s in state.solved.items() if s.input_scale is not None}
    assert all(scales[0.8][w] <= scales[1.0][w] for w in scales[1.0])
    first = linear_of(state, "model.layers.0.self_attn.q_proj").weight
    assert scales[0.8][first] < 0.8 * scales[1.0][first]


def test_dynamic_inputs_are_not_clipped(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8", "*.down_proj": None})
    result = OutlierSuppression(migrate=False)(state)
    assert (result.changed, result.notes, state.ranges) == (0, ["no layer has a static input: nothing to clip"], {})


def test_only_static_inputs_are_clipped(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8", "*.down_proj": "W8A8_STATIC"})
    OutlierSuppression(migrate=False, width=0.1, step=0.1)(state)
    assert set(state.ranges) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize("wrong", [{"step": 0.2}, {"width": 1.0, "step": 0.5}, {"step": 0.0}, {"batches": 0}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="0 < step <= width < 1"):
        OutlierSuppression(**wrong)  # type: ignore[arg-type]
    assert math.isclose(OutlierSuppression().width, 0.1)
