"""Wrong sites, planted on purpose: the checks that run after every fold find each one, undo it bit for bit, and say so.

Discovery is trusted nowhere: here it lies, about readers, channels, gains, rows, and about who else uses a parameter.
"""

import importlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qfx
from qfx.core.errors import PassError
from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.site import Gain, Reader, Site
from qfx.passes.discover import sites as discover_sites
from qfx.passes.discover._ports import norm_writers
from tests.zoo import ZOO, harden

Lie = Callable[[Graph, list[Linear], list[Site]], Site]
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SMOOTH = {"smoothquant": {"smooth_o": True, "smooth_down": True}}
SHIFT = {"outlier_suppression_plus": {"steps": 2, "value": True, "inner": True}}
whole = importlib.import_module("qfx.quantize")


def run(model: nn.Module, inputs: dict[str, Tensor], step: dict = SMOOTH, **more: bool) -> nn.Module:
    return qfx.quantize(model, {"schemes": {}, "steps": [step]}, calibration=[inputs], progress=False, **more)


def plant(monkeypatch: pytest.MonkeyPatch, lie: Lie, *, alone: bool = True) -> None:
    """Makes discovery lie about one site, and, if `alone`, keep all others to itself."""
    real = whole.find_sites

    def find(graph: Graph, linears: list[Linear], env: dict, **more: int) -> tuple:
        found, misses = real(graph, linears, env, **more)
        planted = lie(graph, linears, found)
        return ([planted] if alone else found), misses

    monkeypatch.setattr(whole, "find_sites", find)


def site_at(found: list[Site], writer: str) -> Site:
    (only,) = [s for s in found if s.writer.name == writer]
    return only


def without(writer: str, *left_out: str) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        kept = tuple(r for r in site.readers if r.linear.name not in left_out)
        assert len(kept) == len(site.readers) - len(left_out)
        site.readers = kept
        return site

    return lie


def rotated_heads(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, f"{ATTENTION}.v_proj")
    (reader,) = site.readers
    site.readers = (Reader(reader.linear, reader.index.roll(8)),)
    return site


def through_the_gate(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, f"{MLP}.up_proj")
    site.writer.linear = next(lin for lin in linears if lin.name == f"{MLP}.gate_proj")
    return site


def moved_rows(writer: str, by: int) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        site.writer.rows = site.writer.rows + by
        return site

    return lie


def plain_gain(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, "model.layers.0.input_layernorm")
    assert site.writer.gain.offset == 1
    site.writer.gain = Gain(site.writer.gain.param)
    return site


def forgotten_bias(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, "model.decoder.layers.0.final_layer_norm")
    site.writer.norm_bias = None
    return site


def invented(norm: str, *readers: str) -> Lie:
    """A site whose value somebody else takes as well: a residual, the caller."""

    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        assert not [s for s in found if s.writer.name == norm]
        (at,) = [p for p in norm_writers(graph) if p.writer.name == norm]
        channels = graph.attr(at.writer.gain.param).numel()
        read = tuple(Reader(lin, torch.arange(channels)) for lin in linears if lin.name in readers)
        assert len(read) == len(readers)
        return Site(norm, "norm", at.value, channels, at.writer, read, {"Diagonal"})

    return lie


def claims_shift(writer: str) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        assert "Shift" not in site.folds
        site.folds.add("Shift")
        return site

    return lie


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def undone(model: nn.Module) -> list[tuple[str, float]]:
    """Site and error of everything that was taken back."""
    found = [(m.where, re.search(r"undone: .* by ([\w.+-]+) \(at most", m.why)) for m in model.qfx.report.misses]
    return [(where, float(match[1])) for where, match in found if match]


def assert_as_before(got: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    before, now = dict(model.named_parameters()), dict(got.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())
    assert all(not now[name].any() for name in set(now) - set(before))  # biases that were made for the attempt
    assert torch.equal(outputs(got, inputs), outputs(model, inputs))
    assert not got.qfx.report.folds


PLANTED = {
    "a reader is left out": ("llama", without("model.layers.0.input_layernorm", f"{ATTENTION}.k_proj"), SMOOTH),
    "a parallel branch is left out": ("phi", without("model.layers.0.input_layernorm", f"{MLP}.fc1"), SMOOTH),
    "the router is left out": ("mixtral", without("model.layers.0.post_attention_layernorm", f"{MLP}.gate"), SMOOTH),
    "the heads of the value are rotated": ("llama", rotated_heads, SMOOTH),
    "the rows are the key's": ("gpt2", moved_rows("transformer.h.0.attn.c_attn", -64), SMOOTH),
    "the writer is the gate": ("llama", through_the_gate, SMOOTH),
    "the rows are the gate's": ("phi3", moved_rows(f"{MLP}.gate_up_proj", -96), SMOOTH),
    "the gain is not one plus": ("gemma", plain_gain, SMOOTH),
    "the norm's bias is forgotten": ("opt", forgotten_bias, SMOOTH),
    "a residual reads it too": ("norm_to_residual", invented("norm", "up"), SMOOTH),
    "a post-norm's residual reads it too": (
        "bert",
        invented("bert.encoder.layer.0.attention.output.LayerNorm", "bert.encoder.layer.0.intermediate.dense"),
        SMOOTH,
    ),
    "the caller reads it too": ("branching_output", invented("norm", "up"), SMOOTH),
    "a rectifier is said to pass shifts": ("opt", claims_shift("model.decoder.layers.0.fc1"), SHIFT),
    "sinks are said to pass shifts": ("gpt_oss", claims_shift(f"{ATTENTION}.v_proj"), SHIFT),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_site_is_undone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, lie, step = PLANTED[what]
    model, inputs = ZOO[name].load()
    plant(monkeypatch, lie)
    got = run(model, inputs, step)
    ((_, error),) = undone(got)
    assert error > 1e-4
    assert_as_before(got, model, inputs)


def test_only_the_wrong_site_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ZOO["llama"].load()
    norm = "model.layers.0.input_layernorm"
    plant(monkeypatch, without(norm, f"{ATTENTION}.k_proj"), alone=False)
    got = run(model, inputs)
    assert [where for where, _ in undone(got)] == [norm]
    assert len(got.qfx.report.folds) == 8
    want = outputs(model, inputs)
    assert (outputs(got, inputs) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_low_precision_model_is_checked_as_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ZOO["llama"].load()
    model = model.bfloat16()
    plant(monkeypatch, rotated_heads)
    got = run(model, inputs)
    ((_, error),) = undone(got)
    assert error > 1e-4
    assert_as_before(got, model, inputs)


def test_a_massive_token_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ZOO["llama"].load()
    norm, token = "model.layers.0.input_layernorm", inputs["input_ids"][0, 0]
    model.model.embed_tokens.weight.data[token] *= 1e5
    plant(monkeypatch, without(norm, f"{ATTENTION}.k_proj"), alone=False)
    got = run(model, inputs)
    assert [where for where, _ in undone(got)] == [norm]
    assert len(got.qfx.report.folds) == 8


class Logits(nn.Module):
    """An encoder-decoder that keeps the encoder's value to itself, so that it is the decoder's alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(input_features=input_features, decoder_input_ids=decoder_input_ids).logits


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_reader_in_another_block_is_missed(left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper, inputs = ZOO["whisper"].load()
    model, norm = Logits(whisper), "model.model.encoder.layer_norm"
    cross = [f"model.model.decoder.layers.{i}.encoder_attn.{p}_proj" for i in (0, 1) for p in "kv"]
    (fold,) = [f for f in run(model, inputs).qfx.report.folds if f.writers == [norm]]
    assert fold.readers == cross
    plant(monkeypatch, without(norm, cross[2 * left_out + 1]))
    got = run(model, inputs)
    ((where, error),) = undone(got)
    assert (where, error > 1e-4) == (norm, True)
    assert_as_before(got, model, inputs)


def tied(one: str, other: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = ZOO["llama"].load()
    model.get_submodule(other).weight = model.get_submodule(one).weight
    return model, inputs


def test_a_weight_tied_within_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tied(f"{ATTENTION}.q_proj", "model.layers.1.self_attn.q_proj")
    assert "is also used by" in str([m.why for m in run(model, inputs).qfx.report.misses])
    model, inputs = tied(f"{MLP}.gate_proj", f"{MLP}.up_proj")
    monkeypatch.setattr(discover_sites, "other_uses", lambda *_: [])
    plant(monkeypatch, lambda graph, linears, found: site_at(found, "model.layers.0.post_attention_layernorm"))
    got = run(model, inputs)
    assert undone(got)
    assert_as_before(got, model, inputs)


def test_a_weight_tied_across_blocks_is_noticed_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tied(f"{ATTENTION}.q_proj", "model.layers.1.self_attn.q_proj")
    monkeypatch.setattr(discover_sites, "other_uses", lambda *_: [])
    got = run(model, inputs)
    assert len(undone(got)) == 9
    assert any("together" in m.why for m in got.qfx.report.misses)
    assert_as_before(got, model, inputs)


class Remembers(nn.Module):
    """Computes with a copy of a weight, except while it is captured: no graph shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        harden(self, torch.Generator().manual_seed(0))
        self.copied = self.up.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight if torch.compiler.is_exporting() else self.copied
        return x + self.down(F.relu(F.linear(self.norm(x), weight, self.up.bias)))


@pytest.mark.parametrize("step", [SMOOTH, SHIFT])
def test_what_no_graph_shows_is_noticed_in_the_whole(step: dict) -> None:
    model, inputs = Remembers().eval(), ZOO["shared_block"].load()[1]
    got = run(model, inputs, step)
    assert {where for where, _ in undone(got)} == {"norm", "up"}
    assert all("together" in m.why for m in got.qfx.report.misses)
    assert_as_before(got, model, inputs)


def test_a_model_that_was_changed_in_place_is_not_returned() -> None:
    model, inputs = Remembers().eval(), ZOO["shared_block"].load()[1]
    with pytest.raises(PassError, match="changed in place and is not usable any more"):
        run(model, inputs, inplace=True)
