"""4-bit weights times many int8 tokens, summed over whole rows, on a GPU of compute capability 9.0.

Codes times multiples are exact int8 values and sums are exact in int32. What follows is float32: a conversion (half a
unit of 24 bits), the row's scale, the additions of the parts that programs have of a tile, the token's scale, the bias.
So the bound of test_w4.py holds with room to spare.
"""

from __future__ import annotations

import random

import pytest
import torch

from qfx.core.qtensor import quantize_scale
from qfx.core.spec import parse_scheme
from qfx.kernels import nibbles
from tests.kernels.gpu.hopper import hopper_only
from tests.kernels.gpu.test_w4 import worst

pytest.importorskip("triton.experimental.gluon")

pytestmark = hopper_only


def configs():
    from qfx.kernels.gpu.w4a8_large import Config

    return [
        Config(), Config(whole=True), Config(64, 6, 1), Config(stages=2, programs=2), Config(128, 6, bn=128),
        Config(64, 8, programs=7, bn=128), Config(256, 4, bn=128), Config(256, 3, 16, whole=True, bn=128),
    ]  # fmt: skip


def operands(tokens: int, rows: int, columns: int, group: int, seed: int):
    """x, x_scale, tiles, scale, bias, second on the GPU, and the weight in float64; second is None without groups."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, columns), generator=g, dtype=torch.int8)
    q = torch.randint(-8, 8, (rows, columns), generator=g, dtype=torch.int8)
    scale, second = torch.rand(rows, 1 if group < 0 else columns // group, generator=g) + 0.1, None
    if seed % 4 == 0:  # the largest sums that there are
        x.fill_(-128)
        q.fill_(-8)
        scale.fill_(0.3)
    if group > 0:
        codes, second = quantize_scale(scale, parse_scheme("W4A8_DQ").weight)
        scale = codes.float() * second[:, None]
        assert bool((codes.amax(1) == 15).all())
        second = nibbles.pad_scale(second[:, None], rows)[0].contiguous().cuda()
    weight = q.double() * scale.double().repeat_interleave(columns // scale.shape[1], 1)
    x_scale, bias = torch.rand(tokens, 1, generator=g) / 1000, torch.randn(rows, generator=g).bfloat16()
    made = x, x_scale, nibbles.tile(q.view(torch.uint8) & 15, "halves"), nibbles.pad_scale(scale, rows), bias
    return [*(t.cuda() for t in made), second], weight


def product(given, rows: int, group: int, config, dtype: torch.dtype = torch.bfloat16):
    from qfx.kernels.gpu.w4a8_large import w4a8_large

    *rest, second = given
    return w4a8_large(*rest, rows, group, dtype, config, second=second)


def exact(given) -> torch.Tensor:
    return given[0].cpu().double() * given[1].cpu().double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [128, 256, -1])
@pytest.mark.parametrize(
    "shape", [(128, 128, 256), (1, 256, 8), (130, 1152, 344), (300, 2048, 264), (257, 8192, 1024), (200, 144, 520)]
)
def test_shapes(shape, group, dtype) -> None:
    tokens, columns, rows = shape
    if group > 0 and columns % group:
        columns += group - columns % group
    given, weight = operands(tokens, rows, columns, group, tokens)
    for config in configs():
        y = product(given, rows, group, config, dtype)
        assert worst(y, exact(given), weight, given[4]) <= 1
        assert product(given, rows, group, config, dtype).equal(y)  # and two runs are equal bit for bit


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed) -> None:
    rng = random.Random(seed)
    group, config = rng.choice([128, 128, 256, -1]), rng.choice(configs())
    columns = rng.choice([group, 3 * group, 16 * group] if group > 0 else [128, 144, 1168, 4096])
    tokens, rows = rng.choice([1, 64, 127, 129, 150, 256, 700]), 8 * rng.randint(1, 160)
    given, weight = operands(tokens, rows, columns, group, seed)
    y = product(given, rows, group, config)
    assert worst(y, exact(given), weight, given[4]) <= 1
    for _ in range(3):
        assert product(given, rows, group, config).equal(y)


def test_every_code_times_every_multiple_is_itself() -> None:
    """One column of a token is 1 and all others 0: each weight comes out alone, exactly."""
    columns = 15 * 128
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(columns // 16)
    codes = torch.stack([codes.roll(i) for i in range(256)])
    multiples = torch.arange(1, 16).repeat(256, 1)
    given = [
        torch.eye(columns, dtype=torch.int8).cuda(), torch.ones(columns, 1).cuda(),
        nibbles.tile(codes.view(torch.uint8) & 15, "halves").cuda(), nibbles.pad_scale(multiples.float(), 256).cuda(),
        None, torch.ones(256).cuda(),
    ]  # fmt: skip
    weight = codes.int() * multiples.repeat_interleave(128, 1)
    assert weight.unique().numel() == torch.outer(torch.arange(-8, 8), torch.arange(1, 16)).unique().numel()
    for config in configs():
        assert product(given, 256, 128, config).cpu().t().equal(weight.to(torch.bfloat16))


def test_a_cuda_graph_of_many_launches() -> None:
    """Counters return to zero: each replay, and each launch in it, gives the same bits."""
    from qfx.kernels.gpu.w4a8_large import Config

    given, _ = operands(300, 2048, 4096, 128, 1)
    config = Config(256, 3, bn=128)
    y = product(given, 2048, 128, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [product(given, 2048, 128, config) for _ in range(5)]
    for _ in range(20):
        for m in made:
            m.zero_()
        graph.replay()
        assert all(m.equal(y) for m in made)


def test_the_op_takes_it(monkeypatch) -> None:
    from qfx.kernels.gpu import w4a8_large

    taken = []
    kernel = w4a8_large.w4a8_large
    monkeypatch.setattr(w4a8_large, "w4a8_large", lambda *args: (taken.append(args[-1]), kernel(*args))[1])
    for group in (128, -1):
        (x, x_scale, tiles, scale, bias, second), weight = operands(200, 264, 512, group, 1)
        taken.clear()
        args = x, x_scale, tiles, scale, None, second, bias, 264, group, torch.bfloat16
        y = torch.ops.qfx.w4a8_gemm(*args)
        assert len(taken) == 1 and taken[0] is second
        assert worst(y, x.cpu().double() * x_scale.cpu().double(), weight, bias) <= 1


@pytest.mark.parametrize("broken", ["nibble", "multiple"])
def test_what_is_wrong_is_seen(broken) -> None:
    given, weight = operands(128, 256, 256, 128, 1)
    if broken == "nibble":
        given[2][1, 0, 5, 7] ^= 128
    else:
        given[3][1, 9] += given[5][9]
    assert worst(product(given, 256, 128, configs()[0]), exact(given), weight, given[4]) > 1
