"""Which linears are found to read one value, and why others that look like it are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear
from qfx.passes.discover.capture import capture
from qfx.passes.lower.merge import find_calls, find_groups
from tests.kernels.law import make_case

WIDE = 32


def linear(scheme: str = "W8A8", out: int = WIDE, bias: bool = True) -> QLinear:
    case = make_case((5,), WIDE, out, scheme)
    inputs = {"input_scale": 0.02 if case.static[0] is not None else None}
    return QLinear.from_qtensor(case.weight, case.bias if bias else None, case.scheme, dtype=torch.float32, **inputs)


class Model(nn.Module):
    """Some linears, and a forward that says who reads what."""

    def __init__(self, call: Callable[["Model", Tensor], Tensor], **linears: QLinear) -> None:
        super().__init__()
        self.call = call
        for name, module in linears.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def found(call: Callable[[Model, Tensor], Tensor], **linears: QLinear) -> tuple[list[list[str]], dict[str, str]]:
    graph = capture(Model(call, **linears).eval(), {"x": torch.randn(2, 3, WIDE)})
    groups, misses = find_groups(graph)
    assert all(m.step == "merge" and m.weights for m in misses)
    return groups, {m.where: m.why for m in misses}


def test_readers_of_one_value_in_the_order_of_their_calls() -> None:
    call = lambda m, x: m.b(x) + m.a(x) + m.c(m.b.bias + x)  # noqa: E731
    assert found(call, a=linear(), b=linear(), c=linear()) == ([["b", "a"]], {})


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.a(x) + m.b(x + 0.5),
        lambda m, x: m.a(x) + m.b(x.clone().mul_(2)),
        lambda m, x: m.a(x) + m.b(m.a(x)),
        lambda m, x: m.a(x) + m.b(x) + m.a(x.tanh()) + m.b(x.sin()),
        lambda m, x: m.a(x) + m.b(x) + m.a(x.tanh()),
        lambda m, x: m.a(x[:, :2]).sum() + m.b(x),
    ],
    ids=["another value", "written in between", "one behind the other", "once", "not each time", "a part"],
)
def test_what_reads_different_values_is_not_merged(call: Callable[[Model, Tensor], Tensor]) -> None:
    assert found(call, a=linear(), b=linear()) == ([], {})


def test_a_write_between_the_calls_is_seen() -> None:
    def call(m: Model, x: Tensor) -> Tensor:
        y = x * 2
        first = m.a(y)
        y.add_(1)
        return first + m.b(y)

    assert found(call, a=linear(), b=linear()) == ([], {})


def test_modules_that_are_called_twice_read_the_same_each_time() -> None:
    call = lambda m, x: m.a(x) + m.b(x) + (m.a(x.tanh()) + m.b(x.tanh()) if False else 0)  # noqa: E731

    def twice(m: Model, x: Tensor) -> Tensor:
        for _ in range(2):
            x = m.a(x) + m.b(x)
        return x

    assert found(call, a=linear(), b=linear())[0] == [["a", "b"]] == found(twice, a=linear(), b=linear())[0]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (linear("W8A8_TENSOR"), "another scheme"),
        (linear("W4A8_G16"), "another scheme"),
        (linear(bias=False), "another form: only one has a bias"),
    ],
)
def test_another_form_is_a_miss_with_its_reason(other: QLinear, why: str) -> None:
    call = lambda m, x: m.a(x) + m.b(x) + m.c(x)  # noqa: E731
    groups, misses = found(call, a=linear(), b=other, c=linear())
    assert groups == [["a", "c"]] and misses == {"b": f"reads what a reads, but has {why}"}


def test_two_kinds_of_readers_are_two_groups() -> None:
    call = lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x)  # noqa: E731
    linears = {"a": linear(), "b": linear(bias=False), "c": linear(), "d": linear(bias=False)}
    assert found(call, **linears)[0] == [["a", "c"], ["b", "d"]]


def test_another_static_scale_is_a_miss() -> None:
    a, b = linear("W8A8_STATIC"), linear("W8A8_STATIC")
    assert found(lambda m, x: m.a(x) + m.b(x), a=a, b=b)[0] == [["a", "b"]]
    b.input_scale.mul_(2)
    assert found(lambda m, x: m.a(x) + m.b(x), a=a, b=b)[1] == {"b": "reads what a reads, but has another input scale"}


def test_others_between_the_calls_are_a_miss() -> None:
    call = lambda m, x: m.a(x) + m.c(m.b(x).tanh()) + m.d(x)  # noqa: E731
    groups, misses = found(call, a=linear(), b=linear(), c=linear(), d=linear())
    assert groups == [["a", "b"]]
    assert misses == {"d": "reads what a reads, but others are called between them"}


def test_calls_are_listed() -> None:
    shared = linear()
    graph = capture(Model(lambda m, x: m.a(m.b(m.a(x))), a=shared, b=linear()), {"x": torch.randn(2, 3, WIDE)})
    calls = find_calls(graph)
    assert {name: c.positions for name, c in calls.items()} == {"a": [0, 2], "b": [1]}
    assert calls["a"].module is shared and parse_scheme("W8A8") == shared.scheme
