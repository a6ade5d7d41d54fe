"""Maps at run time: they keep the function, compose, come off again, and are only put where weights are free."""

import pytest
import torch
from torch import nn

import qfx
from qfx.core.fold import fold
from qfx.core.maps import Diagonal, Shift
from qfx.core.online import Online, add_online, online_site
from qfx.modules.linear import QLinear
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from tests.zoo import ZOO


class Twice(nn.Module):
    """Two linears read one value that the output needs too, so that nothing can absorb a map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        return torch.cat([self.first(y) * self.second(y), y], -1)


@pytest.fixture
def found():
    torch.manual_seed(0)
    model, inputs = Twice().double().eval(), {"x": torch.randn(3, 5, 6).double()}
    graph = capture(model, inputs)
    linears, _ = find_linears(graph)
    return model, inputs, graph, linears


def test_it_keeps_the_function_and_comes_off_again(found) -> None:
    model, inputs, graph, linears = found
    want, state, text = model(**inputs), {k: v.clone() for k, v in model.state_dict().items()}, str(graph.fx)
    site = online_site(linears[0].x, linears, shiftable=True)
    undo = [add_online(graph, site)]
    assert isinstance(model.first, Online) and isinstance(model.first, nn.Linear)
    assert model.first.online_gain is model.second.online_gain
    undo += [fold(graph, site, Shift(torch.randn(6))), fold(graph, site, Diagonal(torch.rand(6) + 0.5))]
    assert not torch.equal(model.first.weight, state["first.weight"])
    for got in (model(**inputs), graph.run(inputs)):
        assert (got - want).abs().max() < 1e-12
    for back in reversed(undo):
        back()
    assert type(model.first) is nn.Linear and str(graph.fx) == text
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)


def test_without_the_readers_the_function_changes(found) -> None:
    model, inputs, graph, linears = found
    want = model(**inputs)
    add_online(graph, online_site(linears[0].x, linears, shiftable=True))
    model.first.online_gain.data.mul_(1.5)
    assert (model(**inputs) - want).abs().max() > 1e-3


def test_a_second_step_goes_on_with_the_same_map() -> None:
    model, inputs = ZOO["bert"].load()
    want = model(**inputs)[0]
    steps = [{"smoothquant": {"online": True}}, {"outlier_suppression_plus": {"online": True, "steps": 2}}]
    q = qfx.quantize(model, {"schemes": {}, "steps": steps}, [inputs], progress=False)
    online = [f for f in q.qfx.report.folds if f.online]
    assert len(online) > len({f.site for f in online})
    assert (q(**inputs)[0] - want).abs().max() / want.abs().max() < 1e-5


def test_tied_weights_are_left_alone_and_lowered_layers_keep_their_map() -> None:
    model, inputs = ZOO["bert"].load()
    recipe = {"schemes": {"*": "W8A8"}, "ignore": ["@head"], "steps": [{"smoothquant": {"online": True}}]}
    q = qfx.quantize(model, recipe, [inputs], progress=False)
    assert not any("decoder" in f.site for f in q.qfx.report.folds)
    query = q.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert isinstance(query, QLinear) and isinstance(query, Online) and query.op == "int8_linear"
    assert q.qfx.report.output_error is not None and q.qfx.report.output_error < 0.05
