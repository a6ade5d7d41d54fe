"""`reference_bodies` reaches every op that has a kernel on a GPU, and gives all of them back."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from torch.library import CustomOpDef

import qfx.kernels
from qfx.kernels.reference import OPS, reference_bodies


def test_every_op_with_a_gpu_kernel_is_listed() -> None:
    modules = [
        import_module(f"qfx.kernels.{m.name}") for m in pkgutil.iter_modules(qfx.kernels.__path__) if not m.ispkg
    ]
    found = {op for module in modules for op in vars(module).values() if isinstance(op, CustomOpDef)}
    assert {op for op in found if "cuda" in op._backend_fns} == set(OPS)


def test_kernels_come_back() -> None:
    assert not any(op._disabled_kernel for op in OPS)
    with reference_bodies():
        assert all(op._disabled_kernel == {"cuda"} for op in OPS)
    assert not any(op._disabled_kernel for op in OPS)
