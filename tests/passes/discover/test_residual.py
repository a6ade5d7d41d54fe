"""Rotations of the whole residual stream: the function stays, undo is exact, and what cannot be rotated says why."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qfx.core.maps import Permute, Rotate, random_rotation
from qfx.core.report import Miss
from qfx.core.spec import parse_scheme
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import make_plan, untie
from qfx.passes.discover.residual import Residual, find_residual, rotate
from tests.zoo.captured import Captured, captured, distance

# name: writers and readers, counted by hand
ROTATED = {
    "llama": (4, 11),  # o and down; q, k, v, gate, up; the head
    "qwen3": (4, 11),
    "mixtral": (4, 11),  # the experts' down; the experts' gate and up in one, and the router
    "deepseek_v3": (5, 11),  # a shared expert too, in one of two layers; q_a, kv_a
    "granite": (4, 11),
    "phi3": (4, 5),  # q, k, v in one, and gate, up
}
every_model = pytest.mark.parametrize("name", ROTATED)


def rotation(n: int = 64, seed: int = 0) -> Rotate:
    return random_rotation(n, torch.Generator().manual_seed(seed))


def residual_of(model: Captured) -> Residual:
    found = find_residual(model.graph, model.linears, model.env())
    assert isinstance(found, Residual)
    return found


@every_model
def test_the_stream_has_all_its_writers_and_readers(name: str) -> None:
    site = residual_of(captured(name))
    assert (len(site.writers), len(site.readers)) == ROTATED[name]
    assert site.channels == 64 and site.tables == ["model.embed_tokens.weight"]
    assert all(gain is not None for _, gain in site.readers)  # each reads through a norm


@every_model
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_rotation_keeps_the_function_and_can_be_undone(name: str, dtype: torch.dtype, bound: float) -> None:
    model = captured(name, dtype)
    site, wanted, start = residual_of(model), model.run(), model.snapshot()
    undo = rotate(model.graph, site, rotation())
    assert 0 < distance(wanted, model.run()) < bound
    assert distance(wanted, model.call()) < bound
    changed = {k for k, v in model.state().items() if not v.equal(captured(name, dtype).state()[k])}
    ports = [lin.weight for lin in site.writers] + [lin.weight for lin, _ in site.readers]
    assert changed == {*ports, *site.tables, *(gain.param for _, gain in site.readers if gain)}
    undo()
    assert model.snapshot() == start


def test_the_stream_is_rotated_and_the_rest_is_not() -> None:
    model = captured("llama", torch.float64)
    site, before, change = residual_of(model), model.env(), rotation()
    rotate(model.graph, site, change)
    after = model.env()
    on_stream = [n for n in site.carried if isinstance(before[n], Tensor) and before[n].shape[-1:] == (64,)]
    assert len(on_stream) >= 9  # the embeddings, two sums a layer, and each norm's value
    for node in on_stream:
        assert distance([change(before[node])], [after[node]]) < 1e-9
    for linear in model.linears:
        if linear not in site.writers:
            assert distance([before[linear.node]], [after[linear.node]]) < 1e-9
    assert all(model.graph.attr(gain.param).eq(1).all() for _, gain in site.readers if gain)


def test_weights_are_rounded_once() -> None:
    model, change = captured("llama"), rotation()
    site, old = residual_of(model), {k: v.double() for k, v in model.state().items()}
    rotate(model.graph, site, change)
    for writer in site.writers:
        assert writer.read(model.graph).equal(change.write(old[writer.weight]).float())
    for reader, gain in site.readers:
        assert reader.read(model.graph).equal(change.read(old[reader.weight] * old[gain.param]).float())
    assert model.graph.attr(site.tables[0]).equal(change(old[site.tables[0]]).float())


def test_any_orthogonal_map_and_several_in_a_row() -> None:
    model = captured("llama", torch.float64)
    site, wanted, start = residual_of(model), model.run(), model.snapshot()
    order = torch.randperm(64)
    maps = [rotation(seed=1), Rotate(torch.eye(64, dtype=torch.float64)[:, order]), rotation(seed=2).inverse()]
    undo = [rotate(model.graph, site, change) for change in maps]
    assert distance(wanted, model.run()) < 1e-9
    x = torch.randn(3, 64, dtype=torch.float64)
    assert maps[1](x).equal(Permute(order)(x))
    for back in reversed(undo):
        back()
    assert model.snapshot() == start


def test_a_gain_of_one_plus_w_behind_a_head_of_its_own() -> None:
    model = captured("gemma", torch.float64)
    plan = make_plan(model.graph, model.linears, {"@head": parse_scheme("W8A16")})
    untie(model.graph, model.linears, plan)
    site, wanted = residual_of(model), model.run()
    assert {(gain.slope, gain.offset) for _, gain in site.readers if gain} == {(1, 1)}
    rotate(model.graph, site, rotation())
    assert distance(wanted, model.run()) < 1e-9
    assert not model.graph.attr("model.norm.weight").any()  # 1 + 0


def broken(site: Residual) -> dict[str, Residual]:
    """Residuals of which something was left out."""
    (linear, gain), *others = site.readers
    cases = {
        "every gain": replace(site, readers=[(lin, None) for lin, _ in site.readers]),
        "one gain": replace(site, readers=[*others, (linear, None)]),
        "a reader": replace(site, readers=others),
        "the embeddings": replace(site, tables=[]),
    }
    for i, writer in enumerate(site.writers):
        cases[f"writer {writer.name}"] = replace(site, writers=site.writers[:i] + site.writers[i + 1 :])
    assert gain is not None
    return cases


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_rotation_that_forgets_something_changes_the_function(name: str) -> None:
    model = captured(name, torch.float64)
    site, wanted, start = residual_of(model), model.run(), model.snapshot()
    for what, wrong in broken(site).items():
        undo = rotate(model.graph, wrong, rotation())
        assert distance(wanted, model.run()) > 1e-4, what
        undo()
        assert model.snapshot() == start
    slanted = Rotate(rotation().matrix + 0.1 * torch.eye(64, dtype=torch.float64))  # not orthogonal
    rotate(model.graph, site, slanted)
    assert distance(wanted, model.run()) > 1e-4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "LayerNorm subtracts the mean, which a rotation does not keep; the stream must be centred first"),
        ("bert", "LayerNorm subtracts the mean, which a rotation does not keep; the stream must be centred first"),
        (
            "olmo2",
            "the gain model.layers.0.post_attention_layernorm.weight cannot be folded: add_8 adds it to the stream",
        ),
        ("llama_tied", "lm_head.weight is also used by model.embed_tokens"),
        ("gemma", "lm_head.weight is also used by model.embed_tokens"),
        ("gpt_oss", "adds something to the stream that no linear wrote"),  # experts' biases, a row for each
        ("swiglu", "no embedding begins the stream"),
    ],
)
def test_why_a_stream_cannot_be_rotated(name: str, why: str) -> None:
    model = captured(name)
    found = find_residual(model.graph, model.linears, model.env())
    assert isinstance(found, Miss) and not found and found.where == "residual"
    assert why in found.why


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Stream(nn.Module):
    """A stream with one block and one norm; `kind` says what is odd about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.norm = kind, nn.Embedding(32, 16), Norm()
        self.up, self.down, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def block(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        h = self.norm(h) if self.kind == "norm inside" else h
        h = h * self.norm.weight.sum() if self.kind == "gain inside" else h
        h = h + self.down.bias if self.kind == "bias inside" else h
        return nn.functional.linear(h, self.down.weight, 2 * self.down.bias) if self.kind == "bias" else self.down(h)

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.embed(ids)
        x = x.clamp(-1, 1) if self.kind == "clamped" else x
        x = x + torch.linspace(0, 1, 16) if self.kind == "positions" else x
        x = x + self.block(self.norm(x))
        x = x + self.block(self.norm(x)) if self.kind == "twice" else x
        logits = self.head(x if self.kind == "bare" else self.norm(x))
        logits = logits + self.embed.weight.sum() if self.kind == "table" else logits
        return (logits, x) if self.kind == "returned" else logits


def stream(kind: str) -> Captured:
    feeds = {"ids": torch.arange(24).view(2, 12)}
    graph = capture(Stream(kind).eval().double(), feeds)
    return Captured(graph, feeds, find_linears(graph)[0], torch.float64)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("clamped", "clamp does not commute with a rotation"),
        ("positions", "adds something to the stream that no linear wrote"),
        ("returned", "the stream itself is an output of the model"),
        ("twice", "up.weight is also used by up"),
        ("table", "embed.weight is also used by sum"),
        ("norm inside", "the gain norm.weight cannot be folded: it is also used off the stream"),
        ("gain inside", "the gain norm.weight cannot be folded: it is also used off the stream"),
        ("bias inside", "down.bias is also used by add"),
        ("bias", "the bias of down is not a parameter of one axis"),
    ],
)
def test_odd_streams_are_refused(kind: str, why: str) -> None:
    model = stream(kind)
    found = find_residual(model.graph, model.linears, model.env())
    assert isinstance(found, Miss) and why in found.why


@pytest.mark.parametrize("kind", ["plain", "bare"])
def test_writers_have_biases_and_readers_need_no_norm(kind: str) -> None:
    model = stream(kind)
    site, wanted = residual_of(model), model.run()
    assert [gain is None for _, gain in site.readers] == [False, kind == "bare"]
    rotate(model.graph, site, rotation(16))
    assert distance(wanted, model.run()) < 1e-9
