"""On a CPU nothing of `qfx.kernels.gpu` is imported, and without Triton everything works there."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys

if sys.argv[1] == "without":
    sys.modules["triton"] = None  # as if it were not installed: importing it raises ImportError

import torch
from torch import nn

import qfx
from qfx import kernels
from qfx.kernels import fp8_gemm, gated, gated_quantize, hadamard, int8_gemm, int8_outlier_linear, nf4_linear
from qfx.kernels import norm, norm_quantize, quantize_rows, w4a8_linear, w4a16_linear

model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
x = torch.randn(8, 64)
for scheme in ("W8A8", "W8A8_STATIC_ASYM", "FP8_DYNAMIC", "W4A16_G32", "W4A8_G32", "W3A16_G32"):
    quantized = qfx.quantize(model, {"schemes": {"*": scheme}}, [{"input": x}], progress=False)
    for device in (None, "cuda"):
        report = qfx.lower(quantized, {"input": x}, device=device)
        assert all(layer.kernel in kernels.__all__ for layer in report.layers)
        assert quantized(x).shape == (8, 32)
    assert quantized(x).isfinite().all()

codes, scale = quantize_rows.quantize_rows(x, "int8_narrow")
weight, one = torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
y = int8_gemm.int8_gemm(codes, scale, weight, one, out_dtype=torch.float32)
assert y.allclose(x.sum(1, keepdim=True).expand(8, 32), atol=64 * 0.6 * float(scale.max()))
fp8 = weight.to(torch.float8_e4m3fn)
assert fp8_gemm.fp8_gemm(quantize_rows.quantize_rows(x, "e4m3")[0], scale, fp8, one).shape == (8, 32)
assert int8_outlier_linear.int8_outlier_linear(x, weight, one, threshold=6.0).shape == (8, 32)
assert norm_quantize.norm_quantize(x)[0].dtype == gated_quantize.gated_quantize(x, x)[0].dtype == torch.int8
assert norm.norm(x)[0].dtype == gated.gated(x, x).dtype == x.dtype
assert hadamard.hadamard(hadamard.hadamard(x, 64)[0], 64)[0].allclose(x, atol=1e-5)
tiles, absmax = nf4_linear.prepare(*nf4_linear.quantize(torch.randn(32, 64)))
assert nf4_linear.nf4_linear(x, tiles, absmax, None, 32).shape == (8, 32)

on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("qfx::w4a16_linear", "CUDA")
assert on_cuda == (sys.argv[1] == "with")

found = [name for name in sys.modules if name.startswith("qfx.kernels.gpu.")]
assert not found, found
print("done")
"""


@pytest.mark.parametrize("triton", ["with", "without"])
def test_the_reference_paths(triton: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, triton], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr
