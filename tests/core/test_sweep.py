"""Sweeps: block by block is the same as the whole graph at once, with no more in memory than the blocks ahead read."""

import pytest
import torch
from torch import Tensor, fx

from qfx.core.errors import CalibrationError
from qfx.core.graph import Env
from qfx.core.stats import AbsMax, Mean
from qfx.core.sweep import Sweep, segment_of
from tests.zoo.captured import Captured, captured

every_model = pytest.mark.parametrize("name", ["llama", "mixtral", "bart", "block_stack"])


def batches_of(model: Captured) -> list[dict[str, Tensor]]:
    """Three batches, of different sizes and values."""
    generator = torch.Generator().manual_seed(5)
    drawn = [{k: torch.randint(8, 128, (b, n), generator=generator) for k in model.feeds} for b, n in ((2, 12), (1, 9))]
    drawn = [{k: torch.ones_like(v) if "mask" in k else v for k, v in batch.items()} for batch in drawn]
    return [model.feeds, *drawn]


def envs_of(model: Captured, batches: list[dict[str, Tensor]]) -> list[Env]:
    found = []
    for batch in batches:
        model.feeds = batch
        found.append(model.env())
    return found


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.equal(b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type]
    return a == b


@every_model
def test_a_sweep_is_the_whole_run(name: str) -> None:
    model = captured(name)
    batches = batches_of(model)
    envs, start = envs_of(model, batches), str(model.graph.fx)
    sweep, flat = Sweep(model.graph, batches), [n for n in model.graph.nodes if n.op != "get_attr"]
    assert not sweep.done() and sweep.index == 0
    for i, segment in enumerate(model.graph.segments()):
        for k, env in enumerate(envs):
            ahead = sweep.values(k)
            inside = [n for n in segment.nodes if n.op != "output"]
            assert all(equal(ahead[n], env[n]) for n in inside)
            (out,) = sweep.outputs([k])
            assert out and all(equal(v, env[n]) for v, n in zip(out, segment.leaves, strict=True))
        assert sweep.index == i
        sweep.advance()
        done = set(flat[: flat.index(segment.nodes[-1]) + 1])
        for env, boundary in zip(envs, sweep.boundary, strict=True):
            assert set(boundary) == {n for n in done if any(u not in done for u in n.users)}  # what is read later
            assert all(equal(value, env[n]) for n, value in boundary.items())
    assert sweep.done() and str(model.graph.fx) == start


@every_model
def test_what_leaves_several_segments(name: str) -> None:
    model = captured(name)
    batches = batches_of(model)
    envs, sweep = envs_of(model, batches), Sweep(model.graph, batches)
    sweep.advance()
    through = len(sweep.segments) - 2
    inside = {n for s in sweep.segments[1 : through + 1] for n in s.nodes}
    wanted = [n for n in model.graph.nodes if n in inside and any(u not in inside for u in n.users)]
    found = sweep.outputs([2, 0], through=through)
    assert [len(v) for v in found] == [len(wanted)] * 2 and wanted
    for k, values in zip((2, 0), found, strict=True):
        assert all(equal(v, envs[k][n]) for v, n in zip(values, wanted, strict=True))
    assert all(equal(sweep.values(1, through=through)[n], envs[1][n]) for n in inside)
    assert sweep.index == 1


@every_model
def test_statistics_of_blocks_are_those_of_the_whole_run(name: str) -> None:
    model = captured(name)
    batches = batches_of(model)
    envs, sweep, start = envs_of(model, batches), Sweep(model.graph, batches), str(model.graph.fx)
    position = segment_of(model.graph)
    inputs = list(dict.fromkeys(lin.x for lin in model.linears))
    found: dict[fx.Node, AbsMax] = {}
    while not sweep.done():
        here = {x: [found.setdefault(x, AbsMax())] for x in inputs if position[x] == sweep.index}
        boundary = [dict(env) for env in sweep.boundary]
        sweep.observe(here)
        assert sweep.boundary == boundary and str(model.graph.fx) == start
        sweep.advance()
    assert set(found) == set(inputs)
    for x, stat in found.items():
        rows = torch.cat([env[x].flatten(0, -2) for env in envs])
        assert stat.count == len(rows) and stat.value().equal(rows.abs().amax(0))


def test_several_segments_are_observed_at_once() -> None:
    model = captured("block_stack")
    envs, sweep = envs_of(model, [model.feeds]), Sweep(model.graph, [model.feeds])
    stats = {lin.x: [Mean()] for lin in model.linears}
    sweep.observe(stats, through=len(sweep.segments) - 1)
    assert sweep.index == 0 and all(
        torch.allclose(stat.value().mean, envs[0][x].flatten(0, 1).mean(0), atol=1e-6) for x, (stat,) in stats.items()
    )


def test_a_value_of_an_earlier_block_is_observed_where_it_is_read() -> None:
    model = captured("block_stack")
    envs, sweep, start = envs_of(model, [model.feeds]), Sweep(model.graph, [model.feeds]), str(model.graph.fx)
    sweep.advance()
    (value,) = sweep.boundary[0]
    stat = AbsMax()
    sweep.observe({value: [stat]})
    assert stat.value().equal(envs[0][value].flatten(0, 1).abs().amax(0)) and str(model.graph.fx) == start


def test_experts_are_measured_apart() -> None:
    model = captured("mixtral")
    (env,), sweep, start = envs_of(model, [model.feeds]), Sweep(model.graph, [model.feeds]), str(model.graph.fx)
    experts = next(lin for lin in model.linears if lin.experts)
    stats = [AbsMax() for _ in range(4)]
    sweep.advance()
    sweep.observe({}, experts={experts: stats})
    assert sum(stat.count for stat in stats) == len(env[experts.x]) == 48 and str(model.graph.fx) == start
    parts = env[experts.x].tensor_split(env[experts.offsets][:-1].tolist())
    assert all(stat.value().equal(p.abs().amax(0)) for stat, p in zip(stats, parts, strict=True) if stat.count)


def test_padding_is_left_out_batch_by_batch() -> None:
    model = captured("bert")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    sweep = Sweep(model.graph, [{**model.feeds, "attention_mask": mask}, model.feeds])
    stat = AbsMax()
    sweep.observe({model.linears[0].x: [stat]}, through=1)
    assert stat.count == 17 + 24


def test_an_observation_that_fails_leaves_the_graph_as_it_was() -> None:
    model = captured("block_stack")
    with torch.no_grad():
        model.module.blocks[0].norm.bias[0] = torch.nan
    start, sweep = str(model.graph.fx), Sweep(model.graph, [model.feeds])
    sweep.advance()
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        sweep.observe({model.linears[0].x: [AbsMax()]})
    assert str(model.graph.fx) == start and sweep.index == 1
    sweep.observe({})


def test_values_can_be_replaced_on_the_way() -> None:
    model = captured("block_stack")
    sweep, value = Sweep(model.graph, [model.feeds]), model.linears[0].y
    while sweep.index < len(sweep.segments) - 1:
        sweep.advance(tap=lambda node, x: torch.zeros_like(x) if node is value else None)
    (logits,) = sweep.outputs([0])[0]
    with torch.no_grad():
        model.module.blocks[0].qkv.weight.zero_()
        model.module.blocks[0].qkv.bias.zero_()
    assert logits.equal(model.run()[0])


def test_each_node_has_its_segment() -> None:
    graph = captured("llama").graph
    where = segment_of(graph)
    assert set(where) == {n for n in graph.nodes if n.op != "get_attr"}
    assert all(n in graph.segments()[i].nodes for n, i in where.items())
