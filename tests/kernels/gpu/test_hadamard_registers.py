"""Hadamard kernels that stay in registers: their order of a column's bits on any device, and the rest on a GPU."""

from __future__ import annotations

import pytest
import torch

from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.hadamard import transform

pytest.importorskip("triton.experimental.gluon")

from qfx.kernels.gpu import hadamard as had
from qfx.kernels.gpu import hadamard_blocks, hadamard_registers
from tests.kernels.gpu.hopper import hopper_only
from tests.kernels.gpu.test_rowwise import equal_codes, hadamard_bound

SHAPES = [
    (8192, 8192), (4096, 4096), (16384, 16384), (8192, 512), (4096, 2048),
    (8192, 128), (4096, 64), (2048, 128), (16384, 32), (4096, 16),
]  # fmt: skip
GRIDS = ["int8_narrow", "int8", "e4m3", "e5m2"]


def plans(columns: int, block: int, dtype: torch.dtype) -> list[had.Plan]:
    """One for each kernel: what differs in the number of programs alone is left out."""
    found = had.plans_in_registers(columns, block, 8192, dtype)
    return list({(p.form, p.warps, p.stages): p for p in found}.values())


@pytest.mark.parametrize(("columns", "block"), SHAPES)
def test_matrices_transform_all_bits(columns: int, block: int) -> None:
    """Each bit of a column's number below the block is in one matrix, once."""
    kernel = hadamard_registers if block > 128 else hadamard_blocks
    for warps in (2, 4, 8):
        if not kernel.takes(columns, block, torch.bfloat16, warps):
            continue
        device = torch.device("cpu")
        if block > 128:
            sides = [len(h) for h in hadamard_registers.matrices(columns, block, warps, device)]
            assert sides == [16, 16, columns // 256]
            assert sorted([0, 3, 4, 1, 5, 6, 7, 2, *hadamard_registers.sums(columns, warps)]) == list(
                range(columns.bit_length() - 1)
            )
            kernel.layouts(columns, warps)
        else:
            assert hadamard_blocks.matrix(block, torch.bfloat16, device).shape == (32, 32)


def test_candidates() -> None:
    for columns, block in SHAPES:
        found = had.plans_in_registers(columns, block, 8192, torch.bfloat16)
        assert found and len(set(found)) == len(found)
        assert all(p.side * p.width == columns and p.per_sm * p.warps <= 128 for p in found)
    for columns, block, dtype in [
        (8192, 8192, torch.float16), (8192, 8192, torch.float32), (14336, 14336, torch.bfloat16),
        (8192, 256, torch.bfloat16), (32768, 32768, torch.bfloat16), (3072, 12, torch.bfloat16),
    ]:  # fmt: skip
        assert not had.plans_in_registers(columns, block, 8192, dtype)
    assert not had.plans_in_registers(8192, 8192, 1, torch.bfloat16)


class TestOnGPU:
    pytestmark = hopper_only

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("columns", "block"), SHAPES)
    def test_values_and_codes(self, columns: int, block: int, dtype: torch.dtype) -> None:
        x = (torch.randn(1003, columns) * 10).to(dtype).cuda()
        x[5] = 0
        x[7, 3:] = 0
        exact = transform(x.double(), block)
        for i, plan in enumerate(plans(columns, block, dtype)):
            y, _ = had.hadamard(x, block, plan=plan)
            assert ((y.double() - exact).abs() <= hadamard_bound(x, block, plan, exact)).all(), plan
            assert torch.equal(had.hadamard(x, block, plan=plan)[0], y), plan
            for grid in GRIDS if i == 0 else GRIDS[:1]:
                equal_codes(had.hadamard(x, block, grid, plan=plan), y, grid)

    @pytest.mark.parametrize("tokens", [1, 3, 131, 264, 1057])
    def test_numbers_of_rows_and_strides(self, tokens: int) -> None:
        x = torch.randn(tokens, 8192 + 64).bfloat16().cuda()[:, 64:]
        for block in (8192, 128):
            exact = transform(x.double(), block)
            for plan in plans(8192, block, x.dtype):
                y, _ = had.hadamard(x, block, plan=plan)
                assert ((y.double() - exact).abs() <= hadamard_bound(x, block, plan, exact)).all(), plan
                equal_codes(had.hadamard(x, block, "int8_narrow", plan=plan), y, "int8_narrow")

    def test_static_scale(self) -> None:
        x, scale, zero = torch.randn(9, 4096).bfloat16().cuda(), torch.tensor(0.02), torch.tensor(100).int()
        for block in (4096, 128):
            for plan in plans(4096, block, x.dtype):
                y, _ = had.hadamard(x, block, plan=plan)
                got = had.hadamard(x, block, "uint8", scale.cuda(), zero.cuda(), plan)
                equal_codes(got, y, "uint8", scale, zero)

    @pytest.mark.parametrize("peak", [1e-36, 1e-30, 1e30, 1e35])
    def test_extreme_values(self, peak: float) -> None:
        x = (torch.randn(4, 4096).double() * peak).bfloat16().cuda()
        exact = transform(x.double(), 4096)
        for plan in plans(4096, 4096, x.dtype):
            y, _ = had.hadamard(x, 4096, plan=plan)
            assert ((y.double() - exact).abs() <= hadamard_bound(x, 4096, plan, exact)).all(), plan

    def test_rows_that_are_not_aligned_take_the_other_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plans(4096, 4096, torch.bfloat16)[0]
        monkeypatch.setattr(had.tune, "pick", lambda *_: plan)
        x = torch.randn(64, 4097).bfloat16().cuda()[:, 1:]
        y, _ = had.hadamard(x, 4096)
        exact = transform(x.double(), 4096)
        other = had.plans(4096, 4096, 64, x.dtype)[0]
        assert ((y.double() - exact).abs() <= hadamard_bound(x, 4096, other, exact)).all()


def test_interpreter_has_no_such_kernel() -> None:
    if INTERPRET:
        x = torch.randn(64, 4096).bfloat16()
        assert torch.equal(
            had.hadamard(x, 4096)[0], had.hadamard(x, 4096, plan=had.plans(4096, 4096, 64, x.dtype)[0])[0]
        )
