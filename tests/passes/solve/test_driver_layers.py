"""What a solver's driver does with one layer: experts, group sizes, the error that it reports."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.core.errors import RecipeError
from qfx.core.graph import Graph
from qfx.core.report import Layer
from qfx.core.spec import parse_scheme
from qfx.core.stats import Hessian
from qfx.passes.solve._driver import relative_error
from qfx.passes.solve.gptq import Gptq, gptq
from qfx.passes.solve.rtn import Rtn, rtn
from tests.passes.discovered import TOKENS, Discovered, inputs_of, zoo

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def llama() -> Discovered:
    return zoo("llama")


@pytest.fixture(scope="module")
def mixtral() -> Discovered:
    return zoo("mixtral")


def hessian(x: Tensor) -> Tensor:
    seen = Hessian()
    seen.update(x)
    return seen.value()


@torch.no_grad()
def tokens_of_experts(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """For each expert of the first layer, the tokens that its router sends there."""
    calls: list[tuple] = []
    hook = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, args: calls.append(args))
    for batch in batches:
        model(**batch)
    hook.remove()
    return [torch.cat([x[(chosen == e).any(1)] for x, chosen, _ in calls]) for e in range(4)]


@torch.no_grad()
def test_rtn_rounds_expert_by_expert(mixtral: Discovered) -> None:
    state = mixtral.fresh({"*.experts.*": "W4A16_G16"})
    Rtn()(state)
    assert len(state.solved) == 4
    for weight, solved in state.solved.items():
        parameter = mixtral.model.get_parameter(weight)
        assert solved.qtensor.codes.shape == parameter.shape
        for e in range(4):
            alone = rtn(parameter[e], solved.scheme.weight)
            assert torch.equal(solved.qtensor.codes[e], alone.codes)
            assert torch.equal(solved.qtensor.scale[e], alone.scale)


@torch.no_grad()
def test_gptq_solves_each_expert_on_its_own_tokens(mixtral: Discovered) -> None:
    state = mixtral.fresh({f"{EXPERTS}.*": "W4A16_G16"})
    Gptq(sequential=False)(state)
    module = mixtral.model.get_submodule(EXPERTS)
    spec = parse_scheme("W4A16_G16").weight
    tokens = tokens_of_experts(mixtral.model, TOKENS)
    assert len({len(x) for x in tokens}) > 1 and all(len(x) for x in tokens)
    for e, x in enumerate(tokens):
        gate, up = (x @ module.gate_up_proj[e].T).chunk(2, -1)
        for name, values in (("gate_up_proj", x), ("down_proj", F.silu(gate) * up)):
            found = state.solved[f"{EXPERTS}.{name}"].qtensor.codes[e]
            want, _ = gptq(getattr(module, name)[e], spec, hessian(values))
            assert (found == want.codes).float().mean() > 0.999
            together, _ = gptq(
                getattr(module, name)[e], spec, hessian(torch.cat(tokens) if values is x else values[:5])
            )
            assert (found == together.codes).float().mean() < 0.99


@torch.no_grad()
def test_an_expert_without_tokens_is_rounded_by_the_others(mixtral: Discovered) -> None:
    batches = [{"input_ids": TOKENS[0]["input_ids"][:1, :2]}]
    tokens = tokens_of_experts(mixtral.model, batches)
    idle = [e for e, x in enumerate(tokens) if not len(x)]
    assert 0 < len(idle) < 4
    state = mixtral.fresh({f"{EXPERTS}.gate_up_proj": "W4A16_G16"}, batches=batches)
    Gptq()(state)
    (layer,) = state.report.layers
    assert layer.note.startswith(f"{len(idle)} of 4 experts saw no tokens")
    codes = state.solved[f"{EXPERTS}.gate_up_proj"].qtensor.codes
    weight = mixtral.model.get_submodule(EXPERTS).gate_up_proj
    want, _ = gptq(weight[idle[0]], parse_scheme("W4A16_G16").weight, hessian(torch.cat(tokens)))
    assert (codes[idle[0]] == want.codes).float().mean() > 0.999


@pytest.mark.parametrize("step", [Rtn, Gptq])
@torch.no_grad()
def test_a_step_s_group_size_is_that_of_the_weights(llama: Discovered, step: type) -> None:
    state = llama.fresh({"*": "W4A16_CHANNEL", "*.v_proj": "W4A8_CHANNEL"})
    step(group_size=16)(state)
    shapes = {w: tuple(s.qtensor.scale.shape) for w, s in state.solved.items()}
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (16, 4)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 6)
    assert {layer.scheme for layer in state.report.layers} == {"W4A16_G16", "W4A8_G16"}
    state = llama.fresh({"*": "W4A16_G16"})
    step(group_size=-1)(state)
    assert {layer.scheme for layer in state.report.layers} == {"W4A16_CHANNEL"}


def test_a_group_size_that_does_not_divide_a_layer_is_refused(llama: Discovered) -> None:
    state = llama.fresh({"*": "W4A16_CHANNEL"})
    with pytest.raises(
        RecipeError, match=r"rtn: model.layers.0.self_attn.o_proj: .*64.*32.*; choose another group_size"
    ):
        Rtn(group_size=64)(state)


@torch.no_grad()
def test_the_error_is_that_of_the_layer_s_outputs() -> None:
    w, x = torch.randn(6, 8), torch.randn(50, 8)
    q = w + 0.1 * torch.randn(6, 8)
    want = ((x @ (w - q).T).norm() / (x @ w.T).norm()).item()
    assert relative_error(w, q, hessian(x)) == pytest.approx(want, rel=1e-4)
    assert relative_error(w, q, None) == pytest.approx(((w - q).norm() / w.norm()).item(), rel=1e-5)
    assert relative_error(w, w, hessian(x)) == relative_error(w, w, None) == 0
    zeros = torch.zeros(6, 8)
    assert relative_error(zeros, zeros, hessian(x)) == relative_error(zeros, zeros, None) == 0


@torch.no_grad()
def test_what_the_report_says_of_a_layer(llama: Discovered) -> None:
    state = llama.fresh({"*.down_proj": "W4A8_G16"})
    Gptq(sequential=False)(state)
    name = "model.layers.0.mlp.down_proj"
    (layer,) = (found for found in state.report.layers if found.name == name)
    solved, weight = state.solved[f"{name}.weight"], llama.model.get_submodule(name).weight
    error = relative_error(weight, solved.qtensor.dequantize(), hessian(inputs_of(llama.model, name)))
    assert layer.error == pytest.approx(error, rel=1e-3)
    assert layer == Layer(name, "W4A8_G16", [64, 96], "gptq", layer.error, 6.0)
    state = llama.fresh({"*.down_proj": "W4A8_G16"})
    Rtn()(state)
    weights_alone = ((weight - state.solved[f"{name}.weight"].qtensor.dequantize()).norm() / weight.norm()).item()
    assert state.report.layers[0].error == pytest.approx(weights_alone, rel=1e-4)


def test_rounding_without_data_runs_nothing(llama: Discovered, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*_: object, **__: object) -> None:
        raise AssertionError("the graph was run")

    state = llama.fresh({"*": "W8A8", "*.o_proj": "W4A16_G16"})
    monkeypatch.setattr(Graph, "execute", execute)
    assert Rtn()(state).changed == 15
    with pytest.raises(AssertionError, match="was run"):
        Rtn()(llama.fresh({"*": "W8A8_STATIC"}))


def test_what_is_solved_already_is_left(llama: Discovered) -> None:
    """Two solvers may share a model: the first takes its layers, the second the rest."""
    state = llama.fresh({"*.o_proj": "W4A16_G16"})
    Gptq()(state)
    first = dict(state.solved)
    state.plan |= llama.fresh({"*": "W8A8"}).plan
    Rtn()(state)
    assert len(first) == 2 and len(state.solved) == 15
    assert all(state.solved[w] is solved for w, solved in first.items())
