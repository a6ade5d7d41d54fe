"""Counters of split sums: as they were when a launch ends, so that the next launch may have them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qfx.kernels import nibbles
from qfx.kernels.gpu import decode4, gemm8, gemm8_config, gemm8_skinny, w4, w4_config
from qfx.kernels.gpu.launch import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The same counters for every launch, as on a GPU."""
    counts = torch.zeros(64, dtype=torch.int32)
    for module in (w4, gemm8_skinny):
        monkeypatch.setattr(module, "counters", lambda *_: counts)
    return counts


def test_4_bit_weights(shared, monkeypatch) -> None:
    monkeypatch.setattr(w4, "pick", lambda *_: w4_config.Config(64, 16, 3, 4, 2))
    tiles = nibbles.tile(torch.randint(0, 16, (70, 512), dtype=torch.uint8), "quarters")
    x, scale = torch.randn(5, 512).half(), nibbles.pad_scale(torch.rand(70, 4), 70)
    first = w4.w4(x, tiles, scale, None, None, 70, 128, decode4.INT4)
    assert not shared.any()
    assert w4.w4(x, tiles, scale, None, None, 70, 128, decode4.INT4).equal(first)


def test_8_bit_weights(shared) -> None:
    a, b = (torch.randint(-128, 128, (rows, 128), dtype=torch.int8) for rows in (5, 70))
    config, one = gemm8_config.Config("skinny", 16, 64, 32, 2, 4, split=3), torch.ones(1)
    first = gemm8.gemm8(a, b, one, one, out_dtype=torch.float32, config=config)
    assert not shared.any()
    assert gemm8.gemm8(a, b, one, one, out_dtype=torch.float32, config=config).equal(first)
