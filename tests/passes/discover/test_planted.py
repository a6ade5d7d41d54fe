"""Wrong sites, planted on purpose: the checks that run after every fold find each one, undo it bit for bit, and say so.

Discovery is trusted nowhere: here it lies, about readers, channels, gains, rows, and about who else uses a parameter.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.errors import PassError
from qfx.passes.discover import sites as discover_sites
from qfx.passes.transform import _driver
from tests.passes.discover.lies import (
    ATTENTION,
    MLP,
    SHIFT,
    SMOOTH,
    assert_as_before,
    claims_shift,
    forgotten_bias,
    invented,
    moved_rows,
    outputs,
    plain_gain,
    plant,
    rotated_heads,
    run,
    site_at,
    through_the_gate,
    undone,
    without,
)
from tests.zoo import ZOO, harden

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


def test_rounding_does_not_cover_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the whole model can tell, the change is measured against what low precision alone changes."""
    model, inputs = ZOO["gemma2"].load()
    model = model.bfloat16()
    assert not undone(run(model, inputs))
    monkeypatch.setattr(_driver, "difference", lambda *_: 0.0)
    plant(monkeypatch, without("model.layers.0.input_layernorm", f"{ATTENTION}.q_proj"))
    got = run(model, inputs)
    ((_, error),) = undone(got)
    assert 1e-3 < error < 0.1
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
