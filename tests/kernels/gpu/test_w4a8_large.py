"""4-bit weights times many tokens of 8 bits, on a GPU of compute capability 9.0.

With int8, sums over a block of 128 columns are exact integers below 2²², and float32 holds them. What follows is
float32: a scale, the additions of the blocks (in as many parts as programs share a tile), the token's scale, the bias.
So the bound of test_w4.py holds with room to spare. With E4M3, sums over a block are those of Hopper's tensor cores,
whose term is added as in test_w4.py.
"""

from __future__ import annotations

import random

import pytest
import torch

from qfx.kernels import nibbles, w4a8_linear
from qfx.kernels.quantize_rows import quantize_activation
from tests.kernels.gpu.hopper import hopper_only
from tests.kernels.gpu.test_w4 import group_of, prepared, worst
from tests.kernels.law import make_case

pytest.importorskip("triton.experimental.gluon")

pytestmark = hopper_only

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
GROUPS = {"W4A8_G128": 128, "W4A8_G256": 256, "W3A8_G384": 384, "W4A8_CHANNEL": 1, "W4AFP8": 128}
WHOLE = [(shape, scheme) for shape in SHAPES for scheme, group in GROUPS.items() if shape[1] % group == 0]
"""Cases in which the groups divide the columns."""


def lost(codes, columns: int) -> float:
    """Relative to a term, by the tensor cores: two roundings of 2⁻¹³ for each 32 columns of float8."""
    return 0.0 if codes.dtype == torch.int8 else 2 * columns / 32 * 2.0**-13


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
    strided = torch.zeros(len(x), columns + 16, device="cuda").to(x.dtype)[:, :columns]
    strided.copy_(x)
    for config in configs():
        y = w4a8_large(x, *args, config)
        exact = codes.double() * scale.double(), case.weight.dequantize(), case.bias
        assert worst(y, *exact, extra=lost(codes, columns)) <= 1
        assert w4a8_large(x, *args, config).equal(y)  # and two runs are equal bit for bit
        assert w4a8_large(strided, *args, config).equal(y)


def operands(tokens: int, rows: int, columns: int, group: int, seed: int, float8: bool = False):
    """x, x_scale, tiles, scale, bias on the GPU, and the weight in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, columns), generator=g, dtype=torch.int8)
    q = torch.randint(-8, 8, (rows, columns), generator=g, dtype=torch.int8)
    if seed % 4 == 0:  # the largest sums that there are
        x.fill_(-128)
        q.fill_(-8)
    if float8:
        x = (torch.randn(tokens, columns, generator=g) * 10).to(torch.float8_e4m3fn)
    scale = torch.rand(rows, 1 if group < 0 else columns // group, generator=g) + 0.1
    tiles = nibbles.tile(q.view(torch.uint8) & 15, "fours" if float8 else "halves")
    weight = q.double() * scale.double().repeat_interleave(columns // scale.shape[1], 1)
    x_scale, bias = torch.rand(tokens, 1, generator=g) / 1000, torch.randn(rows, generator=g).bfloat16()
    made = x, x_scale, tiles, nibbles.pad_scale(scale, rows), bias
    return [t.cuda() for t in made], weight


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed, float8) -> None:
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    rng = random.Random(seed)
    group, config = rng.choice([128, 128, 256, -1]), rng.choice(configs())
    columns = rng.choice([group, 3 * group, 16 * group] if group > 0 else [128, 144, 1168, 4096])
    tokens, rows = rng.choice([1, 64, 127, 129, 150, 256, 700]), 8 * rng.randint(1, 160)
    (x, x_scale, tiles, scale, bias), weight = operands(tokens, rows, columns, group, seed, float8)
    y = w4a8_large(x, x_scale, tiles, scale, bias, rows, group, config=config)
    assert worst(y, x.cpu().double() * x_scale.cpu().double(), weight, bias, extra=lost(x, columns)) <= 1
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


@pytest.mark.parametrize("float8", [False, True])
def test_the_op_takes_it_where_the_table_says_so(float8, monkeypatch) -> None:
    from qfx.kernels.gpu import w4 as gpu
    from qfx.kernels.gpu import w4a8_large
    from qfx.kernels.gpu.decode4 import eight_bit_decoder

    taken = []
    kernel = w4a8_large.w4a8_large
    monkeypatch.setattr(w4a8_large, "w4a8_large", lambda *args: (taken.append(1), kernel(*args))[1])
    (x, x_scale, tiles, scale, bias), weight = operands(200, 264, 512, 128, 1, float8)
    exact, decoder = x.cpu().double() * x_scale.cpu().double(), eight_bit_decoder(x.dtype, False)
    monkeypatch.setattr(gpu, "pick", lambda *_: gpu.Config(0, 128, 2, 0, 4, 8, specialized=0))
    for rows, dtype, specialized in ((264, torch.half, True), (264, torch.float32, False), (259, torch.half, False)):
        taken.clear()
        args = tiles, scale, None, bias[:rows], rows, 128, decoder
        y = gpu.w4(x, *args, x_scale=x_scale, dtype=dtype)
        assert bool(taken) == specialized
        assert worst(y, exact, weight[:rows], bias[:rows], extra=lost(x, 512)) <= 1


@pytest.mark.parametrize("float8", [False, True])
def test_every_code_is_itself(float8) -> None:
    """One column is 1 and all others 0: each weight comes out alone, exactly."""
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    (_, x_scale, tiles, _, _), _ = operands(128, 256, 128, 128, 1, float8)
    x = torch.eye(128, device="cuda").to(torch.float8_e4m3fn if float8 else torch.int8)
    ones = torch.ones(1, 256, device="cuda")
    y = w4a8_large(x, torch.ones_like(x_scale), tiles, ones, None, 256, 128)
    codes = nibbles.untile(tiles, "fours" if float8 else "halves", 256, 128).to(torch.int8)
    assert y.t().equal(torch.where(codes > 7, codes - 16, codes).to(y.dtype))


def test_a_wrong_nibble_is_seen() -> None:
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    (x, x_scale, tiles, scale, bias), weight = operands(128, 256, 128, 128, 1)
    tiles[1, 0, 5, 7] ^= 128
    y = w4a8_large(x, x_scale, tiles, scale, bias, 256, 128)
    assert worst(y, x.cpu().double() * x_scale.cpu().double(), weight, bias) > 1
