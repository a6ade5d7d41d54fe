"""Kernels of 2-, 3- and 8-bit weights, in Triton's interpreter and on a GPU, by the law of `test_w4`.

Every code is exact in the dtypes of the tensor cores, with any zero point of its grid: integers up to 256 are.
"""

from __future__ import annotations

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.spec import parse_scheme
from qfx.kernels import nibbles, wxa16_linear
from tests.kernels.law import make_case, opcheck, violation

triton = pytest.importorskip("triton")

from qfx.kernels.gpu import decode4, dequantize4  # noqa: E402
from qfx.kernels.gpu import w4 as gpu  # noqa: E402
from qfx.kernels.gpu.launch import INTERPRET  # noqa: E402
from tests.kernels.gpu.test_w4 import DEVICE, LARGER, group_of, prepared, worst  # noqa: E402

needs_kernels = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs Triton's interpreter (TRITON_INTERPRET=1) or a GPU"
)

CONFIGS = [
    gpu.Config(64, 16, 1, 4, 3),
    gpu.Config(128, 32, 3, 8, 4),
    gpu.Config(256, 16, 2, 8, 3, unroll=2),
    gpu.Config(16, 8, 1, 4, 3, shared=True),
]
SHAPES = [s for s in wxa16_linear.CASES if s[0] != (0,)]


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.bn}x{c.bt}x{c.split}x{c.unroll}{'shared' * c.shared}")
def config(request, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "pick", lambda *_: request.param)


@pytest.mark.parametrize("layout", nibbles.LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (130, 7), (5, 260), (128, 128), (0, 9)])
def test_tiles(layout: str, shape: tuple[int, int]) -> None:
    bits = nibbles.LAYOUTS[layout]
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    tiles = nibbles.tile(codes, layout)
    assert tiles.shape == (-(-shape[0] // 128), -(-shape[1] // 128), 128, 16 * bits) and tiles.is_contiguous()
    assert nibbles.untile(tiles, layout, *shape).equal(codes)


@pytest.mark.parametrize("layout", nibbles.LAYOUTS)
def test_where_codes_go(layout: str) -> None:
    """Each bit of a tile is one bit of one code, and where the layouts' description says."""
    words = {}
    for column in range(128):
        for bit in range(nibbles.LAYOUTS[layout]):
            codes = torch.zeros(128, 128, dtype=torch.uint8)
            codes[3, column] = 1 << bit
            flat = nibbles.tile(codes, layout).flatten()
            (at,) = flat.nonzero().flatten().tolist()
            place = 8 * at + int(flat[at]).bit_length() - 1
            assert flat[at] == 1 << place % 8 and place not in words
            words[place] = column, bit
    assert len(words) == 128 * nibbles.LAYOUTS[layout]
    if layout == "bytes":
        assert all(words[3 * 1024 + 16 * j + 8 * i + 2] == (64 * i + j, 2) for j in range(64) for i in range(2))
    if layout in ("eighths", "split"):
        assert all(words[3 * 256 + 16 * j + 2 * i + 1] == (16 * i + j, 1) for j in range(16) for i in range(8))
    if layout == "split":
        second = 128 * 256 + 3 * 128
        for j in range(8):
            for i in range(8):
                assert words[second + 16 * j + 2 * i] == ((16 * i - 16 + j) % 128, 2)
                assert words[second + 16 * j + 2 * i + 1] == ((16 * i - 8 + j) % 128, 2)


@pytest.mark.parametrize("scheme", [f"W{bits}A16{form}_G64" for bits in (2, 3, 5, 8) for form in ("", "_ASYM")])
def test_all_codes_come_back(scheme: str) -> None:
    """Every code and zero point, in the op's PyTorch body."""
    case = make_case((2,), 256, 64, scheme)
    grid = case.weight.spec.grid
    size = 2**grid.bits
    case.weight.codes.copy_(torch.arange(64 * 256).reshape(64, 256) % size + grid.lo)
    if case.weight.zero is not None:
        case.weight.zero.copy_(torch.arange(64 * 4).reshape(64, 4) % size)
    parts = prepared(case, wxa16_linear)
    parts = {k: None if v is None else v.cpu() for k, v in parts.items()}
    eye = torch.eye(256)
    w = wxa16_linear.wxa16_linear(eye, *parts.values(), None, 64, 64).t()
    assert w.equal(case.weight.dequantize())


@pytest.mark.parametrize("shape", wxa16_linear.CASES, ids=str)
def test_op(shape) -> None:
    case = make_case(*shape)
    parts = {k: None if v is None else v.cpu() for k, v in prepared(case, wxa16_linear).items()}
    args = (case.x, *parts.values(), case.bias, shape[2], group_of(case))
    assert violation(wxa16_linear.wxa16_linear(*args), case) <= 1
    opcheck(wxa16_linear.wxa16_linear, args)


@pytest.mark.parametrize("scheme", ["W8A16_ASYM_G64", "W3A16_G64", "W2A16_CHANNEL"])
def test_gradients(scheme: str) -> None:
    case = make_case((2, 3), 256, 33, scheme, act_order="CHANNEL" not in scheme)
    parts = {k: None if v is None else v.cpu() for k, v in prepared(case, wxa16_linear).items()}
    x, bias, grad = case.x.clone().requires_grad_(), case.bias.clone().requires_grad_(), torch.randn(2, 3, 33)
    torch.nn.functional.linear(x, case.weight.dequantize(), bias).backward(grad)
    leaves = case.x.requires_grad_(), case.bias.requires_grad_()
    wxa16_linear.wxa16_linear(leaves[0], *parts.values(), leaves[1], 33, group_of(case)).backward(grad)
    for leaf, want in zip(leaves, (x.grad, bias.grad), strict=True):
        assert ((leaf.grad - want).abs() <= 2.0**-17 * want.abs().max()).all()


def test_refusals() -> None:
    assert wxa16_linear.supports(parse_scheme("W8A16_G64"), 128) is None
    assert "1 to 3 or 5 to 8 bits" in wxa16_linear.supports(parse_scheme("W4A16_G64"), 128)
    assert "input is quantized" in wxa16_linear.supports(parse_scheme("W8A8"), 128)
    assert "groups of 16" in wxa16_linear.supports(parse_scheme("W8A16_G16"), 128)
    with pytest.raises(KernelError, match="128, 32 or 48 or 128"):
        wxa16_linear.wxa16_linear(torch.zeros(1, 128), torch.zeros(1, 1, 128, 64, dtype=torch.uint8),
                                  torch.ones(1, 128), None, None, None, 8, -1)  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wxa16(shape, dtype, config) -> None:
    check_wxa16(shape, dtype, act_order=shape[0] == (3,))


def check_wxa16(shape, dtype, act_order=False) -> None:
    case = make_case(*shape, dtype, act_order=act_order)
    parts = prepared(case, wxa16_linear)
    flat, w = case.x.reshape(-1, shape[1]), case.weight.dequantize()
    if parts["order"] is not None:
        order = parts["order"].cpu().long()
        flat, w = flat[:, order], w[:, order]
    bias = None if case.bias is None else case.bias.to(DEVICE)
    decoder = decode4.int_decoder(parts["tiles"].shape[3] // 16, dtype)
    args = parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case), decoder
    y = gpu.w4(flat.to(DEVICE), *args)
    assert worst(y, flat, w, case.bias) <= 1
    strided = torch.zeros(len(flat), shape[1] + 8, dtype=dtype, device=DEVICE)[:, : shape[1]]
    strided.copy_(flat)
    assert gpu.w4(strided, *args).equal(y)  # and two runs are equal bit for bit


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["W8A16_G64", "W8A16_ASYM_G64", "W3A16_G64", "W3A16_ASYM_G64", "W2A16_G64",
                                    "W2A16_ASYM_G64"])  # fmt: skip
def test_all_codes_are_decoded(scheme: str, dtype: torch.dtype) -> None:
    """Every code with every zero point, in every column: each is what the float says it is, or the sum would tell."""
    case = make_case((0,), 256, 384, scheme, dtype)
    grid = case.weight.spec.grid
    size = 2**grid.bits
    mixed = torch.arange(384)[:, None] * 7 + torch.arange(256) * 3
    case.weight.codes.copy_(mixed % size + grid.lo)
    case.weight.scale.fill_(1)
    if case.weight.zero is not None:
        case.weight.zero.copy_((torch.arange(384)[:, None] + torch.arange(4) * 64) % size)
    parts = prepared(case, wxa16_linear)
    decoder = decode4.int_decoder(parts["tiles"].shape[3] // 16, dtype)
    x = torch.eye(256, dtype=dtype, device=DEVICE)
    y = gpu.w4(x, parts["tiles"], parts["scale"], parts["zero"], None, 384, 64, decoder)
    assert y.t().cpu().float().equal(case.weight.dequantize())


@needs_kernels
@pytest.mark.parametrize("scheme", ["W8A16_G40", "W3A16_ASYM_G40"])
def test_one_group_of_an_odd_size(scheme: str) -> None:
    """As lowering calls the op: the group's size is the scheme's, though there is only one."""
    case = make_case((4,), 40, 24, scheme, torch.float16)
    parts = prepared(case, wxa16_linear)
    decoder = decode4.int_decoder(parts["tiles"].shape[3] // 16, torch.float16)
    y = gpu.w4(case.x.to(DEVICE), parts["tiles"], parts["scale"], parts["zero"], None, 24, 40, decoder)
    assert worst(y, case.x, case.weight.dequantize(), None) <= 1


@needs_kernels
def test_no_tokens() -> None:
    parts = prepared(make_case((0,), 128, 8, "W8A16_TENSOR"), wxa16_linear)
    x = torch.empty(0, 128, dtype=torch.bfloat16, device=DEVICE)
    assert gpu.w4(x, parts["tiles"], parts["scale"], None, None, 8, -1, decode4.INT8).shape == (0, 8)


@needs_kernels
@pytest.mark.parametrize("scheme", ["W8A16_G128", "W3A16_G128", "W2A16_G128"])
def test_a_wrong_bit_is_seen(scheme: str, config) -> None:
    case = make_case((16,), 128, 128, scheme, torch.bfloat16)
    parts = prepared(case, wxa16_linear)
    decoder = decode4.int_decoder(parts["tiles"].shape[3] // 16, torch.bfloat16)
    parts["tiles"][0, 0, -1, 7] ^= 64
    y = gpu.w4(case.x.to(DEVICE), parts["tiles"], parts["scale"], None, case.bias.to(DEVICE), 128, 128, decoder)
    assert worst(y, case.x, case.weight.dequantize(), case.bias) > 1


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_for_cublas(shape, dtype, monkeypatch) -> None:
    case = make_case(*shape, dtype)
    parts = prepared(case, wxa16_linear)
    decoder = decode4.int_decoder(parts["tiles"].shape[3] // 16, dtype)
    out = torch.empty(shape[2], shape[1], dtype=dtype, device=DEVICE)
    words = parts["tiles"].view(torch.int16)
    dequantize4.dequantize(words, parts["scale"], parts["zero"], None, out, group_of(case), decoder, 0)
    w = case.weight.dequantize().to(dtype)
    if not (INTERPRET and dtype == torch.bfloat16):  # whose casts to bfloat16 truncate
        assert out.cpu().equal(w)
    monkeypatch.setattr(gpu, "pick", lambda *_: gpu.Config(0, 0, 1, 0, 0, chunk=128))
    flat, bias = case.x.reshape(-1, shape[1]).to(DEVICE), case.bias.to(DEVICE)
    y = gpu.w4(flat, parts["tiles"], parts["scale"], parts["zero"], bias, shape[2], group_of(case), decoder)
    assert worst(y, flat, out, case.bias) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("size", LARGER, ids=str)
@pytest.mark.parametrize("scheme", [f"W{bits}A16{form}" for bits in (2, 3, 8)
                                    for form in ("_G128", "_ASYM_G128", "_G64", "_ASYM_G32", "_CHANNEL")])  # fmt: skip
def test_larger_wxa16(size, scheme, config) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check_wxa16((*size, scheme), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_registered_op(shape) -> None:
    case = make_case(*shape, torch.bfloat16)
    parts = {k: None if v is None else v.cuda() for k, v in prepared(case, wxa16_linear).items()}
    y = wxa16_linear.wxa16_linear(case.x.cuda(), *parts.values(), case.bias.cuda(), shape[2], group_of(case))
    assert worst(y.flatten(0, -2), case.x.reshape(-1, shape[1]), case.weight.dequantize(), case.bias) <= 1
