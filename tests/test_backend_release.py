"""`Backend.release`: float weights that no graph reads are given back, and whatever still reads them is seen."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import qfx
from qfx.core.errors import QfxError
from tests.zoo import ZOO
from tests.zoo.captured import floats

pytestmark = pytest.mark.usefixtures("dynamo")


def held(model: nn.Module) -> int:
    """Bytes of memory behind all parameters."""
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16_G32"])
def test_memory_is_given_back_and_nothing_else_changes(name: str, scheme: str) -> None:
    model, feeds = ZOO[name].load()
    chosen = qfx.backend(scheme, then="eager")
    fast = torch.compile(model, backend=chosen)
    assert chosen.release() == 0  # nothing is compiled
    before, y = held(model), floats(fast(**feeds))
    freed = chosen.release()
    quantized = sum(m.weight.numel() * 4 for k, m in model.named_modules() if k in chosen.layers)
    assert quantized == freed and before - freed <= held(model) < before - 0.99 * freed
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(y, floats(fast(**feeds)), strict=True))
    assert chosen.graphs == 2  # once more, for other strides, and not again
    assert chosen.release() == 0


def test_what_reads_a_freed_weight_is_seen() -> None:
    model, feeds = ZOO["llama"].load()
    kept = copy.deepcopy(model.state_dict())
    chosen = qfx.backend("W8A8", then="eager")
    fast = torch.compile(model, backend=chosen)
    y = floats(fast(**feeds))
    chosen.release()
    assert all(bool(t.isnan().all()) for t in floats(model(**feeds)))
    with pytest.raises(RuntimeError, match=r"more than one element of the written-to tensor"):
        model.load_state_dict(kept)
    for k, p in model.named_parameters():
        p.data = kept[k]
    assert all(torch.equal(a, b) for a, b in zip(y, floats(fast(**feeds)), strict=True))


def test_a_weight_that_a_graph_reads_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.mid, self.out = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.mid(self.embed(ids)).relu())

    model, ids = Tied().eval(), torch.randint(0, 32, (2, 5))
    chosen = qfx.backend({"schemes": {"*": "W8A8"}}, then="eager")
    fast = torch.compile(model, backend=chosen)
    y = fast(ids)
    assert "out" in chosen.layers or "embed" in chosen.layers or "mid" in chosen.layers
    assert chosen.release() == model.mid.weight.numel() * 4
    assert bool(model.embed.weight.isfinite().all()) and torch.equal(fast(ids), y)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_layers_that_share_a_graph_are_all_freed() -> None:
    layers, x = [Layer().eval() for _ in range(3)], torch.randn(4, 64)
    chosen = qfx.backend({"schemes": {"*": "W8A8"}, "ignore": []}, then="eager")
    for layer in layers:
        layer.compile(backend=chosen)
    y = [layer(x) for layer in layers]
    assert chosen.graphs == 1
    assert chosen.release() == 3 * 64 * 64 * 4
    assert all(torch.equal(a, layer(x)) for a, layer in zip(y, layers, strict=True)) and chosen.graphs == 2


def test_a_backend_does_not_keep_the_codes_of_a_model_that_is_gone() -> None:
    code = """
import gc, torch, qfx, weakref
torch.set_grad_enabled(False)
model, chosen = torch.nn.Linear(64, 64), qfx.backend({"schemes": {"*": "W8A8"}, "ignore": []}, then="eager")
torch.compile(model, backend=chosen)(torch.randn(4, 64))
codes = [weakref.ref(weight) for weight in chosen._weights]
del model
torch._dynamo.reset()
gc.collect()
assert len(codes) == 1 and codes[0]() is None and chosen.release() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # what pytest keeps of logs would keep the graph


def test_a_solution_keeps_the_weights_that_it_is_of() -> None:
    model, feeds = ZOO["llama"].load()
    chosen = qfx.backend("w8a8-smoothquant", calibration=[feeds])
    with pytest.raises(QfxError, match=r"compile what qfx\.quantize returns"):
        chosen.release()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
