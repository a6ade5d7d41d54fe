"""Kernel tests: what an op does not write is NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (integers: their maximum), so that a read of unwritten memory shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def float32_sums() -> Iterator[None]:
    """The bounds count roundings of float32: cuBLAS may not split sums in half precision."""
    flags = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32")
    before = {name: getattr(flags, name) for name in names}
    for name in names:
        setattr(flags, name, False)
    yield
    for name, value in before.items():
        setattr(flags, name, value)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
