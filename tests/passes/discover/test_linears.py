"""Linears: whichever op computes a product, its view has the right axes; what has no view is a miss, not silence."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.graph import Env
from qfx.core.linear import Linear
from qfx.core.report import Miss
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from tests.zoo.captured import Captured, captured
from tests.zoo.layers import layers

MODELS = (
    "llama",
    "gpt2",
    "falcon",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "bert",
    "siglip_vision",
    "einsum",
    "conv_stem",
)
X, XE = torch.randn(2, 5, 6), torch.randn(3, 5, 6)
"""Tokens, and tokens of three experts; weights have 6 inputs and 4 outputs."""


class Product(nn.Module):
    """A parameter, a bias, and a forward that a test brings."""

    def __init__(self, shape: tuple[int, ...], forward: Callable, bias: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        self.w, self.b, self.inner = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(bias)), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.w, self.b)


def find(module: nn.Module, x: Tensor) -> tuple[Captured, list[Miss]]:
    graph = capture(module.eval(), {"x": x})
    found, misses = find_linears(graph)
    return Captured(graph, {"x": x}, found, torch.float32), misses


def product(linear: Linear, model: Captured, env: Env) -> Tensor:
    """What a linear's node must give, from its canonical weight and its input alone; without a bias."""
    x, w = env[linear.x], linear.read(model.graph).to(env[linear.x].dtype)
    if linear.offsets is not None:
        parts = zip(x.tensor_split(env[linear.offsets][:-1].tolist()), w, strict=True)
        return torch.cat([tokens @ expert.T for tokens, expert in parts])
    return x @ w.mT


def check(linear: Linear, model: Captured, env: Env) -> None:
    graph, found, value = model.graph, product(linear, model, env), env[linear.node]
    if linear.y is linear.node and linear.bias is not None:
        found = found + graph.attr(linear.bias)
    elif linear.y is not linear.node:
        assert torch.allclose(env[linear.y], value + graph.attr(linear.bias), atol=1e-5)
    if value.shape != found.shape:  # an einsum may put its heads elsewhere
        found = found.unflatten(-1, (4, 8)).transpose(1, 2)
    assert found.shape == value.shape and torch.allclose(found, value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_canonical_weights_reproduce_every_product(name: str) -> None:
    model = captured(name)
    env, place = model.env(), {n: i for i, n in enumerate(model.graph.nodes)}
    assert [place[lin.node] for lin in model.linears] == sorted(place[lin.node] for lin in model.linears)
    for linear in model.linears:
        check(linear, model, env)
        assert linear.shape(model.graph) == list(linear.read(model.graph).shape)
        assert linear.experts == (linear.read(model.graph).dim() == 3) == bool(linear.axes[0])
        assert linear.name == linear.weight.removesuffix(".weight") and linear.node in linear.x.users


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_a_linear_or_a_miss(name: str) -> None:
    model = captured(name)
    found, misses = find_linears(model.graph)
    covered = {lin.name for lin in found} | {m.where.removesuffix(".weight") for m in misses}
    assert all(names & covered for names in layers(model.module))
    assert all(m.why for m in misses) and not {lin.name for lin in found} & {m.where for m in misses}


@pytest.mark.parametrize("name", MODELS)
def test_writing_what_was_read_changes_nothing(name: str) -> None:
    model = captured(name)
    start = model.snapshot()
    for linear in model.linears:
        before = model.graph.attr(linear.weight)
        linear.write(model.graph, linear.read(model.graph).clone())
        assert model.graph.attr(linear.weight) is before
    assert model.snapshot() == start
    for linear in model.linears:
        new = torch.randn(linear.shape(model.graph))
        linear.write(model.graph, new)
        assert linear.read(model.graph).equal(new)


OPS = {  # the parameter's shape, the forward, the axes, whether the bias is the op's own, its input
    "linear": ((4, 6), lambda x, w, b: F.linear(x, w, b), ((), (0,), (1,)), True, X),
    "linear_of_transposed": ((6, 4), lambda x, w, b: F.linear(x, w.T, b), ((), (1,), (0,)), True, X),
    "matmul": ((6, 4), lambda x, w, b: x @ w + b, ((), (1,), (0,)), False, X),
    "bias_first": ((6, 4), lambda x, w, b: b + x @ w, ((), (1,), (0,)), False, X),
    "matmul_of_transposed": ((4, 6), lambda x, w, b: x @ w.t() + b, ((), (0,), (1,)), False, X),
    "matmul_of_permuted": ((4, 6), lambda x, w, b: x @ w.permute(1, 0) + b, ((), (0,), (1,)), False, X),
    "mm": ((6, 4), lambda x, w, b: x.flatten(0, 1).mm(w) + b, ((), (1,), (0,)), False, X),
    "addmm": ((6, 4), lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), ((), (1,), (0,)), True, X),
    "bmm": ((3, 6, 4), lambda x, w, b: x.bmm(w) + b, ((0,), (2,), (1,)), False, XE),
    "bmm_of_transposed": ((3, 4, 6), lambda x, w, b: x.bmm(w.mT) + b, ((0,), (1,), (2,)), False, XE),
    "bmm_of_permuted": ((6, 3, 4), lambda x, w, b: x @ w.permute(1, 0, 2) + b, ((1,), (2,), (0,)), False, XE),
    "einsum": ((4, 6), lambda x, w, b: torch.einsum("bti,oi->bto", x, w) + b, ((), (0,), (1,)), False, X),
    "einsum_weight_first": ((6, 4), lambda x, w, b: torch.einsum("io,bti->bto", w, x) + b, ((), (1,), (0,)), False, X),
    "einsum_experts": (
        (4, 3, 6),
        lambda x, w, b: torch.einsum("eti,oei->eto", x, w) + b,
        ((1,), (0,), (2,)),
        False,
        XE,
    ),
    "cast": ((6, 4), lambda x, w, b: x.double() @ w.double() + b.double(), ((), (1,), (0,)), False, X),
}


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_found_with_its_axes(name: str) -> None:
    shape, forward, axes, own, x = OPS[name]
    model, misses = find(Product(shape, forward), x)
    (linear,) = model.linears
    assert (linear.weight, linear.axes, linear.bias) == ("w", axes, "b") and not misses
    assert (linear.y is linear.node) == own and not linear.foreign_bias
    check(linear, model, model.env())


@pytest.mark.parametrize(
    ("forward", "bias", "foreign"),
    [
        (lambda x, w, b: F.linear(x, w, 2 * b), (4,), True),
        (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.T), (10, 4), True),
        (lambda x, w, b: F.linear(x, w) + b, (5, 4), False),  # an add of its own, which is no bias
        (lambda x, w, b: F.linear(x, w) + 2 * b, (4,), False),
        (lambda x, w, b: torch.add(F.linear(x, w), b, alpha=2), (4,), False),
        (lambda x, w, b: F.linear(x, w).relu() + b, (4,), False),
    ],
)
def test_what_is_no_plain_bias_is_not_taken_for_one(forward: Callable, bias: tuple[int, ...], foreign: bool) -> None:
    model, _ = find(Product((4, 6), forward, bias), X)
    (linear,) = model.linears
    assert linear.bias is None and linear.foreign_bias == foreign and linear.y is linear.node


def test_a_product_with_two_readers_keeps_its_bias_apart() -> None:
    model, _ = find(Product((4, 6), lambda x, w, b: (y := F.linear(x, w)) * (y + b)), X)
    assert model.linears[0].bias is None  # to scale the bias with the rows would miss one of them


def test_biases_of_experts_belong_to_no_linear() -> None:
    model = captured("gpt_oss")
    experts = [lin for lin in model.linears if lin.experts]
    assert len(experts) == 4 and all(lin.bias is None for lin in experts)
    bmm, _ = find(Product((3, 6, 4), lambda x, w, b: torch.baddbmm(b, x, w), (3, 1, 4)), XE)
    assert bmm.linears[0].foreign_bias and bmm.linears[0].bias is None


def test_names_of_known_layers() -> None:
    falcon, gpt2 = captured("falcon").linears[0], captured("gpt2").linears[0]
    biased, name = captured("falcon_rw"), "transformer.h.0.self_attention.query_key_value"
    assert (falcon.name, falcon.bias) == (name, None)
    assert (biased.linears[0].name, biased.linears[0].bias) == (name, f"{name}.bias")
    check(biased.linears[0], biased, biased.env())
    assert (gpt2.name, gpt2.bias, gpt2.axes) == (
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_attn.bias",
        ((), (1,), (0,)),
    )
    assert captured("einsum").linears[0].axes == ((), (0, 1), (2,))


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Region(Idle):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x) @ self.idle.weight + self.table.weight[0]


def gather(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(x, w[x.flatten(1).argmax(1) % 3].mT)


MISSES: list[tuple[nn.Module, Tensor, dict[str, str]]] = [
    (Idle(), X, {"idle.weight": "the captured call does not run it"}),
    (Region(), X, {"layer.weight": "inside wrap_with_autocast", "idle.weight": "inside wrap_with_autocast"}),
    (Product((8, 6), lambda x, w, b: F.linear(x, w[:4])), X, {"w": "linear takes a computed part of it"}),
    (Product((3, 4, 6), gather), XE, {"w": "bmm takes a computed part of it"}),
    (
        Product((4, 6), lambda x, w, b: torch.einsum("bti,oi->bto", x, 2 * w)),
        X,
        {"w": "einsum .* a computed part of it"},
    ),
    (
        Product((6, 4), lambda x, w, b: torch.einsum("bit,io->bot", x.mT, w)),
        X,
        {"w": "does not contract the last axis"},
    ),
    (Product((6,), lambda x, w, b: x @ w), X, {"w": "takes the parameter in 1 dimensions"}),
]


@pytest.mark.parametrize(("module", "x", "wanted"), MISSES)
def test_what_no_view_covers_is_a_miss(module: nn.Module, x: Tensor, wanted: dict[str, str]) -> None:
    model, misses = find(module, x)
    assert {m.where for m in misses} == set(wanted)
    assert all(re.search(wanted[miss.where], miss.why) for miss in misses)
    assert not {lin.weight for lin in model.linears} & set(wanted)


def test_a_split_projection_is_a_miss() -> None:
    found, misses = find_linears(captured("siglip_vision").graph)
    assert {m.where for m in misses} == {"head.attention.in_proj_weight"}  # its query is not its keys' input
    assert "head.attention.out_proj" in {lin.name for lin in found}


def test_values_of_parameters_alone_are_no_activations() -> None:
    model, misses = find(Product((6, 6), lambda x, w, b: x + (w @ w).sum()), X)
    assert not model.linears and not misses
