"""A step of decoding under the backend: grouped-query attention over a static cache, which is not repeated."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import qfx
from qfx.backend import Backend
from tests.test_backend import unfused
from tests.test_backend_fused import changed, reasons
from tests.zoo.captured import distance

pytestmark = pytest.mark.usefixtures("dynamo")
LAYERS, VOCAB, POSITIONS, AT = 2, 128, 24, 17
SDPA, EXPAND = torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.expand.default


class Kept:
    """A backend that runs graphs as they are, and keeps the last one."""

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graph = gm.graph
        return gm.forward


def decoder(heads: int = 2) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, num_key_value_heads=heads, vocab_size=VOCAB)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()  # type: ignore[no-any-return]


def feeds_of(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    """`tokens` behind a cache of `AT` random ones; the mask is given, as a loop that compiles its steps does it."""
    cache = StaticCache(config=model.config, max_cache_len=POSITIONS)
    ids = torch.randint(0, VOCAB, (batch, tokens))
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # the cache allocates itself
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(AT)
    places = torch.arange(AT, AT + tokens)
    mask = (torch.arange(POSITIONS) <= places[:, None]).expand(batch, 1, tokens, POSITIONS).contiguous()
    given = {"attention_mask": mask, "position_ids": places.expand(batch, tokens)}
    return {"input_ids": ids, "past_key_values": cache, "use_cache": True, **given}


def run(model: nn.Module, chosen: Backend, feeds: dict[str, Any]) -> list[Tensor]:
    """Logits, and what the step has written into the cache."""
    torch._dynamo.reset()
    feeds = copy.deepcopy(feeds)
    logits = torch.compile(model, backend=chosen, dynamic=False, fullgraph=True)(**feeds).logits
    return [logits, *(t for layer in feeds["past_key_values"].layers for t in (layer.keys, layer.values))]


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16_G32", "NF4_G32"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_reads_the_cache_as_it_is(scheme: str, batch: int) -> None:
    model, kept = decoder(), Kept()
    feeds = feeds_of(model, batch, tokens=1)
    want = run(model, unfused(scheme, then=kept), feeds)
    assert len(kept.graph.find_nodes(op="call_function", target=EXPAND)) == 2 * LAYERS
    chosen = qfx.backend(scheme, then=kept)
    got = run(model, chosen, feeds)
    assert changed(chosen)["share heads"] == LAYERS and not reasons(chosen, "share heads")
    assert distance(want, got) < 1e-5
    assert not kept.graph.find_nodes(op="call_function", target=EXPAND)
    for node in kept.graph.find_nodes(op="call_function", target=SDPA):
        assert [n.target for n in node.args[1:3]] == [torch.ops.aten.index_copy_.default] * 2


@pytest.mark.parametrize("heads", [2, 4])
def test_a_prefill_is_left(heads: int) -> None:
    model = decoder(heads)
    feeds = feeds_of(model, batch=2, tokens=5)
    want = run(model, unfused("W8A8", then="eager"), feeds)
    chosen = qfx.backend("W8A8", then="eager")
    assert distance(want, run(model, chosen, feeds)) < 1e-5
    assert "share heads" not in changed(chosen)
    assert reasons(chosen, "share heads") == ({"its query is longer than one token"} if heads == 2 else set())


def test_a_batch_that_varies() -> None:
    model = decoder()
    chosen = qfx.backend("W8A8", then="eager")
    fast = torch.compile(model, backend=chosen, dynamic=True, fullgraph=True)
    for batch in (2, 3, 5):
        feeds = feeds_of(model, batch, tokens=1)
        plain = run(model, unfused("W8A8", then="eager"), feeds)
        assert distance(plain[:1], [fast(**feeds).logits]) < 1e-5
    assert changed(chosen)["share heads"] == LAYERS * chosen.graphs
