"""An exported decoder on prompts of several lengths."""

from pathlib import Path

import torch

import qfx
import qfx.export
from tests.zoo import ZOO


def test_padding_on_the_left_does_not_count(tmp_path: Path) -> None:
    """The model has learned positions: a token's is the number of tokens before it, as in transformers' generate."""
    model, example = ZOO["gpt2"].load()
    model = qfx.quantize(model, {"schemes": {"*": "W8A8"}, "ignore": ["@head"]}, [example], progress=False)
    exported = qfx.export.OnnxModel(qfx.export.onnx(model, tmp_path / "onnx").folder)
    ids, mask = torch.randint(8, 128, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    got = exported(ids, mask)
    with torch.no_grad():
        alone, counted = model(input_ids=ids[1:, 3:]).logits, model(input_ids=ids, attention_mask=mask).logits
        want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(got[1:, 3:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(counted[1:, 3:], alone, rtol=1e-1, atol=1e-1)  # padding that counts is another function
    assert torch.equal(exported.generate(ids, 6, mask), want)
