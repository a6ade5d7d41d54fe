"""Marks of tests of kernels for compute capability 9.0 alone, which Triton's interpreter does not run."""

import pytest
import torch

from qfx.kernels.gpu.launch import INTERPRET

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper_only = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRET or not HOPPER, reason="needs a GPU of compute capability 9.0"),
]
