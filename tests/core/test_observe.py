"""Observers: they see exactly the values, change nothing, and leave no trace."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.core.observe import Observe, ObserveExperts, insert, insert_experts, remove, set_masks
from qfx.core.statistic import Statistic
from qfx.core.stats import AbsMax
from tests.zoo.captured import Captured, captured

every_model = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "einsum", "mlp"])


class Keep(Statistic):
    """Keeps all that it sees."""

    def _add(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows]) if self.count else rows.clone()

    def _merge(self, other: Statistic) -> None:
        raise NotImplementedError

    def value(self) -> Tensor:
        return self.rows


def inputs_of(model: Captured) -> list[fx.Node]:
    return list(dict.fromkeys(lin.x for lin in model.linears))


def hooked(module: nn.Module, seen: dict[str, Tensor]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Keeps the input of every layer by name, with torch's own hooks."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            yield layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))


def text(model: Captured) -> tuple[str, str, list]:
    graph = model.graph.fx
    return str(graph), graph.python_code("self").src, [(s.name, s.nodes, s.leaves) for s in model.graph.segments()]


@every_model
def test_an_observed_run_equals_the_unobserved_and_nothing_is_left(name: str) -> None:
    model = captured(name)
    before, wanted = text(model), model.run()
    values = {n: v for n, v in model.env().items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim()}
    finite = {n: v for n, v in values.items() if v.isfinite().all()}
    kept = {node: Keep() for node in finite}
    added = insert(model.graph, {node: [kept[node]] for node in finite})
    assert len(added) == len(finite) > 3 and text(model) != before
    model.graph.fx.lint()
    assert all(set(node.users) == {observer} for node, observer in zip(finite, added, strict=True))
    assert all(a.equal(b) for a, b in zip(wanted, model.run(), strict=True))
    for node, value in finite.items():
        assert kept[node].value().equal(value.reshape(-1, value.shape[-1]))
    remove(model.graph)
    assert text(model) == before
    remove(model.graph)  # with none there, nothing
    assert text(model) == before


@pytest.mark.parametrize("name", ["llama", "bert", "mlp"])
def test_observers_see_what_the_layers_are_given(name: str) -> None:
    model = captured(name)
    seen: dict[str, Tensor] = {}
    handles = list(hooked(model.module, seen))
    model.call()
    for handle in handles:
        handle.remove()
    assert set(seen) == {lin.name for lin in model.linears}
    kept = {x: Keep() for x in inputs_of(model)}
    insert(model.graph, {x: [stat] for x, stat in kept.items()})
    model.run()
    for linear in model.linears:
        assert kept[linear.x].value().equal(seen[linear.name].flatten(0, -2))


def test_padding_is_left_out() -> None:
    model = captured("bert")
    values = inputs_of(model)[:2]
    kept = {x: (Keep(), AbsMax()) for x in values}
    added = insert(model.graph, kept)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    padded = {**model.feeds, "attention_mask": mask}
    set_masks(added, padded)
    model.run(padded)
    remove(model.graph)
    model.feeds = padded
    env = model.env()
    for x, (stat, largest) in kept.items():
        assert stat.value().equal(env[x][mask.bool()]) and stat.count == largest.count == 20
        assert not stat.value().equal(env[x].flatten(0, 1))
        assert largest.value().equal(env[x][mask.bool()].abs().amax(0))


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (None, 24),
        (torch.ones(2, 12), 24),
        (torch.ones(2, 12).index_fill(1, torch.arange(3), 0), 18),
        (torch.ones(2, 12).index_fill(1, torch.arange(3), -5), 24),  # what is not zero counts
        (torch.ones(2, 12, dtype=torch.bool).index_fill(0, torch.tensor([1]), False), 12),
        (torch.zeros(2, 1, 12, 12), 24),  # not a mask of tokens
        (torch.tensor([1, 0]), 24),
        (torch.zeros(2, 7), 24),  # nor of these tokens
    ],
)
def test_masks_of_tokens(mask: Tensor | None, kept: int) -> None:
    model = captured("mlp")
    stat = Keep()
    added = insert(model.graph, {model.graph.inputs[0]: [stat]})
    # that of the batch before must not stay
    set_masks(added, {"attention_mask": torch.zeros(2, 12)})
    set_masks(added, {} if mask is None else {"attention_mask": mask})
    model.run()
    assert stat.count == kept
    assert kept == 24 or stat.value().equal(model.feeds["input"][mask != 0])


def test_several_statistics_and_observers_of_one_value() -> None:
    model = captured("mlp")
    (value,) = model.graph.inputs
    before, first, second, third = text(model), Keep(), AbsMax(), Keep()
    insert(model.graph, {value: [first, second]})
    insert(model.graph, {value: [third]})
    model.run()
    assert first.value().equal(third.value()) and second.value().equal(first.value().abs().amax(0))
    remove(model.graph)
    assert text(model) == before


def test_an_observer_hands_on_what_it_got() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    observer = Observe([stat := Keep()])
    assert observer(x) is x and not stat.value().requires_grad


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_is_observed_on_its_own_tokens(name: str) -> None:
    model = captured(name)
    before, env, wanted = text(model), model.env(), model.run()
    experts = [lin for lin in model.linears if lin.experts]
    kept = {lin: [Keep() for _ in range(4)] for lin in experts}
    added = [insert_experts(model.graph, lin, stats) for lin, stats in kept.items()]
    model.graph.fx.lint()
    assert len(added) == 4 and all(a.equal(b) for a, b in zip(wanted, model.run(), strict=True))
    remove(model.graph)
    assert text(model) == before
    for lin, stats in kept.items():
        rows, ends = env[lin.x], env[lin.offsets].tolist()
        assert [stat.count for stat in stats] == [b - a for a, b in pairwise([0, *ends])]
        assert torch.cat([stat.value() for stat in stats if stat.count]).equal(rows)
        # an expert's product is that of its tokens alone
        first = next(i for i, stat in enumerate(stats) if stat.count)
        found = stats[first].value() @ lin.read(model.graph)[first].T
        assert torch.allclose(found, env[lin.node][: len(found)], atol=1e-5)


def test_experts_of_a_3d_input_and_without_tokens() -> None:
    x, stats = torch.randn(3, 5, 4), [Keep(), Keep(), Keep()]
    assert ObserveExperts(stats)(x) is x and all(stat.value().equal(part) for stat, part in zip(stats, x, strict=True))
    idle = [Keep(), Keep(), Keep()]
    ObserveExperts(idle)(x[0], torch.tensor([2, 2, 5]))
    assert [stat.count for stat in idle] == [2, 0, 3] and idle[2].value().equal(x[0, 2:])


def test_a_value_from_before_is_observed_where_it_is_read() -> None:
    model = captured("block_stack")
    before, later = text(model), model.graph.segments()[2:]
    inside = [n for s in later for n in s.nodes]
    value = next(n for n in model.graph.segments()[1].leaves)
    elsewhere = model.graph.segments()[0].nodes[0]
    readers = [u for u in value.users if u in inside]
    (node,) = insert(
        model.graph, {value: [stat := Keep()], elsewhere: [Keep()]}, inside
    )  # nothing there reads that one
    model.graph.fx.lint()
    assert set(node.users) == set(readers) and any(node in s.nodes for s in model.graph.segments()[2:])
    model.run()
    remove(model.graph)
    assert text(model) == before and stat.value().equal(model.env()[value].flatten(0, 1))
