"""SmoothQuant: equation 4 as measured on the folded model, its limits, its search, and what it is for."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from qfx.core.errors import RecipeError
from qfx.core.maps import Diagonal, Map
from qfx.core.passes import State
from qfx.core.site import Site
from qfx.passes.solve.rtn import Rtn
from qfx.passes.transform._trial import Trial
from qfx.passes.transform.smoothquant import GRID, SmoothQuant, smooth_scale
from tests.passes.discovered import TOKENS, Discovered, inputs_of, site_of, zoo

STATIC = "W8A8_TENSOR_STATIC"
LAYERS = ("model.layers.0", "model.layers.1")
NORMS = [f"{layer}.{norm}" for layer in LAYERS for norm in ("input_layernorm", "post_attention_layernorm")]
VALUES = [f"{layer}.self_attn.v_proj" for layer in LAYERS]
UPS = [f"{layer}.mlp.up_proj" for layer in LAYERS]


@pytest.fixture(scope="module")
def llama() -> Discovered:
    return zoo("llama")


def readers(site: Site) -> list[str]:
    return [r.linear.name for r in site.readers]


def x_max(model: nn.Module, site: Site) -> Tensor:
    return inputs_of(model, readers(site)[0]).abs().amax(0)


def w_max(model: nn.Module, site: Site) -> Tensor:
    return torch.cat([model.get_submodule(name).weight.detach() for name in readers(site)]).abs().amax(0)


def gain(model: nn.Module, site: Site) -> Tensor:
    return model.get_parameter(f"{site.name}.weight").detach().clone()


def folded_scale(found: Discovered, state: State, name: str) -> Tensor:
    """s of a norm's site, read off its gain."""
    site = site_of(state, name)
    return gain(found.model, site) / gain(state.graph.module, site)


def norms(state: State) -> list[Site]:
    return [s for s in state.sites if s.kind == "norm"]


def test_alpha_a_half_makes_activations_and_weights_equally_difficult(llama: Discovered) -> None:
    state = llama.fresh({"*": STATIC})
    SmoothQuant(alpha=0.5)(state)
    assert [s.name for s in norms(state)] == [*NORMS, "model.norm"]
    for site in norms(state):
        want = (x_max(llama.model, site) * w_max(llama.model, site)).sqrt()
        torch.testing.assert_close(x_max(state.graph.module, site), want, rtol=2e-5, atol=0)
        torch.testing.assert_close(w_max(state.graph.module, site), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equation_4(llama: Discovered, alpha: float) -> None:
    """At 1 every channel's activations end at 1, at 0 every channel's weights do."""
    state = llama.fresh({"*": STATIC})
    SmoothQuant(alpha=alpha)(state)
    for site in norms(state):
        x, w = x_max(llama.model, site), w_max(llama.model, site)
        s = x**alpha / w ** (1 - alpha)
        torch.testing.assert_close(x_max(state.graph.module, site), x / s, rtol=2e-5, atol=0)
        torch.testing.assert_close(w_max(state.graph.module, site), w * s, rtol=2e-5, atol=0)


@pytest.mark.parametrize("largest", ["q_proj", "k_proj", "v_proj"])
def test_the_weight_s_maximum_runs_over_all_readers(llama: Discovered, largest: str) -> None:
    state, layer = llama.fresh({"*": STATIC}), f"{LAYERS[0]}.self_attn"
    before = {n: state.graph.module.get_submodule(f"{layer}.{n}").weight for n in ("q_proj", "k_proj", "v_proj")}
    before[largest].data[3, 7] = 40.0
    SmoothQuant(alpha=0.0)(state)
    assert folded_scale(llama, state, NORMS[0])[7] == pytest.approx(1 / 40, rel=1e-5)
    assert before[largest][3, 7] == pytest.approx(1, rel=1e-5)


def test_channels_that_are_never_active_are_left_alone(llama: Discovered) -> None:
    state = llama.fresh({"*": STATIC})
    module, site = state.graph.module, site_of(state, NORMS[0])
    module.get_parameter(f"{site.name}.weight").data[5] = 0
    columns = {name: module.get_submodule(name).weight[:, 5].clone() for name in readers(site)}
    SmoothQuant(alpha=0.5)(state)
    assert gain(module, site)[5] == 0
    assert all(torch.equal(module.get_submodule(n).weight[:, 5], before) for n, before in columns.items())
    assert (folded_scale(llama, state, NORMS[0])[:5] != 1).all()


def test_scales_are_clamped_on_both_sides_and_dead_channels_get_one() -> None:
    x = torch.tensor([1e12, 1e-12, 4.0, 0.0, 4.0])
    w = torch.tensor([1.0, 1.0, 9.0, 1.0, 0.0])
    assert smooth_scale(x, w, 1.0).tolist() == pytest.approx([1e5, 1e-5, 4, 1, 4])
    assert smooth_scale(x, w, 0.5).tolist() == pytest.approx([1e5, 1e-5, 2 / 3, 1, (4 / 1e-5) ** 0.5])
    assert smooth_scale(x, w, 0.0).tolist() == pytest.approx([1, 1, 1 / 9, 1, 1e5])


def test_smooth_o_and_smooth_down_add_sites(llama: Discovered) -> None:
    taken = {}
    for o in (False, True):
        for down in (False, True):
            state = llama.fresh({"*": STATIC})
            SmoothQuant(smooth_o=o, smooth_down=down)(state)
            taken[o, down] = {f.site for f in state.report.folds}
    first = {*NORMS, "model.norm"}
    assert taken == {
        (False, False): first,
        (True, False): first | set(VALUES),
        (False, True): first | set(UPS),
        (True, True): first | set(VALUES) | set(UPS),
    }


def test_the_inputs_of_output_and_down_projections_are_smoothed_too(llama: Discovered) -> None:
    """The two query heads that share a value head share a scale, so their larger maximum counts."""
    state = llama.fresh({"*": STATIC})
    SmoothQuant(smooth_o=True, smooth_down=True)(state)
    module = state.graph.module
    for name in (*VALUES, *UPS):
        (reader,) = site_of(state, name).readers
        x = inputs_of(module, reader.linear.name).abs().amax(0)
        w = module.get_submodule(reader.linear.name).weight.abs().amax(0)
        groups = [reader.index == channel for channel in range(int(reader.index.max()) + 1)]
        assert {int(g.sum()) for g in groups} == ({2} if name in VALUES else {1})
        for g in groups:
            assert x[g].max().item() == pytest.approx(w[g].max().item(), rel=1e-4)


def test_only_sites_with_a_reader_that_will_be_quantized_are_folded(llama: Discovered) -> None:
    state = llama.fresh({"*": STATIC}, ignore=["*.gate_proj", "*.up_proj", "*.q_proj", "@head"])
    SmoothQuant(smooth_down=True)(state)
    assert {f.site for f in state.report.folds} == {NORMS[0], NORMS[2], *UPS}  # k and v, and down, are left
    state = llama.fresh({})
    SmoothQuant()(state)
    assert {f.site for f in state.report.folds} == {*NORMS, "model.norm"}  # to be quantized by someone else


Losses = list[tuple[Site, float, Tensor]]


def spy(monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float] = lambda true: true) -> Losses:
    """Records every trial: its site, its loss (which `loss` may falsify), and the scale."""
    seen: Losses = []
    original = Trial.loss

    def recording(self: Trial, site: Site, maps: Sequence[Map], clip: float | None = None) -> float:
        (only,) = maps
        assert isinstance(only, Diagonal)
        seen.append((site, loss(original(self, site, maps, clip)), 1 / only.scale))
        return seen[-1][1]

    monkeypatch.setattr(Trial, "loss", recording)
    return seen


def test_the_search_takes_the_alpha_of_least_loss(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    state = llama.fresh({"*": "W4A4_TENSOR_STATIC"})
    result = SmoothQuant(alpha="search")(state)
    chosen: dict[float, int] = {}
    for site in norms(state):
        tried = [(loss, scale) for of, loss, scale in seen if of is site]
        x, w = x_max(llama.model, site), w_max(llama.model, site)
        for alpha, (_, scale) in zip(GRID, tried, strict=True):
            torch.testing.assert_close(scale.float(), x**alpha / w ** (1 - alpha), rtol=1e-3, atol=0)
        best = min(range(len(GRID)), key=lambda i: tried[i][0])
        torch.testing.assert_close(folded_scale(llama, state, site.name), tried[best][1].float(), rtol=1e-5, atol=0)
        chosen[GRID[best]] = chosen.get(GRID[best], 0) + 1
    assert GRID == (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert len(chosen) > 1  # else the loss says nothing here
    assert result.notes == ["alpha: " + ", ".join(f"{a} at {n} sites" for a, n in sorted(chosen.items()))]


def test_of_equal_alphas_the_search_takes_the_smaller(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    spy(monkeypatch, lambda true: 1.0)
    state = llama.fresh({"*": STATIC})
    assert SmoothQuant(alpha="search")(state).notes == ["alpha: 0.4 at 5 sites"]


@torch.no_grad()
def plant(model: nn.Module) -> None:
    """Two channels of each norm become 60 times larger, and their readers make up for it."""
    for layer in model.model.layers:
        heads = layer.self_attn
        for norm, linears in (
            (layer.input_layernorm, (heads.q_proj, heads.k_proj, heads.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight[[11, 40]] *= 60
            for linear in linears:
                linear.weight[:, [11, 40]] /= 60


@torch.no_grad()
def test_planted_outliers_ruin_rtn_and_not_smoothquant(llama: Discovered) -> None:
    want, error = llama.model(**TOKENS[0]).logits, {}
    for steps in ([], [SmoothQuant()]):
        state = llama.fresh({"*": STATIC}, ignore=["@head"])
        plant(state.graph.module)
        torch.testing.assert_close(state.graph.run(TOKENS[0]).logits, want, rtol=1e-4, atol=1e-4)
        for step in (*steps, Rtn()):
            step(state)
        error[len(steps)] = ((state.graph.run(TOKENS[0]).logits - want).norm() / want.norm()).item()
    assert error[1] < 0.05
    assert error[0] > 5 * error[1]


@pytest.mark.parametrize("alpha", [-0.1, 1.01, "find"])
def test_other_alphas_are_refused(alpha: float | str) -> None:
    with pytest.raises(RecipeError, match="from 0 to 1, or 'search'"):
        SmoothQuant(alpha=alpha)
