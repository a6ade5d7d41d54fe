"""A quantized model does what its class does: it generates, with a cache of keys and values, and compiles."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.modules.linear import QLinear
from qfx.passes.lower.modules import Lower
from qfx.passes.solve.rtn import Rtn
from tests.passes.discovered import Discovered, zoo
from tests.zoo import ZOO

SCHEMES = ("W8A8", "W8A8_STATIC_ASYM", "FP8_DYNAMIC", "W4A16_G16", "W4A8_G16")


@pytest.fixture(autouse=True)
def reset() -> None:
    """The compiler counts recompilations of one forward, of whatever module."""
    torch.compiler.reset()


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """The likeliest tokens, each from a whole forward without a cache."""
    encoder_decoder = model.config.is_encoder_decoder
    ids = inputs["input_ids"]
    out = torch.full((len(ids), 1), model.config.decoder_start_token_id) if encoder_decoder else ids
    for _ in range(steps):
        feeds = {**inputs, "decoder_input_ids": out} if encoder_decoder else {**inputs, "input_ids": out}
        scores = model(**feeds, use_cache=False).logits[:, -1]
        scores[:, :3] = -torch.inf  # special tokens
        out = torch.cat([out, scores.argmax(-1, keepdim=True)], 1)
    return out


@pytest.mark.parametrize(("name", "scheme"), [("llama", "W8A8"), ("gpt2", "W4A16_G16"), ("t5", "W8A16")])
def test_it_generates_with_a_cache(name: str, scheme: str) -> None:
    model, inputs = ZOO[name].load()
    q = qfx.quantize(model, {"schemes": {"*": scheme}}, [inputs])
    inputs.pop("decoder_input_ids", None)
    want = greedy(q, inputs, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    for cache in (True, False):
        assert torch.equal(q.generate(**inputs, **options, use_cache=cache), want)
    assert want[:, -6:].unique().numel() > 1


def lowered(found: Discovered, scheme: str) -> nn.Module:
    state = found.fresh({"*": scheme})
    with torch.no_grad():
        Rtn()(state)
        Lower()(state)
    return state.graph.module


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_linear_compiles_in_one_graph(scheme: str) -> None:
    linear = lowered(zoo("llama"), scheme).model.layers[0].mlp.up_proj
    assert isinstance(linear, QLinear)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for shape in ((3, 64), (2, 5, 64), (1, 64)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), linear(x))


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
@torch.no_grad()
def test_a_linear_compiles_with_inductor() -> None:
    linear = lowered(zoo("llama"), "W8A8").model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@torch.no_grad()
def test_a_decoder_compiles_in_one_graph(name: str) -> None:
    found = zoo(name)
    q = lowered(found, "W8A8")
    compiled = torch.compile(copy.deepcopy(q), fullgraph=True, backend="aot_eager")
    for batch in found.batches:
        torch.testing.assert_close(compiled(**batch).logits, q(**batch).logits, rtol=1e-5, atol=1e-5)
