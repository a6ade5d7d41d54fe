"""`qfx.export.onnx` from a real quantization to a folder, and what it refuses."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qfx
import qfx.export
from qfx.core.errors import CaptureError, PackageError
from qfx.core.qtensor import encode_minmax
from qfx.core.report import Report
from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear
from qfx.package import Quantized
from qfx.recipes import Recipe
from tests.zoo import ZOO


def quantized(name: str, recipe: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    model, example = ZOO[name].load()
    return qfx.quantize(model, recipe, [example], progress=False), example


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A decoder with smoothed static W8A8, and 4 bits in its down projections; and its export."""
    recipe = {
        "schemes": {"*": "W8A8_STATIC", "*.down_proj": "W4A16_G32"},
        "steps": ["smoothquant", "gptq"],
        "ignore": ["@head"],
    }
    model, _ = quantized("llama", recipe)
    return model, qfx.export.onnx(model, tmp_path_factory.mktemp("llama") / "onnx")


def test_the_folder_holds_what_runtimes_look_for(decoder: tuple[Any, Any]) -> None:
    model, done = decoder
    assert {p.name for p in done.folder.iterdir()} == {
        *("model.onnx", "model.onnx_data", "config.json", "generation_config.json", "genai_config.json"),
        *("qfx_quant.json", "report.json"),
    }
    said = json.loads((done.folder / "qfx_quant.json").read_text())
    assert said["graphs"][0]["expected"] == {"MatMulIntegerToFloat": 12, "MatMulNBits": 2}
    assert said["layers"]["model.layers.0.mlp.down_proj"]["scheme"] == "W4A16_G32" and len(said["layers"]) == 14
    assert set(said["files"]) == {p.name for p in done.folder.iterdir()} - {"qfx_quant.json"}
    genai = json.loads((done.folder / "genai_config.json").read_text())["model"]["decoder"]
    config = model.config
    assert (genai["num_key_value_heads"], genai["head_size"]) == (config.num_key_value_heads, config.head_dim)
    graph = ir.load(done.folder / "model.onnx").graph
    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_key_values.{i}.{leaf}" for i in range(2) for leaf in ("key", "value")]
    assert [v.name for v in graph.inputs] == names
    presents = [f"present.{i}.{leaf}" for i in range(2) for leaf in ("key", "value")]
    assert [v.name for v in graph.outputs] == ["logits", *presents]
    assert [str(d) for d in graph.inputs[3].shape or ()] == ["batch_size", "2", "past_sequence_length", "8"]
    assert done.graphs[0].error < 1e-5
    assert "12 linears of W8A8_STATIC as MatMulIntegerToFloat" in str(done)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 20)])
def test_any_batch_and_length(decoder: tuple[Any, Any], batch: int, length: int) -> None:
    model, done = decoder
    ids = torch.randint(8, 128, (batch, length))
    got = qfx.export.OnnxModel(done.folder)(ids)
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_cache_gives_the_same_tokens(decoder: tuple[Any, Any]) -> None:
    model, done = decoder
    ids = torch.randint(8, 128, (2, 5))
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True)
    exported = qfx.export.OnnxModel(done.folder)
    assert exported.has_cache
    assert torch.equal(exported.generate(ids, 12), want)


def test_the_file_is_as_large_as_codes_scales_and_the_float_rest(decoder: tuple[Any, Any]) -> None:
    """Weights of 8 bits are stored once, those of 4 in half a byte; nothing is stored twice or in float."""
    model, done = decoder
    rest = sum(p.numel() * 4 for p in model.parameters())
    for module in model.modules():
        if isinstance(module, QLinear):
            bits = module.scheme.weight.grid.bits
            groups = module.in_features // 32 if bits == 4 else 1
            rest += module.out_features * (module.in_features * bits // 8 + 4 * groups + (bits == 8))
    held = (done.folder / "model.onnx_data").stat().st_size
    # the file pads each tensor; what is smaller than 256 bytes is in the graph
    assert abs(held - rest) < 0.02 * rest + 4096


def test_the_model_is_not_changed(decoder: tuple[Any, Any]) -> None:
    model, _ = decoder
    assert all(m.part is None for m in model.modules() if isinstance(m, QLinear))
    assert model.config._attn_implementation == "sdpa"
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_a_decoder_without_a_cache_masks_its_padding(decoder: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = decoder
    done = qfx.export.onnx(model, tmp_path / "onnx", cache=False)
    exported = qfx.export.OnnxModel(done.folder)
    assert not exported.has_cache and not (done.folder / "genai_config.json").exists()
    ids, mask = torch.randint(8, 128, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(exported(ids, mask)[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    prompt = ids[:1]
    want = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(exported.generate(prompt, 6), want)


OTHERS = {
    "bert": (["input_ids", "attention_mask"], {"model.onnx": {"MatMulInteger": 13}}),
    "vit": (["pixel_values"], {"model.onnx": {"MatMulInteger": 12}}),
    "bart": (["input_ids", "attention_mask"], {"encoder_model.onnx": {"MatMulInteger": 12}, "decoder_model.onnx": {}}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_images_and_encoder_decoders(name: str, tmp_path: Path) -> None:
    model, example = quantized(name, {"schemes": {"*": "W8A8"}, "ignore": ["@head"]})
    given = {} if name == "bart" else {"example": example}
    done = qfx.export.onnx(model, tmp_path / "onnx", **given)
    inputs, files = OTHERS[name]
    assert list(done.graphs[0].inputs) == inputs
    assert [g.file for g in done.graphs] == list(files)
    assert done.graphs[0].expected == files[done.graphs[0].file]
    # in bart's decoder one input is half way between two codes, and the CPU's order of sums decides; rounding is 1e-2
    bounds = {"decoder_model.onnx": 2e-3}
    assert all(g.error is not None and g.error < bounds.get(g.file, 1e-5) for g in done.graphs)
    if name == "bart":
        assert list(done.graphs[1].inputs) == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]


def test_online_maps_are_ordinary_nodes(tmp_path: Path) -> None:
    recipe = {"schemes": {"*": "W8A8_STATIC"}, "steps": [{"smoothquant": {"online": True}}], "ignore": ["@head"]}
    model, example = quantized("opt_post_norm", recipe)
    assert any(hasattr(m, "online_gain") for m in model.modules())
    done = qfx.export.onnx(model, tmp_path / "onnx", example=example, cache=False)
    assert done.graphs[0].error is not None and done.graphs[0].error < 1e-5
    names = set(ir.load(done.folder / "model.onnx").graph.initializers)
    assert any(name.endswith("online_gain") for name in names)


class Small(nn.Module):
    """A model of the user's own, with one quantized linear."""

    def __init__(self, scheme: str = "W8A8", branch: bool = False) -> None:
        super().__init__()
        wanted = parse_scheme(scheme)
        weight = encode_minmax(torch.randn(32, 64), wanted.weight)
        given = {"input_scale": 0.03} if wanted.input and not wanted.input.dynamic else {}
        self.linear = QLinear.from_qtensor(weight, torch.randn(32), wanted, dtype=torch.float32, **given)
        self.branch = branch
        self.qfx = Quantized(Report("Small", Recipe().to_dict(), 16), Recipe(), {"x": [2, 64]})

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if self.branch and y.sum() > 0 else y


def test_a_matrix_and_a_bias_do_not_fall_back(tmp_path: Path) -> None:
    """ONNX Runtime would make a float Gemm of them; the audit in `onnx` would fail then."""
    done = qfx.export.onnx(Small("W8A8_STATIC"), tmp_path / "onnx")
    assert done.graphs[0].expected == {"MatMulIntegerToFloat": 1}
    assert done.graphs[0].inputs == {"x": ["batch_size", "64"]}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no quantized model": (lambda: nn.Linear(2, 2), {}, "has no .qfx"),
    "an unknown target": (Small, {"target": "coreml"}, "no target 'coreml'; use ort-cpu, ort-cuda, tensorrt"),
    "an old opset": (Small, {"opset": 17}, "opset 17 is not one of 21 to 25"),
    "a new opset": (Small, {"opset": 26}, "opset 26 is not one of 21 to 25"),
    "a dtype of no target": (Small, {"dtype": "bfloat16"}, "ort-cpu takes no bfloat16"),
    "an unknown accuracy": (Small, {"accuracy_level": 7}, "accuracy_level 7"),
    "a scheme that the target lacks": (Small, {"target": "tensorrt"}, "the nearest scheme is W8A8_STATIC"),
    "no cache": (Small, {"cache": True}, "it has no cache to export"),
    "zero points for TensorRT": (lambda: Small("W4A16_ASYM_G64"), {"target": "tensorrt"}, "nearest scheme is W4A16"),
    "small groups for TensorRT": (lambda: Small("W4A16_G32"), {"target": "tensorrt"}, "nearest scheme is W4A16_G64"),
    "a table": (lambda: Small("FP4_G32"), {}, "the nearest scheme is FP4_BNB"),
    "float8 for each token": (lambda: Small("FP8_DYNAMIC"), {"target": "tensorrt"}, "the nearest scheme is FP8"),
    "tiny groups": (lambda: Small("W4A16_G8"), {}, "the nearest scheme is W4A16_G32"),
    "four and eight bits": (lambda: Small("W4A8_G32"), {}, "the nearest scheme is W8A8_STATIC or W4A16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(case: str, tmp_path: Path) -> None:
    make, settings, message = REFUSED[case]
    with pytest.raises(PackageError, match="export: ") as caught:
        qfx.export.onnx(make(), tmp_path / "new" / "onnx", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_control_flow_on_values_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"test_write\.py:\d+ in forward"):
        qfx.export.onnx(Small(branch=True), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_experts_are_refused(tmp_path: Path) -> None:
    model, _ = quantized("mixtral", {"schemes": {"*": "W8A16"}, "ignore": ["@head", "@router"]})
    with pytest.raises(PackageError, match=r"experts.*; keep them in float"):
        qfx.export.onnx(model, tmp_path / "onnx")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "onnx"
    qfx.export.onnx(Small(), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(PackageError, match="No space left on device; what was there is as it was"):
        qfx.export.onnx(Small(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["onnx"]


def test_overwriting(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    qfx.export.onnx(Small(), folder)
    with pytest.raises(PackageError, match="exists"):
        qfx.export.onnx(Small(), folder, overwrite=False)
    assert qfx.export.onnx(Small("W8A16"), folder).graphs[0].expected == {"MatMulNBits": 1}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PackageError, match=r"has files that qfx did not write \(notes.txt\)"):
        qfx.export.onnx(Small(), folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackageError, match="not a folder"):
        qfx.export.onnx(Small(), tmp_path / "file")


def test_a_wrong_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is run beside the model before the folder appears."""
    from qfx.export.onnx_graph.layer import Layer

    right = Layer.scales
    monkeypatch.setattr(Layer, "scales", lambda self, *a: right(self, *a) * 1.2)
    with pytest.raises(PackageError, match="gives other values than the model"):
        qfx.export.onnx(Small(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    monkeypatch.setattr(Layer, "scales", lambda self, *a: right(self, *a) * 0)
    with pytest.raises(PackageError, match=r"is not valid: linear/MatMulNBits.*scale"):
        qfx.export.onnx(Small("W8A16"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_other_folders_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is not a folder of"):
        qfx.export.OnnxModel(tmp_path)
    qfx.export.onnx(Small(), tmp_path / "onnx")
    with pytest.raises(PackageError, match="no input_ids or no logits"):
        qfx.export.OnnxModel(tmp_path / "onnx")
