"""The canonical graph: its invariants, that it is the model, and how it is cut and run."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from qfx.core.graph import depends, layer_path, module_paths
from qfx.passes.discover.capture import capture
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


def test_an_input_that_nothing_reads_is_not_kept() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 1

    graph = capture(First(), {"x": torch.randn(2, 4), "y": torch.randn(2, 4)})
    (segment,) = graph.segments()
    unread = graph.inputs[1]
    assert not unread.users and segment.drop[unread] == [unread] and unread not in segment.leaves


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
