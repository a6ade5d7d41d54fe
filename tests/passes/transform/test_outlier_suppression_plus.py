"""Outlier Suppression+: the shift centres, the scale takes outliers only, the search never loses, and both help."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qfx.core.errors import RecipeError
from qfx.core.maps import Map, Shift
from qfx.core.passes import State
from qfx.core.site import Site
from qfx.passes.solve.rtn import Rtn
from qfx.passes.transform._trial import Trial
from qfx.passes.transform.outlier_suppression_plus import OutlierSuppressionPlus, threshold_scale
from tests.passes.discovered import TOKENS, Discovered, inputs_of, site_of, zoo
from tests.zoo import harden
from tests.zoo.user_modules import HIDDEN, FeedForward

STATIC = {"*": "W8A8_TENSOR_STATIC"}
OUTLIERS = [11, 40]


@pytest.fixture(scope="module")
def opt() -> Discovered:
    return zoo("opt")


@torch.no_grad()
def plant(norm: nn.Module, linears: Sequence[nn.Module], offset: float = 60.0, factor: float = 6.0) -> None:
    """Two channels become larger and lie on one side of zero; the readers make up for both."""
    for linear in linears:
        linear.weight[:, OUTLIERS] /= factor
        linear.bias -= offset * linear.weight[:, OUTLIERS].sum(1)
    norm.weight[OUTLIERS] *= factor
    norm.bias[OUTLIERS] = norm.bias[OUTLIERS] * factor + offset


def plant_everywhere(model: nn.Module, offset: float = 60.0) -> None:
    for layer in model.model.decoder.layers:
        heads = layer.self_attn
        plant(layer.self_attn_layer_norm, (heads.q_proj, heads.k_proj, heads.v_proj), offset)
        plant(layer.final_layer_norm, (layer.fc1,), offset)


def extremes(model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    x = inputs_of(model, site.readers[0].linear.name)
    return x.amin(0), x.amax(0)


def norms(state: State) -> list[Site]:
    return [s for s in state.sites if s.kind == "norm"]


def test_the_shift_centres_every_channel(opt: Discovered) -> None:
    state = opt.fresh(STATIC, ignore=["@head"])
    before = {s.name: extremes(state.graph.module, s) for s in norms(state)}
    assert any((lo + hi).abs().max() > 1 for lo, hi in before.values())
    result = OutlierSuppressionPlus(steps=4)(state)
    assert result.notes == ["shifted 4 sites"]
    for site in norms(state):
        lo, hi = extremes(state.graph.module, site)
        torch.testing.assert_close(lo, -hi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.graph.run(TOKENS[0]).logits, opt.model(**TOKENS[0]).logits, rtol=1e-4, atol=1e-4)


def test_only_channels_beyond_the_threshold_are_scaled(opt: Discovered) -> None:
    """Then the scaled ones all reach the threshold, and the others stay below it."""
    state = opt.fresh({"*": "W6A6_CHANNEL_STATIC"}, ignore=["@head"])
    plant_everywhere(state.graph.module)
    reach = {}
    for site in norms(state):
        lo, hi = extremes(state.graph.module, site)
        reach[site.name] = (hi - lo) / 2
    gains = {s.name: state.graph.module.get_parameter(f"{s.name}.weight").clone() for s in norms(state)}
    OutlierSuppressionPlus()(state)
    shares = []
    for site in norms(state):
        s = gains[site.name] / state.graph.module.get_parameter(f"{site.name}.weight")
        scaled = s > 1 + 1e-6
        t = extremes(state.graph.module, site)[1]
        assert (s >= 1 - 1e-6).all()
        torch.testing.assert_close(t[scaled], t[scaled].max().expand(int(scaled.sum())), rtol=1e-4, atol=0)
        assert (reach[site.name][~scaled] <= t[scaled].max() * (1 + 1e-4)).all()
        assert scaled[OUTLIERS].all()
        shares.append(scaled.float().mean().item())
    assert min(shares) < 0.5


def test_the_scale_of_a_threshold() -> None:
    assert threshold_scale(torch.tensor([1.0, 2.0, 8.0, 0.0]), 2.0).tolist() == [1, 1, 4, 1]


def test_the_threshold_has_the_least_loss_of_those_tried(opt: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest magnitude, which scales nothing, is tried first."""
    seen: list[tuple[Site, float, Sequence[Map]]] = []
    original = Trial.loss

    def recording(self: Trial, site: Site, maps: Sequence[Map], clip: float | None = None) -> float:
        seen.append((site, original(self, site, maps, clip), maps))
        return seen[-1][1]

    monkeypatch.setattr(Trial, "loss", recording)
    state = opt.fresh({"*": "W6A6_CHANNEL_STATIC"}, ignore=["@head"])
    plant_everywhere(state.graph.module)
    gains = {s.name: state.graph.module.get_parameter(f"{s.name}.weight").clone() for s in norms(state)}
    OutlierSuppressionPlus(steps=9)(state)
    gained = []
    for site in norms(state):
        losses = [(loss, 1 / maps[-1].scale) for of, loss, maps in seen if of is site]
        assert len(losses) == 9 + 7
        assert all(isinstance(maps[0], Shift) and len(maps) == 2 for of, _, maps in seen if of is site)
        loss, scale = min(losses, key=lambda found: found[0])
        folded = gains[site.name] / state.graph.module.get_parameter(f"{site.name}.weight")
        torch.testing.assert_close(folded, scale.float(), rtol=1e-5, atol=0)
        assert (losses[0][1] == 1).all()
        tops = [float(1 / s.max()) for _, s in losses[:9]]
        ratios = [b / a for a, b in itertools.pairwise(tops)]
        assert ratios == pytest.approx([ratios[0]] * 8) and ratios[0] < 1
        gained.append(loss / losses[0][0])
    assert max(gained) <= 1 and min(gained) < 0.5


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = FeedForward()
    harden(model, torch.Generator().manual_seed(seed))
    plant(model.norm, (model.up,))
    return model


@torch.no_grad()
def test_shift_and_scale_beat_scale_and_scale_beats_nothing() -> None:
    steps = {"shift and scale": [OutlierSuppressionPlus()], "scale": [OutlierSuppressionPlus(shift=False)], "none": []}
    logs = dict.fromkeys(steps, 0.0)
    for seed in range(4):
        batch = {"x": torch.randn(2, 24, HIDDEN, generator=torch.Generator().manual_seed(100 + seed))}
        found = Discovered(mlp(seed), [batch])
        want = found.model(**batch) - batch["x"]
        for name, before in steps.items():
            state = found.fresh(STATIC, ignore=["down"])
            for step in (*before, Rtn()):
                step(state)
            logs[name] += math.log((state.graph.run(batch) - batch["x"] - want).norm() / want.norm()) / 4
    mean = {name: math.exp(value) for name, value in logs.items()}
    assert mean["shift and scale"] < 0.7 * mean["scale"] < 0.7 * 0.5 * mean["none"]


def test_a_shift_of_an_rms_norm_adds_parameters() -> None:
    model = zoo("llama").model
    state = zoo("llama").fresh({})
    OutlierSuppressionPlus(steps=2, shift_rmsnorm=True)(state)
    q = state.graph.module
    added = set(q.state_dict()) - set(model.state_dict())
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert added == {
        *(f"{layer}.{norm}.shift" for layer in layers for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}.self_attn.{linear}.bias" for layer in layers for linear in ("q_proj", "k_proj", "v_proj")),
        *(f"{layer}.mlp.{linear}.bias" for layer in layers for linear in ("gate_proj", "up_proj")),
        "model.norm.shift",
        "lm_head.bias",
    }
    torch.testing.assert_close(q(**TOKENS[0]).logits, model(**TOKENS[0]).logits, rtol=1e-4, atol=1e-4)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        x = inputs_of(q, name)
        torch.testing.assert_close(x.amax(0), -x.amin(0), rtol=1e-4, atol=1e-5)


def test_without_the_option_an_rms_norm_is_scaled_only() -> None:
    state = zoo("llama").fresh(STATIC)
    result = OutlierSuppressionPlus(steps=2)(state)
    assert result.notes == ["shifted 0 sites"]
    assert {f.map for f in state.report.folds} == {"Diagonal"}
    assert not any("shift" in name or "bias" in name for name in state.graph.module.state_dict())


def test_outliers_below_zero_count_too(opt: Discovered) -> None:
    state = opt.fresh({"*": "W6A6_CHANNEL_STATIC"}, ignore=["@head"])
    plant_everywhere(state.graph.module, -15.0)
    gains = {s.name: state.graph.module.get_parameter(f"{s.name}.weight").clone() for s in norms(state)}
    OutlierSuppressionPlus(steps=8, shift=False)(state)
    for site in norms(state):
        s = gains[site.name] / state.graph.module.get_parameter(f"{site.name}.weight")
        assert (s[OUTLIERS] > 5).all() and s.median() < 2


def test_values_are_centred_over_all_heads_that_read_them() -> None:
    state = zoo("llama").fresh({"*": "W8A8_STATIC"}, ignore=["*.mlp.*", "@head"])
    OutlierSuppressionPlus(steps=2, value=True)(state)
    (reader,) = site_of(state, "model.layers.1.self_attn.v_proj").readers
    x = inputs_of(state.graph.module, reader.linear.name)
    assert reader.index.bincount().tolist() == [2] * 16
    for channel in range(16):
        held = x[:, reader.index == channel]
        assert held.max().item() == pytest.approx(-held.min().item(), rel=1e-3)


def test_which_sites_it_takes(opt: Discovered) -> None:
    layers = [f"model.decoder.layers.{i}" for i in (0, 1)]
    norm = {f"{layer}.{n}" for layer in layers for n in ("self_attn_layer_norm", "final_layer_norm")}
    values, inner = {f"{layer}.self_attn.v_proj" for layer in layers}, {f"{layer}.fc1" for layer in layers}
    for value in (False, True):
        for take_inner in (False, True):
            state = opt.fresh(STATIC, ignore=["@head"])
            OutlierSuppressionPlus(steps=2, value=value, inner=take_inner)(state)
            want = norm | (values if value else set()) | (inner if take_inner else set())
            assert {f.site for f in state.report.folds} == want
            kinds = {f.site: f.map for f in state.report.folds}
            assert all(kinds[s] == ("Diagonal" if s in inner else "Shift+Diagonal") for s in want)
    assert "Shift" not in site_of(state, f"{layers[0]}.fc1").folds  # a shift does not pass a ReLU


def test_one_step_is_no_search() -> None:
    with pytest.raises(RecipeError, match="steps is 1; use 2 or more"):
        OutlierSuppressionPlus(steps=1)
