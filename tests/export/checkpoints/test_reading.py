"""Folders that another tool wrote, and folders that are not whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import qfx
from qfx.assets import demo_calibration, demo_model
from qfx.cli import app
from qfx.core.errors import PackageError
from qfx.modules.linear import QLinear
from tests.export.checkpoints.models import CLOSE, SAME, distance, inputs_of, logits, quantized, wide, worst_linear
from tests.zoo import ZOO

CT = "compressed-tensors"
PRESETS = ("W8A8", "W4A16", "W4A16_ASYM", "W8A16", "FP8", "FP8_DYNAMIC", "W4A8")
GROUP = 16


def by_the_library(folder: Path, presets: dict[str, list[str]], dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint that the library compressed and transformers saved; the model, and the weights in it."""
    model: Any = ZOO["llama"].load()[0].to(dtype)
    schemes = {f"group_{i}": preset_name_to_scheme(name, targets) for i, (name, targets) in enumerate(presets.items())}
    for scheme in schemes.values():
        if scheme.weights.group_size is not None:
            scheme.weights.group_size = GROUP
    settings = QuantizationConfig(config_groups=schemes, ignore=["lm_head"])
    apply_quantization_config(model, settings, show_progress=False)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        args, w = scheme.weights, module.weight.detach()
        blocks = {"tensor": w.reshape(1, -1), "channel": w}.get(args.strategy, w.reshape(len(w), -1, GROUP))
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(dtype)
        module.weight_zero_point.data = zero.reshape(module.weight_scale.shape)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.03)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    weights = {n: m.weight.detach() for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    return model, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_library_compressed_has_its_weights(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, weights = by_the_library(tmp_path, {preset: ["Linear"]}, dtype)
    loaded: Any = qfx.load(tmp_path)
    found = {n: m for n, m in loaded.named_modules() if isinstance(m, QLinear)}
    assert found.keys() == weights.keys() and "lm_head" not in found and len(found) == 14
    assert all(torch.equal(found[n].weight, weights[n]) for n in weights)
    assert {m.dtype for m in found.values()} == {p.dtype for p in loaded.parameters()} == {dtype}
    if dtype == torch.float32:
        assert worst_linear(model, wide(loaded)) < SAME
        assert worst_linear(ZOO["llama"].load()[0], loaded) > 3 * CLOSE


def test_groups_of_several_schemes_are_read(tmp_path: Path) -> None:
    presets = {"W8A8": ["re:.*mlp.*"], "W4A16": ["re:.*self_attn.*"]}
    _, weights = by_the_library(tmp_path, presets, torch.float32)
    loaded: Any = qfx.load(tmp_path)
    assert all(torch.equal(loaded.get_submodule(n).weight, w) for n, w in weights.items())
    schemes = {n: m.scheme.weight.grid.bits for n, m in loaded.named_modules() if isinstance(m, QLinear)}
    assert schemes == {n: 8 if "mlp" in n else 4 for n in weights}


def test_what_was_read_is_reported_and_saved(tmp_path: Path) -> None:
    by_the_library(tmp_path / "theirs", {"W4A16": ["Linear"]}, torch.float32)
    loaded, inputs = qfx.load(tmp_path / "theirs"), inputs_of("llama")
    report = loaded.qfx.report
    assert report.share_quantized == 1 and CT in report.warnings[0] and len(report.layers) == 14
    want = logits(loaded, inputs)
    for format in ("qfx", CT):
        qfx.save(loaded, tmp_path / format, format=format)
        again = qfx.load(tmp_path / format)
        assert torch.equal(logits(again, inputs), want) and again.qfx.report == report
    qfx.lower(loaded, inputs)
    assert distance(logits(loaded, inputs), want) < CLOSE


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return edit


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def index(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a float tensor is missing": (tensors(lambda t: t.pop(NORM)), f"lacks tensors of LlamaForCausalLM ({NORM})"),
    "a scale is missing": (tensors(lambda t: t.pop(f"{Q}.weight_scale")), f"{Q} lacks weight_scale"),
    "an unknown tensor": (tensors(lambda t: t.update(more=torch.ones(1))), "has tensors that LlamaForCausalLM has not"),
    "a bias that the class has not": (tensors(lambda t: t.update({f"{Q}.bias": torch.ones(32)})), f"{Q}.bias"),
    "another shape": (tensors(lambda t: t.update({NORM: torch.ones(3)})), f"{NORM} has the shape [3]"),
    "another linear": (
        tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:8], f"{Q}.weight_scale": torch.ones(8, 1)})),
        "is a linear of [8, 64]",
    ),
    "another method": (config(lambda c: c["quantization_config"].update(quant_method="fp8")), "'fp8'; qfx reads"),
    "an unknown class": (config(lambda c: c.update(architectures=["NoSuchModel"])), "no class NoSuchModel"),
    "no class": (config(lambda c: c.pop("architectures")), "names no architecture"),
    "an unknown model type": (config(lambda c: c.update(model_type="nosuch")), "no config that transformers reads"),
    "nothing that fits": (
        config(lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["x"])),
        "fits no linear",
    ),
    "a cache": (config(lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "a shard that is not there": (index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors cannot be read"),
    "a shard elsewhere": (index('{"weight_map": {"a": "../b.safetensors"}}'), "do not trust it"),
    "no index": (index("[]"), "is no index"),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading") / "ours"
    qfx.save(quantized("llama", "W8A8"), folder, format=CT)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_whole_is_an_error(case: str, ours: Path, tmp_path: Path) -> None:
    change, said = BROKEN[case]
    folder = tmp_path / "theirs"
    shutil.copytree(ours, folder)
    (folder / "qfx_quant.json").unlink()  # as if another tool had written it: no sizes and hashes
    qfx.load(folder)
    change(folder)
    with pytest.raises(PackageError) as error:
        qfx.load(folder)
    message = str(error.value)
    assert said in message and message.startswith(f"load: {folder}: ") and "\n" not in message


def test_files_that_qfx_wrote_are_compared(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(ours, folder)
    text = (folder / "report.json").read_text()
    (folder / "report.json").write_text(text.replace("LlamaForCausalLM", "LlamaForCausalXX"))
    qfx.load(folder, verify=False)
    with pytest.raises(PackageError, match=r"report\.json is not what was saved"):
        qfx.load(folder)
    (folder / "report.json").write_text(text[:-5])
    with pytest.raises(PackageError, match="truncated"):
        qfx.load(folder, verify=False)


def test_tensors_that_the_class_leaves_out_are_left_out(ours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(ours, folder)
    (folder / "qfx_quant.json").unlink()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda t: t.update({name: torch.ones(4)}))(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"rotary_emb\.inv_freq"])
        assert torch.equal(logits(qfx.load(folder), inputs_of("llama")), logits(qfx.load(ours), inputs_of("llama")))
    with pytest.raises(PackageError, match="inv_freq"):
        qfx.load(folder)


def test_an_instance_is_not_needed_and_an_attention_can_be_chosen(ours: Path) -> None:
    with pytest.raises(PackageError, match="drop model="):
        qfx.load(ours, nn.Linear(2, 2))
    loaded: Any = qfx.load(ours, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(PackageError, match="no such folder"):
        qfx.load(ours / "nowhere")


def test_the_command_writes_a_format_and_measures_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=4096, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "float")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(demo_calibration().read_text()[:2000])
    (tmp_path / "recipe.yaml").write_text("schemes: {'*': W8A16}\nignore: ['@head']\n")

    def run(*args: object) -> Any:
        return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in args])

    common = ("quantize", tmp_path / "float", "-r", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--format")
    assert "no format 'gguf'" in run(*common, "gguf").output and not (tmp_path / "out").exists()
    done = run(*common, CT)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == CT
    shown = run("eval", tmp_path / "out", "-t", tmp_path / "text.txt", "--window", 16)
    assert shown.exit_code == 0 and "perplexity" in shown.output, shown.output
    again = run("quantize", tmp_path / "out", "-r", "w8a8-gptq", "-c", tmp_path / "text.txt", "-o", tmp_path / "twice")
    assert again.exit_code == 1 and "quantized already" in again.output
