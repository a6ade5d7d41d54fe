"""A trial's loss: by hand on small modules, the same after the fold as before it, and without a trace in the model."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.core.fold import fold
from qfx.core.maps import Diagonal, Shift
from qfx.core.passes import State
from qfx.core.site import Reader
from qfx.core.sweep import Sweep
from qfx.passes.transform._trial import DEFAULT, Trial
from tests.passes.discovered import Discovered, site_of
from tests.zoo import harden
from tests.zoo.user_modules import HIDDEN, FeedForward, FusedAttention, feature_inputs

BATCHES = [feature_inputs(), {"x": 3 * feature_inputs()["x"]}]
X = BATCHES[0]["x"]
INT8 = {"*": DEFAULT}
WORSE = ("W8A16", "W8A8", "W6A6_CHANNEL", "W4A4_CHANNEL", "W3A3_CHANNEL", "W2A2_CHANNEL")


@pytest.fixture(scope="module", params=[FeedForward, FusedAttention])
def either(request: pytest.FixtureRequest) -> Discovered:
    return make(request.param)


@pytest.fixture(scope="module")
def mlp() -> Discovered:
    return make(FeedForward)


@pytest.fixture(scope="module")
def attention() -> Discovered:
    return make(FusedAttention)


def make(kind: Callable[[], nn.Module]) -> Discovered:
    model = kind().requires_grad_(False)
    harden(model, torch.Generator().manual_seed(1))
    return Discovered(model, BATCHES)


def trial_of(state: State) -> Trial:
    sweep = Sweep(state.graph, state.batches)
    return Trial(state, sweep, len(sweep.segments) - 1)


def loss(found: Discovered, scheme: str | None) -> float:
    state = found.fresh({"*": scheme} if scheme else {})
    return trial_of(state).loss(site_of(state, "norm"), [])


def int8(x: Tensor, reach: Tensor | None = None) -> Tensor:
    """Symmetric, per tensor."""
    scale = (x.abs().max() if reach is None else reach) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).square().mean() / want.square().mean()).item()


def test_by_hand_the_loss_of_an_mlp_is_taken_behind_the_activation(mlp: Discovered) -> None:
    state = mlp.fresh(INT8)
    m = state.graph.module
    h = m.norm(X)
    want = F.gelu(m.up(h))
    got = F.gelu(int8(h) @ int8(m.up.weight).T + m.up.bias)
    assert relative(got, want) > 1e-6
    assert trial_of(state).loss(site_of(state, "norm"), []) == pytest.approx(relative(got, want), rel=1e-4)


def test_by_hand_the_loss_of_an_attention_is_taken_behind_the_attention(attention: Discovered) -> None:
    state = attention.fresh(INT8)
    m = state.graph.module
    inputs = []
    m.out.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    m(X)
    h = m.norm(X)
    m.qkv.register_forward_hook(lambda *_: int8(h) @ int8(m.qkv.weight).T + m.qkv.bias)
    m(X)
    want, got = inputs
    assert trial_of(state).loss(site_of(state, "norm"), []) == pytest.approx(relative(got, want), rel=1e-4)


def test_by_hand_the_last_linear_s_loss_is_that_of_its_own_output(attention: Discovered) -> None:
    state = attention.fresh(INT8)
    m = state.graph.module
    inputs = []
    m.out.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    m(X)
    want, got = m.out(inputs[0]), int8(inputs[0]) @ int8(m.out.weight).T + m.out.bias
    (site,) = (s for s in state.sites if s.kind == "value")
    assert trial_of(state).loss(site, []) == pytest.approx(relative(got, want), rel=1e-4)


def test_by_hand_maps_reach_input_weight_and_bias(mlp: Discovered) -> None:
    """A shift's bias is that of the weight before it is scaled, and it is not quantized."""
    state = mlp.fresh(INT8)
    m = state.graph.module
    z, d = torch.randn(HIDDEN), torch.rand(HIDDEN) + 0.5
    h = (m.norm(X) - z) * d
    got = F.gelu(int8(h) @ int8(m.up.weight / d).T + m.up.bias + m.up.weight @ z)
    found = trial_of(state).loss(site_of(state, "norm"), [Shift(z.double()), Diagonal(d.double())])
    assert found == pytest.approx(relative(got, F.gelu(m.up(m.norm(X)))), rel=1e-4)


def test_by_hand_columns_that_hold_no_channel_of_the_site_are_left_alone(mlp: Discovered) -> None:
    state = mlp.fresh(INT8)
    m = state.graph.module
    site = site_of(state, "norm")
    index = torch.arange(HIDDEN).roll(1)
    index[:8] = -1
    part = dataclasses.replace(site, readers=(Reader(site.readers[0].linear, index),))
    scale, offset = torch.rand(HIDDEN) + 0.5, torch.randn(HIDDEN)
    d, z = scale[index], offset[index]
    d[:8], z[:8] = 1, 0
    h = (m.norm(X) - z) * d
    got = F.gelu(int8(h) @ int8(m.up.weight / d).T + m.up.bias + m.up.weight @ z)
    found = trial_of(state).loss(part, [Shift(offset.double()), Diagonal(scale.double())])
    assert found == pytest.approx(relative(got, F.gelu(m.up(m.norm(X)))), rel=1e-4)


class Gated(nn.Module):
    """A gated perceptron, of which a recipe may take a part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate, self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def test_by_hand_of_two_readers_the_ignored_one_stays_float() -> None:
    found = make(Gated)
    losses = {}
    for ignored in ([], ["up"], ["gate"]):
        state = found.fresh(INT8, ignored)
        m = state.graph.module
        h = m.norm(X)
        gate, up = (
            linear(h) if name in ignored else int8(h) @ int8(linear.weight).T + linear.bias
            for name, linear in (("gate", m.gate), ("up", m.up))
        )
        want = relative(F.silu(gate) * up, F.silu(m.gate(h)) * m.up(h))
        losses[tuple(ignored)] = trial_of(state).loss(site_of(state, "norm"), [])
        assert losses[tuple(ignored)] == pytest.approx(want, rel=1e-4)
    assert len(set(losses.values())) == 3


def test_by_hand_a_clip_sets_the_input_s_range(mlp: Discovered) -> None:
    state = mlp.fresh(INT8)
    m = state.graph.module
    h = m.norm(X)
    clip = h.abs().max() / 3
    got = F.gelu(int8(h, clip) @ int8(m.up.weight).T + m.up.bias)
    trial, site = trial_of(state), site_of(state, "norm")
    assert trial.loss(site, [], float(clip)) == pytest.approx(relative(got, F.gelu(m.up(h))), rel=1e-4)
    assert trial.loss(site, [], h.abs().max().item()) == trial.loss(site, [])


@pytest.mark.parametrize("scheme", [DEFAULT, "W4A8_G16", "W8A8_STATIC_ASYM", "FP8_DYNAMIC", "W3A16_G16"])
def test_a_map_costs_what_its_fold_costs(either: Discovered, scheme: str) -> None:
    state = either.fresh({"*": scheme})
    site, trial = site_of(state, "norm"), trial_of(state)
    generator = torch.Generator().manual_seed(2)
    maps = [
        Shift(torch.randn(HIDDEN, generator=generator).double()),
        Diagonal(torch.exp(torch.randn(HIDDEN, generator=generator)).double()),
    ]
    plain, tried = trial.loss(site, []), trial.loss(site, maps)
    for m in maps:
        fold(state.graph, site, m)
    trial.forget()
    assert trial.loss(site, []) == pytest.approx(tried, rel=0.02)  # a value between two codes may go to the other
    assert abs(tried - plain) > 0.1 * plain


def test_nothing_is_lost_where_nothing_will_be_quantized(mlp: Discovered) -> None:
    state = mlp.fresh(INT8, ignore=["up"])
    scale = Diagonal(torch.rand(HIDDEN).double() + 0.5)
    assert list(state.plan) == ["down.weight"]
    assert trial_of(state).loss(site_of(state, "norm"), [scale]) == 0


def test_a_recipe_without_schemes_is_tried_at_the_default(mlp: Discovered) -> None:
    default, none, other = (loss(mlp, scheme) for scheme in (DEFAULT, None, "W4A4_TENSOR_STATIC"))
    assert none == default < other


def test_the_worse_the_quantizer_the_larger_the_loss(mlp: Discovered) -> None:
    assert all(2 * a < b for a, b in itertools.pairwise(loss(mlp, scheme) for scheme in WORSE))


def test_equal_maps_cost_the_same(mlp: Discovered) -> None:
    state = mlp.fresh(INT8)
    trial, site = trial_of(state), site_of(state, "norm")
    scale = torch.rand(HIDDEN).double() + 0.5
    ones, zeros = Diagonal(torch.ones(HIDDEN).double()), Shift(torch.zeros(HIDDEN).double())
    assert trial.loss(site, []) == trial.loss(site, [ones]) == trial.loss(site, [zeros, ones])
    assert trial.loss(site, [Diagonal(scale)]) == trial.loss(site, [Diagonal(scale.clone())])
    assert trial.loss(site, [Diagonal(scale)]) != trial.loss(site, [])


def test_a_trial_leaves_the_model_as_it_was(mlp: Discovered) -> None:
    state = mlp.fresh(INT8)
    before = {k: v.clone() for k, v in state.graph.module.state_dict().items()}
    text, out = str(state.graph.fx), state.graph.run(BATCHES[1])
    trial, site = trial_of(state), site_of(state, "norm")
    first = trial.loss(site, [Diagonal(torch.full((HIDDEN,), 2.0).double()), Shift(torch.ones(HIDDEN).double())])
    after = state.graph.module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert str(state.graph.fx) == text and not state.graph.overrides
    assert torch.equal(state.graph.run(BATCHES[1]), out)
    assert (
        trial.loss(site, [Diagonal(torch.full((HIDDEN,), 2.0).double()), Shift(torch.ones(HIDDEN).double())]) == first
    )
