"""Norms and gated products in front of linears whose weights alone are quantized: one op each, with the same bits."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qfx.passes.lower.fuse as fuse
from tests.passes.lower.test_fuse import GATED, WIDE, Body, Fused, Model, layer, rms, rms_late

KERNELS = {"w4a16_linear": "W4A16_G32", "wxa16_linear": "W8A16_G32", "nf4_linear": "NF4_G32"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
READER = "no linear with quantized weights and a float input reads it"


def fused(body: Body, dtype: torch.dtype = torch.float32, kernel: str = "w4a16_linear") -> Fused:
    return Fused(body, KERNELS[kernel], dtype, kernel)


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm", [rms, rms_late, layer])
def test_a_norm_becomes_one_op(norm: Callable[[Model, Tensor], Tensor], kernel: str, dtype: torch.dtype) -> None:
    f = fused(lambda m, x: m.a(norm(m, x)), dtype, kernel)
    assert f.ops[-2:] == ["qfx.norm", f"qfx.{kernel}"] and f.changed("fuse norms") == 1
    assert not {"aten.rsqrt", "aten.mean.dim"} & set(f.ops)
    assert f.equal()


def test_a_norm_that_is_one_op_becomes_one_that_starts_early() -> None:
    for body in (lambda m, x: m.a(m.norm(x)), lambda m, x: m.a(F.rms_norm(x, [WIDE], m.gain, 1e-6))):
        f = fused(body)
        assert f.ops == ["qfx.norm", "qfx.w4a16_linear"]
        f.close()


@DTYPES
def test_the_sum_in_front_of_a_norm_is_taken_in_and_kept(dtype: torch.dtype) -> None:
    def body(m: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = x + m.plain(x)
        y = rms(m, h)
        return m.a(y), m.b(y), m.plain(h.tanh() + y), h

    f = fused(body, dtype)
    assert f.ops.count("qfx.norm") == 1 == f.changed("fuse norms") and f.why("fuse norms") == []
    assert f.ops.count("aten.add.Tensor") == 1 and f.equal()


def test_norms_in_a_row() -> None:
    f = fused(lambda m, x: m.a(m.norm(x + m.b(rms(m, x + m.a(m.norm(x)))))))
    assert f.ops.count("qfx.norm") == 3 == f.changed("fuse norms") and "aten.add.Tensor" not in f.ops
    f.close()


@pytest.mark.parametrize(
    ("body", "why", "changed"),
    [
        (lambda m, x: m.plain(rms(m, x)), READER, 0),
        (lambda m, x: m.a(rms(m, x).tanh()), READER, 0),
        (lambda m, x: m.a(m.norm(x + x[:1, :1])), "the summands in front of the norm differ in shape or dtype", 1),
        (
            lambda m, x: (lambda h: m.plain(h) + m.a(m.norm(h)))(x + m.plain(x)),
            "the sum in front of the norm is read before it, by 'linear'",
            1,
        ),
    ],
    ids=["a float reader", "a value behind it", "a broadcast sum", "a sum that is read"],
)
def test_what_is_left_says_why(body: Body, why: str, changed: int) -> None:
    f = fused(body)
    assert f.why("fuse norms") == [why] and f.changed("fuse norms") == changed
    f.close()


def test_linears_whose_codes_are_read_as_they_are_stored_are_left_to_the_next_backend() -> None:
    f = Fused(lambda m, x: m.a(F.silu(rms(m, x)) * m.plain(x)), "W4A16_G32")
    assert f.changed("fuse norms") == f.changed("fuse gated products") == 0
    assert f.why("fuse norms") == [READER] and "qfx.gated" not in f.ops and f.equal()


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("act", GATED)
def test_gated_products_become_one_op(act: str, kernel: str, dtype: torch.dtype) -> None:
    spelled = act in ("silu spelled out", "tanh")  # these round between their own ops, too
    for body in (
        lambda m, x: m.a(GATED[act](m.plain(x)) * m.plain(x + 1)),
        lambda m, x: m.a(m.plain(x + 1) * GATED[act](m.plain(x))),
        lambda m, x: m.a(GATED[act](m.plain(x))),
    ):
        f = fused(body, dtype, kernel)
        assert f.changed("fuse gated products") == 1 and f.ops[-2:] == ["qfx.gated", f"qfx.{kernel}"]
        assert set(f.ops[:-2]) <= {"aten.linear", "aten.add.Tensor"}
        if spelled:
            ((want, got),) = f.pairs
            assert (want - got).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
        else:
            assert f.equal()


def test_halves_of_one_product_are_read_where_they_are() -> None:
    def body(m: Model, x: Tensor) -> Tensor:
        gate, up = torch.cat([m.plain(x), x], -1).split_with_sizes([WIDE, WIDE], -1)
        return m.a(F.silu(gate) * up)

    f = fused(body, torch.bfloat16)
    assert f.ops[-2:] == ["qfx.gated", "qfx.w4a16_linear"] and "aten.clone" not in f.ops and f.equal()


def test_what_else_reads_a_gated_product_gets_its_values() -> None:
    f = fused(lambda m, x: (lambda y: (m.a(y), m.b(y), m.plain(y), y))(F.silu(x) * m.plain(x)), torch.bfloat16)
    assert f.ops.count("qfx.gated") == 1 == f.changed("fuse gated products") and "aten.mul.Tensor" not in f.ops
    assert f.equal()


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.a(x.tanh() * m.plain(x)),
        lambda m, x: m.a(F.silu(x) * m.gain),
        lambda m, x: m.a(F.silu(x) * 2),
        lambda m, x: m.a(F.silu(x) + x),
        lambda m, x: m.plain(F.silu(x) * m.plain(x)),
    ],
    ids=["another function", "a gain", "a number", "a sum", "a float reader"],
)
def test_what_only_looks_like_a_gated_product_stays(body: Body) -> None:
    f = fused(body)
    assert f.changed("fuse gated products") == 0 and "qfx.gated" not in f.ops and f.equal()


def test_rows_are_taken_back_where_the_output_is_shaped_as_the_input() -> None:
    f = fused(lambda m, x: m.a(rms(m, x).view(-1, WIDE)).view(x.shape))
    assert f.changed("keep shapes") == 1 == f.changed("fuse norms") and f.equal()


@DTYPES
def test_a_wrong_fusion_is_seen(dtype: torch.dtype) -> None:
    """Halves in the wrong order, and a norm that rounds at another place or forgets the sum."""
    emit = fuse.emit

    def swapped(graph, target, args, like, kwargs=None):
        return emit(graph, target, (args[1], args[0], *args[2:]) if target is fuse.GATED else args, like, kwargs)

    def elsewhere(graph, target, args, like, kwargs=None):
        return emit(graph, target, (*args[:6], not args[6]) if target is fuse.NORM else args, like, kwargs)

    def without(graph, target, args, like, kwargs=None):
        return emit(graph, target, (args[0], args[0], *args[2:]) if target is fuse.NORM else args, like, kwargs)

    def body(m: Model, x: Tensor) -> Tensor:
        h = x + m.plain(x)
        return m.a(rms(m, h)) + m.b(F.silu(m.plain(x)) * x)

    assert fused(body, dtype).equal()
    for wrong in (swapped, without, elsewhere) if dtype != torch.float32 else (swapped, without):
        with mock.patch.object(fuse, "emit", wrong):
            assert not fused(body, dtype).equal()
