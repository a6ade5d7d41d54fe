"""The parameters that a graph reads: they are the model's own, under all their names, or float32 copies for a while."""

import math

import pytest
import torch
from torch import Tensor, nn

from qfx.core.graph import Graph, cast, module_paths
from qfx.passes.discover.capture import capture
from tests.zoo import ZOO
from tests.zoo.captured import captured

aten = torch.ops.aten


def test_the_graph_shares_the_models_storage() -> None:
    model, feeds = ZOO["mlp"].load()
    graph = capture(model, feeds)
    for name, parameter in model.named_parameters():
        assert graph.attr(name).data_ptr() == parameter.data_ptr()
    before = graph.run(feeds)
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert not graph.run(feeds).equal(before) and graph.run(feeds).equal(model(**feeds))
    model[3].weight = nn.Parameter(model[3].weight * 3)  # also a parameter that was replaced
    assert graph.run(feeds).equal(model(**feeds))


class Tied(nn.Module):
    """A head that shares the embedding's weight, a layer of two names, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.embed(x)))


def tied_graph(dtype: torch.dtype = torch.float32) -> Graph:
    return capture(Tied().eval().to(dtype), {"x": torch.arange(8).view(2, 4)})


def test_uses_finds_tied_names() -> None:
    graph = tied_graph()
    for name in ("head.weight", "embed.weight"):
        assert [n.target for n in graph.uses(name)] == [aten.embedding.default, aten.linear.default]
    for name in ("layer.weight", "alias.weight"):
        assert [n.target for n in graph.uses(name)] == [aten.linear.default]
    assert not graph.uses("idle.weight")
    with pytest.raises(AttributeError, match=r"no parameter, buffer, or constant named 'no\.such'"):
        graph.uses("no.such")


def test_parameters_that_nothing_reads_are_known() -> None:
    assert tied_graph().unread() == ["idle.weight", "idle.bias"]


def test_low_precision_is_worked_on_in_float32() -> None:
    model, wide = captured("swiglu", torch.bfloat16), captured("swiglu")
    graph, feeds = model.graph, model.feeds
    exact = [n for n in graph.nodes if "norms.0" in module_paths(n)]
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    low = graph.run(feeds)
    with graph.in_float32(graph.nodes):
        gain = graph.attr("norms.0.gain")
        assert gain.dtype == torch.float32 and gain.equal(before["norms.0.gain"].float())
        assert graph.working_dtype == torch.float32
        high = graph.run(feeds)
        assert high.dtype == torch.float32
        gain.mul_(1 + 2**-12)  # less than bfloat16 holds, and 2^-7, which it does
        graph.attr("norms.1.gain").mul_(1 + 2**-7)
        with graph.in_float32(exact):  # inside, nothing new
            assert graph.attr("norms.0.gain") is gain
        assert graph.module.norms[0].gain.dtype == torch.bfloat16
    assert graph.working_dtype is None and not graph.overrides and graph.run(feeds).dtype == torch.bfloat16
    after = graph.module.state_dict()
    assert all(after[k].equal(before[k]) for k in before if k != "norms.1.gain")
    assert after["norms.1.gain"].equal((before["norms.1.gain"].float() * (1 + 2**-7)).bfloat16())
    wide.module.load_state_dict({k: v.float() for k, v in before.items()})
    wanted = wide.run({k: v.float() for k, v in feeds.items()})[0]
    assert (high - wanted).abs().max() < 1e-5 * wanted.abs().max() < (low.float() - wanted).abs().max()


def test_float32_copies_are_stored_also_when_the_work_fails() -> None:
    graph = captured("swiglu", torch.bfloat16).graph
    nodes = [n for n in graph.nodes if any(a.target == "norms.0.gain" for a in n.all_input_nodes)]
    with pytest.raises(ZeroDivisionError), graph.in_float32(nodes):
        assert set(graph.overrides) == {"norms.0.gain"}  # no more than those nodes read
        graph.attr("norms.0.gain").fill_(math.pi)
        _ = 1 / 0
    assert graph.working_dtype is None and graph.module.norms[0].gain[0] == torch.tensor(math.pi).bfloat16()


def test_tied_weights_share_one_float32_copy() -> None:
    graph = tied_graph(torch.bfloat16)
    lookup = next(n for n in graph.nodes if n.target is aten.embedding.default)
    with graph.fx.inserting_before(lookup):  # the export reads it under one name: read it under both
        lookup.args = (graph.fx.create_node("get_attr", "embed.weight"), *lookup.args[1:])
        graph.output.args = (graph.output.args[0], graph.fx.create_node("get_attr", "head.weight"))
    with graph.in_float32(graph.nodes):
        assert graph.attr("embed.weight") is graph.attr("head.weight")
        assert graph.attr("embed.weight").dtype == torch.float32


def test_a_float32_model_is_worked_on_in_place() -> None:
    graph = captured("swiglu").graph
    with graph.in_float32(graph.nodes):
        assert graph.working_dtype is None and not graph.overrides
        assert graph.attr("norms.0.gain") is graph.module.norms[0].gain


def test_cast_changes_floats_only() -> None:
    x, i = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    tree = {"a": [x, (i, torch.float16, torch.int32)], "b": 3, "c": None, "d": x.double(), "e": torch.float64}
    found = cast(tree, torch.float32)
    assert found["a"][0].dtype == torch.float32 and x.dtype == torch.bfloat16
    assert found["a"][1] == (i, torch.float32, torch.int32) and found["a"][1][0] is i
    assert (found["b"], found["c"], found["d"].dtype, found["e"]) == (3, None, torch.float64, torch.float64)


def test_a_parameter_is_added_to_module_and_graph() -> None:
    model = captured("mlp")
    up = next(n for n in model.graph.nodes if n.target is aten.linear.default)
    segments, value = model.graph.segments(), torch.randn(3)
    node = model.graph.add_parameter("1.extra", value, before=up)
    assert node.next is up and node.meta["val"] is value and model.graph.segments() is not segments
    added = dict(model.module.named_parameters())["1.extra"]
    assert model.graph.attr("1.extra") is added and added.equal(value) and not added.requires_grad
    assert model.graph.is_parameter("1.extra") and not model.graph.is_parameter("1.other")
