"""The canonical graph: its invariants, that it is the model, and what it computes on while a fold is checked."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from qfx.core.graph import Graph, cast, depends, layer_path, module_paths
from qfx.passes.discover.capture import capture
from tests.zoo import ZOO
from tests.zoo.captured import captured

aten = torch.ops.aten
MODELS = ("llama", "gpt2", "mixtral", "bert", "bart", "siglip_vision", "block_stack", "swiglu", "einsum")
every_model = pytest.mark.parametrize("name", MODELS)
NOISE = ("assert", "dropout", "sym_constrain_range")
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def of_size(feeds: dict[str, Tensor], batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of another size, with padding where there is a mask."""
    generator = torch.Generator().manual_seed(batch)
    found = {}
    for name, x in feeds.items():
        if x.dim() == 4:
            found[name] = torch.randn(batch, *x.shape[1:], generator=generator)
        elif x.is_floating_point():
            found[name] = torch.randn(batch, length, x.shape[2], generator=generator)
        elif "mask" in name:
            found[name] = torch.ones(batch, length, dtype=x.dtype)
            found[name][0, : length // 3] = 0
        else:
            found[name] = torch.randint(8, 128, (batch, length), generator=generator)
    return found


@every_model
def test_the_graph_is_canonical(name: str) -> None:
    model = captured(name)
    names = stored(model.module)
    assert [n.op for n in model.graph.nodes].count("output") == 1
    for node in model.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert not any(word in str(node.target) for word in NOISE)
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable
        if node.target in CASTS:
            source, result = node.args[0].meta["val"], node.meta["val"]
            assert (source.dtype, source.device, source.layout) != (result.dtype, result.device, result.layout)
        if node.op == "get_attr":
            assert model.graph.attr(str(node.target)) is names[str(node.target)]
            assert model.graph.is_parameter(str(node.target)) == isinstance(names[str(node.target)], nn.Parameter)
    assert {str(n.target) for n in model.graph.inputs} == set(model.feeds)


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


@every_model
def test_the_graph_is_the_model_at_every_size(name: str) -> None:
    model = captured(name)
    for feeds in [model.feeds, *(of_size(model.feeds, *size) for size in [(2, 12), (3, 7), (1, 20)])]:
        found, wanted = model.run(feeds), model.call(feeds)
        assert found and len(found) == len(wanted)
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    assert type(model.graph.run(model.feeds)) is type(model.module(**model.feeds))  # in the model's own form


@every_model
def test_recorded_shapes_and_dtypes_are_those_of_the_values(name: str) -> None:
    model = captured(name)
    for node, value in model.env().items():
        if isinstance(value, Tensor):
            recorded = node.meta["val"]
            assert recorded.dtype == value.dtype and recorded.dim() == value.dim()
            fixed = [(s, t) for s, t in zip(recorded.shape, value.shape, strict=True) if isinstance(s, int)]
            assert all(s == t for s, t in fixed)


@every_model
def test_segments_cover_the_nodes_in_order_and_free_what_is_dead(name: str) -> None:
    model = captured(name)
    graph, segments = model.graph, model.graph.segments()
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    assert [n for s in segments for n in s.nodes] == nodes
    assert segments is graph.segments() and all(a.name != b.name for a, b in pairwise(segments))
    place = {n: i for i, n in enumerate(nodes)}
    last = {n: max((place[u] for u in n.users), default=-1) for n in nodes}
    env: dict = {}
    with torch.no_grad():
        for segment in segments:
            for node in segment.nodes:
                graph.execute([node], env, feeds=model.feeds, drop=segment.drop)
                # no more is kept than later nodes read; what the model returns stays for its output
                assert set(env) == {n for n in nodes[: place[node] + 1] if last[n] > place[node]} | (
                    set(node.all_input_nodes) if node.op == "output" else set()
                )
            read_later = {n for n in segment.nodes if last[n] > place[segment.nodes[-1]]}
            returned = {n for n in segment.nodes if segment is segments[-1] and graph.output in n.users}
            assert set(segment.leaves) == read_later | returned


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("llama", ["outside", "model.layers.0", "model.layers.1", "outside"]),
        ("gpt2", ["outside", "transformer.h.0", "transformer.h.1", "outside"]),
        ("block_stack", ["outside", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "outside"]),
        ("multihead_attention", ["outside"]),
    ],
)
def test_the_graph_is_cut_at_its_blocks(name: str, blocks: list[str]) -> None:
    graph = captured(name).graph
    assert [s.name for s in graph.segments()] == blocks
    for segment in graph.segments():
        for node in segment.nodes:
            inside = any(p == segment.name for p in module_paths(node))
            assert inside == (segment.name != "outside") or node.op in ("placeholder", "output")
    assert layer_path(next(n for n in graph.nodes if n.target is aten.linear.default or n.target is aten.addmm.default))


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
    with graph.in_float32(graph.nodes):
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"} & {"embed.weight", "head.weight"}
        assert read and len({id(graph.attr(name)) for name in read}) == 1
        assert all(graph.attr(name).dtype == torch.float32 for name in read)


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


def test_taps_see_and_replace_values() -> None:
    model = captured("mlp")
    seen = []
    out = model.graph.run(model.feeds, tap=lambda node, value: seen.append(node))
    assert seen == [n for n in model.graph.nodes if n.op not in ("get_attr", "output")]
    relu = next(n for n in seen if n.target is aten.relu.default)
    zeroed = model.graph.run(model.feeds, tap=lambda node, value: value * 0 if node is relu else None)
    assert zeroed.equal(model.module[3].bias.expand_as(out)) and not zeroed.equal(out)


def test_dependence_and_missing_values() -> None:
    graph = captured("mlp").graph
    norm, up, relu, down = [n for n in graph.nodes if n.op == "call_function"]
    assert depends(graph.nodes, [up]) == [relu, down, graph.output] and depends([up, down], [norm]) == [up]
    with pytest.raises(KeyError, match="read before it is computed"):
        graph.execute([up], {})
