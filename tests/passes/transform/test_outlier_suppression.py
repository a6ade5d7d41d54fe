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

STATIC = {"*": "W8A8_STATIC_ASYM"}
CLIP = OutlierSuppression(migrate=False, width=0.3, step=0.05)


def norms(state: State) -> list[Site]:
    return [s for s in state.sites if s.kind == "norm"]


def gain(module: nn.Module, site: Site) -> Tensor:
    assert site.writer.gain is not None
    return site.writer.gain.slope * module.get_parameter(site.writer.gain.param) + site.writer.gain.offset


def same_function(state: State, want: nn.Module) -> None:
    for batch in TOKENS:
        got = (state.graph.run(batch).logits, state.graph.module(**batch).logits)
        for logits in got:
            torch.testing.assert_close(logits, want(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "offset"), [("llama", 0), ("gemma", 1), ("opt", 0)])
def test_migration_leaves_gains_of_one_and_moves_them_to_the_readers(name: str, offset: int) -> None:
    found = zoo(name)
    state = found.fresh({"*": "W8A8"}, ignore=["@head"])
    sites = [s for s in norms(state) if s.readers[0].linear.weight in state.plan]
    assert len(sites) == 4
    OutlierSuppression(clip=False)(state)
    for site in sites:
        assert site.writer.gain is not None and site.writer.gain.offset == offset
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
    same_function(state, found.model)


@torch.no_grad()
def test_negative_gains_migrate_and_tiny_ones_stay() -> None:
    state = zoo("llama").fresh({"*": "W8A8"})
    weight = state.graph.module.model.layers[0].input_layernorm.weight
    weight[:4] = torch.tensor([-1.5, -0.1, 1e-6, 0.0])
    want = state.graph.run(TOKENS[0]).logits
    OutlierSuppression(clip=False)(state)
    assert weight[:2].tolist() == [1, 1] and weight[4:].tolist() == [1] * 60
    assert weight[2:4].tolist() == pytest.approx([1e-6, 0], abs=1e-12)
    torch.testing.assert_close(state.graph.run(TOKENS[0]).logits, want, rtol=1e-4, atol=1e-4)


def test_a_negative_gain_does_not_pass_a_relu() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))
    batches = [{"input": torch.randn(2, 5, 16)}]
    for sign, folds in ((1, 1), (-1, 0)):
        with torch.no_grad():
            model[0].weight[3] = 0.5 * sign
        state = Discovered(model, batches).fresh({"*": "W8A8"})
        OutlierSuppression(clip=False)(state)
        (site,) = state.sites
        assert (len(state.report.folds), site.folds) == (folds, {"Diagonal"})
        assert state.graph.module[0].weight[3].item() == (1 if folds else -0.5)


def test_a_site_that_is_left_is_a_miss_with_a_reason() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[3] = -1
    state = Discovered(model, [{"input": torch.randn(2, 5, 16)}]).fresh({"*": "W8A8"})
    (miss,) = OutlierSuppression(clip=False)(state).misses
    assert (miss.where, miss.step) == ("0", "outlier_suppression")
    assert miss.why.startswith("some gains are negative, and ") and not miss.why.endswith("None")


@pytest.fixture(scope="module")
def outliers() -> Discovered:
    """A llama with one token whose normed values are far larger than all others."""
    model = zoo("llama").fresh({}).graph.module
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0]["input_ids"][0, 4]] = 0
        model.model.embed_tokens.weight[TOKENS[0]["input_ids"][0, 4], 5] = 8.0
    return Discovered(model, TOKENS)


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


def test_ratio_one_is_min_max(outliers: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    state = outliers.fresh(STATIC)
    clip(state, 1.0, monkeypatch)
    want = min_max(outliers, state)
    assert set(state.ranges) == set(want) == set(state.plan)
    for weight, ends in want.items():
        assert state.ranges[weight] == pytest.approx(ends, rel=1e-6)


def test_a_ratio_cuts_at_a_quantile_of_the_tokens_extremes(
    outliers: Discovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = outliers.fresh(STATIC)
    clip(state, 0.9, monkeypatch)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = inputs_of(outliers.model, name)
        tops, bottoms = x.amax(1), x.amin(1)
        hi = tops[tops <= tops.abs().quantile(0.9)].max().item()
        lo = bottoms[bottoms >= -bottoms.abs().quantile(0.9)].min().item()
        assert state.ranges[f"{name}.weight"] == pytest.approx((lo, hi), rel=1e-5)


@torch.no_grad()
def output_error(found: Discovered, ranges: dict[str, tuple[float, float]]) -> float:
    """Squared error of the logits with every linear's input on 256 levels of its range, by hooks."""
    model, hooks = found.fresh({}).graph.module, []
    for weight, (lo, hi) in ranges.items():
        scale = (max(hi, 0.0) - min(lo, 0.0)) / 255
        zero = round(-min(lo, 0.0) / scale)

        def quantize(_: nn.Module, args: tuple[Tensor], s: float = scale, z: int = zero) -> Tensor:
            return ((args[0] / s).round() + z).clamp(0, 255).sub(z) * s

        hooks.append(model.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(quantize))
    return sum((model(**b).logits - found.model(**b).logits).square().sum().item() for b in TOKENS)


def test_the_chosen_ratio_is_the_best_of_those_tried(outliers: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: dict[float, float] = {}
    original = OutlierSuppression._error

    def recording(self: OutlierSuppression, *args: object) -> float:
        tried[round(args[3], 2)] = original(self, *args)  # type: ignore[arg-type, call-overload]
        return tried[round(args[3], 2)]  # type: ignore[call-overload]

    monkeypatch.setattr(OutlierSuppression, "_error", recording)
    state = outliers.fresh(STATIC)
    text = str(state.graph.fx)
    result = CLIP(state)
    assert str(state.graph.fx) == text  # nothing is left of the trials
    assert list(tried) == [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7]
    best = min(tried, key=tried.__getitem__)
    assert result.notes == [f"token-wise clipping: ratio {best:.3g} of 15 static inputs"]
    assert best < 1 and result.changed == 15
    assert tried[best] == pytest.approx(output_error(outliers, state.ranges), rel=0.02)
    assert tried[1] == pytest.approx(output_error(outliers, min_max(outliers, state)), rel=0.02)
    assert tried[best] < 0.7 * tried[1]


def test_the_solver_takes_the_ranges(outliers: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = {}
    for ratio in (1.0, 0.8):
        state = outliers.fresh(STATIC)
        clip(state, ratio, monkeypatch)
        Rtn()(state)
        for weight, solved in state.solved.items():
            lo, hi = state.ranges[weight]
            scale = (max(hi, 0) - min(lo, 0)) / 255
            assert solved.input_scale is not None and solved.input_zero is not None
            assert solved.input_scale.item() == pytest.approx(scale, rel=1e-6)
            assert solved.input_zero.item() == round(-min(lo, 0) / scale)
        scales[ratio] = {w: s.input_scale.item() for w, s in state.solved.items() if s.input_scale is not None}
    assert all(scales[0.8][w] <= scales[1.0][w] for w in scales[1.0])
    first = linear_of(state, "model.layers.0.self_attn.q_proj").weight
    assert scales[0.8][first] < 0.8 * scales[1.0][first]


def test_dynamic_inputs_are_not_clipped() -> None:
    state = zoo("llama").fresh({"*": "W8A8", "*.down_proj": None})
    result = OutlierSuppression(migrate=False)(state)
    assert (result.changed, result.notes, state.ranges) == (0, ["no layer has a static input: nothing to clip"], {})


def test_only_static_inputs_are_clipped() -> None:
    state = zoo("llama").fresh({"*": "W8A8", "*.down_proj": "W8A8_STATIC"})
    OutlierSuppression(migrate=False, width=0.1, step=0.1)(state)
    assert set(state.ranges) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize("wrong", [{"step": 0.2}, {"width": 1.0, "step": 0.5}, {"step": 0.0}, {"batches": 0}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="0 < step <= width < 1"):
        OutlierSuppression(**wrong)  # type: ignore[arg-type]
    assert math.isclose(OutlierSuppression().width, 0.1)
