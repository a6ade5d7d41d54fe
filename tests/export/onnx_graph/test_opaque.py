"""The twin that is exported: the model's memory, another dtype, and no weight of a quantized linear."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

import qfx
import qfx.export
from qfx.core.errors import KernelError
from qfx.export.onnx_graph.opaque import copy_in, opaque_copy, quantized_linears
from qfx.modules.linear import QLinear
from tests.export.onnx_graph.exported import quantized
from tests.zoo import ZOO


def test_the_twin_shares_memory_and_leaves_the_model_alone() -> None:
    model, example = quantized("llama", "W8A8")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = opaque_copy(model, torch.float32)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert all(m.part is not None and not m._buffers for m in twin.modules() if isinstance(m, QLinear))
    with pytest.raises(KernelError, match="run the quantized model instead"):
        twin(**example)
    half = opaque_copy(model, torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_a_class_computes_keeps_its_dtype() -> None:
    model, _ = quantized("llama", "W8A8")
    half = opaque_copy(model, torch.float16)
    assert {b.dtype for n, b in half.named_buffers() if n.endswith("inv_freq")} == {torch.float32}


def test_a_copy_in_another_dtype_keeps_codes_and_scales() -> None:
    model, example = quantized("opt", "FP8")
    wide = copy_in(model.bfloat16(), torch.float32)
    for a, b in zip(quantized_linears(model).values(), quantized_linears(wide).values(), strict=True):
        assert a.weight_codes.data_ptr() == b.weight_codes.data_ptr() and b.weight_scale.dtype == torch.float32
        assert a.bias is not None and b.bias is not None and (a.bias.dtype, b.bias.dtype) == (a.dtype, torch.float32)
    with torch.no_grad():
        assert wide(**example).logits.dtype == torch.float32


def test_a_model_in_bfloat16_is_compared_in_float32(tmp_path: Path) -> None:
    """Its own rounding would hide, or look like, a fault of 1e-2."""
    model, example = ZOO["opt"].load()
    q = qfx.quantize(model.bfloat16(), {"schemes": {"*": "W8A16"}, "ignore": ["@head"]}, [example], progress=False)
    done = qfx.export.onnx(q, tmp_path / "onnx", cache=False)
    assert done.graphs[0].error is not None and done.graphs[0].error < 1e-5


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, example = ZOO["llama_tied"].load()
    q = qfx.quantize(model, {"schemes": {"*": "W8A16"}, "ignore": ["@head"]}, [example], progress=False)
    done = qfx.export.onnx(q, tmp_path / "onnx", cache=False)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    held = [v for v in ir.load(done.folder / "model.onnx").graph.initializers.values() if v.const_value is not None]
    same = [v for v in held if sorted(v.shape or ()) == sorted(table.shape)]
    assert len(same) == 1
