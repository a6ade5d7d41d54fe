"""The canonical form of a capture: functional, the same at every run, open where batches differ, nothing left out."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.core.errors import CaptureError
from qfx.passes.discover import capture as module
from qfx.passes.discover._functional import functionalize, writes_in_place
from qfx.passes.discover.capture import capture, fixed_size
from qfx.passes.discover.linears import find_linears
from tests.zoo import ZOO

aten = torch.ops.aten


class Written(nn.Module):
    """A layer around a function that writes in place."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(8, 8), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


def in_a_chain(y: Tensor) -> Tensor:
    return y.add_(1).mul_(2).clamp_(max=1.5) + y


def by_parts(y: Tensor) -> Tensor:
    whole = y.new_empty(y.shape[0], 12)
    whole[:, :8] = y
    whole[:, 8:] = y[:, :4] * 2
    return whole.sigmoid()


def a_row(y: Tensor) -> Tensor:
    whole = torch.empty_like(y)
    whole.copy_(y)
    whole[:, 3].mul_(5)
    return whole


def part_of_a_tuple(y: Tensor) -> Tensor:
    values, at = y.topk(2)
    values /= values.sum(-1, keepdim=True)
    return y.scatter_(1, at, values)


def through_an_older_view(y: Tensor) -> Tensor:
    other = y.view(-1)
    y.mul_(3)
    return other * y.flatten()


def of_another_dtype(y: Tensor) -> Tensor:
    return y.gt_(0) + 0.5


FEED = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("change", [in_a_chain, by_parts, a_row, part_of_a_tuple])
def test_writes_in_place_become_values(change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Written(change)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)  # not needed
    assert_functional(model)


@pytest.mark.parametrize("change", [through_an_older_view, of_another_dtype])
def test_what_is_not_simple_is_left_to_torch(change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Written(change), []
    real = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", lambda *a: seen.append(a) or real(*a))
    assert_functional(model)
    assert len(seen) == 1


def assert_functional(model: nn.Module) -> None:
    with torch.no_grad():
        graph = capture(model, FEED)
        assert not writes_in_place(graph.fx)
        assert torch.equal(graph.run(FEED), model(**FEED))
        env: dict = {}
        graph.execute(graph.nodes, env, feeds=FEED)
        again = {n: graph.value(n, env, FEED) for n in env}
    assert all(not isinstance(v, Tensor) or torch.equal(v, env[n]) for n, v in again.items())


def test_a_graph_that_keeps_a_write_is_called_so() -> None:
    traced = fx.symbolic_trace(lambda x: torch.relu(x))
    assert functionalize(traced.graph)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.add_.Tensor, (x, 1)))  # an input of the model is written
    assert writes_in_place(graph)
    assert not functionalize(graph)


def test_nothing_is_uninitialised() -> None:
    with torch.no_grad():
        graph = capture(Written(by_parts), FEED)
    assert not [n for n in graph.nodes if "empty" in str(n.target)]


def test_token_sizes_vary_and_image_sizes_do_not() -> None:
    expected = {"llama": [[None, None]], "vit": [[None, 3, 32, 32]], "mlp": [[None, None, 64]]}
    for name, shapes in expected.items():
        model, inputs = ZOO[name].load()
        with torch.no_grad():
            graph = capture(model, inputs)
        assert [[fixed_size(s) for s in n.meta["val"].shape] for n in graph.inputs] == shapes


class Idle(nn.Module):
    """More weights than it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 1)
        self.table, self.filters = nn.Embedding(8, 8), nn.Conv1d(8, 8, 3)
        self.raw, self.token = nn.Parameter(torch.ones(3, 8)), nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_weights_that_the_call_does_not_use_are_named() -> None:
    with torch.no_grad():
        linears, misses = find_linears(capture(Idle(), FEED))
    assert [lin.name for lin in linears] == ["used"]
    assert {m.where: m.why for m in misses} == dict.fromkeys(
        ["raw", "idle.weight"], "the captured call does not run it"
    )


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_does_not_export_says_where() -> None:
    with pytest.raises(
        CaptureError, match=r"capture: Branching does not export .* at .*test_capture\.py:\d+ in forward"
    ):
        capture(Branching(), FEED)


def test_a_setting_that_the_capture_needs_is_put_back() -> None:
    model, inputs = ZOO["llama"].load()
    model.config.use_cache = True
    with torch.no_grad(), warnings.catch_warnings():
        module.capture(model, inputs)
    assert model.config.use_cache is True
