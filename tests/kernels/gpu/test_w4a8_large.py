"""4-bit weights times many tokens of int8, on a GPU of compute capability 9.0.

Sums over a block of 128 columns are exact integers below 2²², and float32 holds them. What follows is float32: a scale,
the additions of the blocks (in as many parts as programs share a tile), the token's scale, the bias. So the bound of
test_w4.py holds with room to spare.
"""

from __future__ import annotations

import random

import pytest
import torch

from qfx.kernels import nibbles, w4a8_linear
from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.quantize_rows import quantize_activation
from tests.kernels.gpu.test_w4 import group_of, prepared, worst
from tests.kernels.law import make_case

pytest.importorskip("triton.experimental.gluon")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not HOPPER, reason="needs a GPU of compute capability 9.0"),
]

SHAPES = [
    ((128,), 128, 256),
    ((1,), 256, 8),
    ((130,), 1152, 344),
    ((300,), 2048, 264),
    ((257,), 8192, 1024),
    ((1024,), 512, 8192),
    ((128,), 14336, 128),
    ((200,), 144, 520),
]
GROUPS = {"W4A8_G128": 128, "W4A8_G256": 256, "W3A8_G384": 384, "W4A8_CHANNEL": 1}
WHOLE = [(shape, scheme) for shape in SHAPES for scheme, group in GROUPS.items() if shape[1] % group == 0]
"""Cases in which the groups divide the columns."""


def configs():
    from qfx.kernels.gpu.w4a8_large import Config

    return [Config(), Config(whole=True), Config(programs=7), Config(64, 6, 1), Config(stages=2, programs=2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "scheme"), WHOLE, ids=str)
def test_w4a8(shape, scheme, dtype) -> None:
    from qfx.kernels.gpu.w4a8_large import supports, w4a8_large

    case = make_case(*shape, scheme, dtype)
    grid = case.input["x_grid"]
    parts = prepared(case, w4a8_linear, x_grid=grid)
    codes, scale, _ = quantize_activation(case.x, grid, None, None, False)
    x, columns = codes.cuda(), shape[1]
    args = scale.cuda(), parts["tiles"], parts["scale"], case.bias.cuda(), shape[2], group_of(case), dtype
    assert supports(x, shape[2], group_of(case), None, dtype) is None
    strided = torch.zeros(len(x), columns + 16, dtype=torch.int8, device="cuda")[:, :columns]
    strided.copy_(x)
    for config in configs():
        y = w4a8_large(x, *args, config)
        assert worst(y, codes.double() * scale.double(), case.weight.dequantize(), case.bias) <= 1
        assert w4a8_large(x, *args, config).equal(y)  # and two runs are equal bit for bit
        assert w4a8_large(strided, *args, config).equal(y)


def operands(tokens: int, rows: int, columns: int, group: int, seed: int):
    """x, x_scale, tiles, scale, bias on the GPU, and the weight in float64. All codes are as large as they may be."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, columns), generator=g, dtype=torch.int8)
    q = torch.randint(-8, 8, (rows, columns), generator=g, dtype=torch.int8)
    if seed % 4 == 0:  # the largest sums that there are
        x.fill_(-128)
        q.fill_(-8)
    scale = torch.rand(rows, 1 if group < 0 else columns // group, generator=g) + 0.1
    tiles = nibbles.tile(q.view(torch.uint8) & 15, "halves")
    weight = q.double() * scale.double().repeat_interleave(columns // scale.shape[1], 1)
    x_scale, bias = torch.rand(tokens, 1, generator=g) / 1000, torch.randn(rows, generator=g).bfloat16()
    made = x, x_scale, tiles, nibbles.pad_scale(scale, rows), bias
    return [t.cuda() for t in made], weight


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed) -> None:
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    rng = random.Random(seed)
    group, config = rng.choice([128, 128, 256, -1]), rng.choice(configs())
    columns = rng.choice([group, 3 * group, 16 * group] if group > 0 else [128, 144, 1168, 4096])
    tokens, rows = rng.choice([1, 64, 127, 129, 150, 256, 700]), 8 * rng.randint(1, 160)
    (x, x_scale, tiles, scale, bias), weight = operands(tokens, rows, columns, group, seed)
    y = w4a8_large(x, x_scale, tiles, scale, bias, rows, group, config=config)
    assert worst(y, x.cpu().double() * x_scale.cpu().double(), weight, bias) <= 1
    for _ in range(3):
        assert w4a8_large(x, x_scale, tiles, scale, bias, rows, group, config=config).equal(y)


def test_a_cuda_graph_of_many_launches() -> None:
    """Counters return to zero: each replay, and each launch in it, gives the same bits."""
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    (x, x_scale, tiles, scale, bias), _ = operands(300, 2048, 4096, 128, 1)
    call = lambda: w4a8_large(x, x_scale, tiles, scale, bias, 2048, 128)  # noqa: E731
    y = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [call() for _ in range(5)]
    for _ in range(20):
        for m in made:
            m.zero_()
        graph.replay()
        assert all(m.equal(y) for m in made)


def test_the_op_takes_it_where_the_table_says_so(monkeypatch) -> None:
    from qfx.kernels.gpu import w4 as gpu
    from qfx.kernels.gpu import w4a8_large
    from qfx.kernels.gpu.decode4 import INT4_TO_INT8

    taken = []
    kernel = w4a8_large.w4a8_large
    monkeypatch.setattr(w4a8_large, "w4a8_large", lambda *args: (taken.append(1), kernel(*args))[1])
    (x, x_scale, tiles, scale, bias), weight = operands(200, 264, 512, 128, 1)
    exact = x.cpu().double() * x_scale.cpu().double()
    monkeypatch.setattr(gpu, "pick", lambda *_: gpu.Config(0, 128, 2, 0, 4, 8, specialized=0))
    for rows, dtype, specialized in (
        (264, torch.bfloat16, True),
        (264, torch.float32, False),
        (259, torch.bfloat16, False),
    ):
        taken.clear()
        args = tiles, scale, None, bias[:rows], rows, 128, INT4_TO_INT8
        y = gpu.w4(x, *args, x_scale=x_scale, dtype=dtype)
        assert bool(taken) == specialized
        assert worst(y, exact, weight[:rows], bias[:rows]) <= 1


def test_a_wrong_nibble_is_seen() -> None:
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    (x, x_scale, tiles, scale, bias), weight = operands(128, 256, 128, 128, 1)
    tiles[1, 0, 5, 7] ^= 128
    y = w4a8_large(x, x_scale, tiles, scale, bias, 256, 128)
    assert worst(y, x.cpu().double() * x_scale.cpu().double(), weight, bias) > 1
