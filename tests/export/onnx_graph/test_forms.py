"""What of a model is exported, and that a cache which no file holds is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.core.errors import CaptureError, PackageError
from qfx.export.onnx_graph import forms, graphs
from qfx.export.onnx_graph.forms import Form, forms_of
from qfx.export.onnx_graph.write import OnnxExport
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "minicpm3"])
@torch.no_grad()
def test_the_cache_of_a_form_holds_every_token(name: str) -> None:
    """Also where layers have a window, which is in the mask; two runs give what one gives."""
    model, example = ZOO[name].load()
    ids = example["input_ids"]
    assert ids.shape[1] > 6  # the window
    form = forms_of(model, {"input_ids": ids}, None)[0]
    assert len(form.cache) == 2 and not form.note
    run, past, logits = form.wrap(model), [t[:, :, :0] for t in list(form.inputs.values())[3:]], []
    for part in (slice(0, 7), slice(7, None)):
        positions = torch.arange(ids.shape[1])[part].expand(len(ids), -1)
        mask = torch.ones_like(ids[:, : part.stop])
        out, *past = run(ids[:, part], mask, positions, *past)
        logits.append(out)
    assert all(t.shape[2] == ids.shape[1] for t in past)
    want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-4)


def test_another_cache_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("a cache of its own\nand more")

    for name, reason in {
        "lfm2": "its cache holds LinearAttentionLayer",
        "llama": "ValueError: a cache of its own",
    }.items():
        model, example = ZOO[name].load()
        if name == "llama":
            monkeypatch.setattr(forms, "_cache_layers", fails)
        with torch.no_grad():
            form = forms_of(model, example, None)[0]
            assert not form.cache and "model.onnx has no cache" in form.note and reason in form.note
            assert "\n" not in form.note and not forms_of(model, example, False)[0].note
            with pytest.raises(PackageError, match=f"{reason}.*; pass cache=False"):
                forms_of(model, example, True)


@pytest.mark.parametrize("cache", [None, True])
def test_a_cache_that_does_not_export_is_left_out_unless_it_was_asked_for(
    cache: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = ZOO["llama"].load()
    tried: list[Form] = []

    def fails(model: nn.Module, form: Form, *_: Any) -> None:
        tried.append(form)
        if form.cache:
            raise CaptureError("it branches on values")

    monkeypatch.setattr(graphs, "capture", fails)
    monkeypatch.setattr(graphs, "write_captured", lambda *_: None)
    done = OnnxExport(Path(), "ort-cpu", "float32", 21)
    with torch.no_grad():
        form = forms_of(model, example, cache)[0]
        if cache:
            with pytest.raises(CaptureError, match="branches on values"):
                graphs.write(Path(), model, form, {}, done, (), True)
            return
        _, taken = graphs.write(Path(), model, form, {}, done, (), True)
    assert [bool(f.cache) for f in tried] == [True, False] and taken is tried[1]
    assert "has no cache" in done.notes[0] and done.notes[0].endswith("it branches on values")


def test_a_decoder_takes_a_mask_and_positions() -> None:
    for name, inputs in {"gpt2": ["attention_mask", "position_ids"], "bloom": ["attention_mask"]}.items():
        model, example = ZOO[name].load()
        for cache in (None, False):
            with torch.no_grad():
                got = list(forms_of(model, example, cache)[0].inputs)
            assert [k for k in got if "past" not in k] == ["input_ids", *inputs]


def chained(model: nn.Module, found: list[Form]) -> Tensor:
    """The decoder's output on the encoder's."""
    encoder, decoder = found
    (states,) = encoder.wrap(model)(*encoder.inputs.values())
    return decoder.wrap(model)(*{**decoder.inputs, "encoder_hidden_states": states}.values())


@pytest.mark.parametrize("name", ["whisper", "t5"])
@torch.no_grad()
def test_encoders_take_what_the_model_takes(name: str) -> None:
    model, example = ZOO[name].load()
    found = forms_of(model, example, None)
    sound = name == "whisper"
    assert list(found[0].inputs) == (["input_features"] if sound else ["input_ids", "attention_mask"])
    assert ("encoder_attention_mask" in found[1].inputs) is not sound
    torch.testing.assert_close(chained(model, found), model(**example).logits, rtol=1e-4, atol=1e-4)
    if sound:
        with pytest.raises(PackageError, match="decoder_input_ids"):
            forms_of(model, {"input_features": example["input_features"]}, None)
