"""The command: each of its six verbs on a tiny model, and what a user sees when something is wrong."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import qfx
from qfx.assets import demo_calibration, demo_model
from qfx.cli import app
from qfx.recipes import PRESETS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
FAST = ("--samples", "4", "--sequence", "16")
CAUSAL, MASKED = "LlamaForCausalLM", "BertForMaskedLM"


def run(*args: object) -> Result:
    # of a fixed width: what runs the tests may say that the terminal has 80 columns
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in args])


def passes(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float decoder (32 bits and 16), a quantized one, an encoder, and a text."""
    work = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    config = LlamaConfig(**SIZES, intermediate_size=64, vocab_size=4096, num_key_value_heads=1)
    decoder = LlamaForCausalLM(config)
    encoder = BertForMaskedLM(BertConfig(**SIZES, intermediate_size=64, vocab_size=4096))
    for name, model in (("decoder", decoder), ("encoder", encoder)):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    decoder.half().save_pretrained(work / "half")
    tokenizer.save_pretrained(work / "half")
    (work / "text.txt").write_text(demo_calibration().read_text()[:6000])
    passes("quantize", work / "decoder", "-r", "w8a8-smoothquant", "-c", work / "text.txt", "-o", work / "int8", *FAST)
    return work


def test_export_and_eval_of_what_was_exported(work: Path) -> None:
    shown = passes("export", work / "int8", "-o", work / "onnx").stdout
    assert "14 linears of W8A8 as MatMulInteger" in shown and "in ONNX Runtime" in shown
    args = ("--text", work / "text.txt", "--max-windows", 2)
    values = [
        float(re.search(r"perplexity (\S+)", passes("eval", work / folder, *args).stdout)[1])  # type: ignore[index]
        for folder in ("int8", "onnx")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert "exists; choose another --output" in run("export", work / "int8", "-o", work / "onnx").output
    assert "is not a quantized model" in run("export", work / "decoder", "-o", work / "new").output
    refused = run("export", work / "int8", "-o", work / "new", "--target", "tensorrt").output
    assert "nearest scheme is W8A8_STATIC" in refused and not (work / "new").exists()


def test_quantize_prints_the_report_and_saves(work: Path) -> None:
    args = ("-r", "w8a8-static-osplus", "-c", work / "text.txt", "-o", work / "static", *FAST)
    shown = passes("quantize", work / "decoder", *args, "--seed", 3, "--verbose").stdout
    assert "of linear weights (14 of 15 linears)" in shown and f"saved to {work / 'static'}" in shown
    assert "outlier_suppression_plus" in shown and "model.layers.1.mlp.down_proj" in shown and "int8_linear" in shown
    model = qfx.load(work / "static")
    assert type(model).__name__ == CAUSAL and model.qfx.recipe == qfx.Recipe.load("w8a8-static-osplus")
    assert AutoTokenizer.from_pretrained(work / "static").vocab_size == 4096


def test_a_recipe_from_yaml_needs_no_text(work: Path) -> None:
    recipe, out = work / "recipe.yaml", work / "yaml"
    recipe.write_text("schemes:\n  '*': W8A8\n  mlp.*: {preset: W4A16, group_size: 32}\nignore: ['@head']\n")
    passes("quantize", work / "decoder", "-r", recipe, "-o", out, "--dtype", "bfloat16")
    model = qfx.load(out)
    assert {layer.scheme for layer in model.qfx.report.layers} == {"W8A8", "W4A16_G32", None}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_an_interrupted_run_goes_on(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, out = work / "kept", work / "resumed"
    args = (
        "quantize",
        work / "decoder",
        "-r",
        "w8a8-gptq",
        "-c",
        work / "text.txt",
        *FAST,
        "--resume",
        kept,
        "-o",
        out,
    )
    with monkeypatch.context() as patch:
        patch.setattr("qfx.package.write_shards", interrupt)
        assert run(*args).exit_code == 130 and not out.exists()
    assert any(kept.iterdir())
    passes(*args)
    assert len(qfx.load(out).qfx.report.layers) == 15


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_an_encoder_keeps_its_class(work: Path) -> None:
    passes("quantize", work / "encoder", "-r", "w8a8-smoothquant", "-c", work / "text.txt", "-o", work / "mlm", *FAST)
    assert type(qfx.load(work / "mlm")).__name__ == MASKED


def test_a_float16_checkpoint_is_loaded_as_float32(work: Path) -> None:
    result = passes("quantize", work / "half", "-r", "w8a8", "-o", work / "from_half")
    assert "note: the checkpoint is float16: loaded as float32" in result.stderr and "note:" not in result.stdout
    assert qfx.load(work / "from_half").lm_head.weight.dtype == torch.float32


def test_overwrite_replaces_a_saved_model_only(work: Path) -> None:
    out = work / "twice"
    passes("quantize", work / "decoder", "-r", "w8a8", "-o", out)
    assert (
        "exists; choose another --output, or --overwrite"
        in run("quantize", work / "decoder", "-r", "w8a16", "-o", out).stderr
    )
    assert qfx.load(out).qfx.recipe == qfx.Recipe.load("w8a8")
    passes("quantize", work / "decoder", "-r", "w8a16", "-o", out, "--overwrite")
    assert qfx.load(out).qfx.recipe == qfx.Recipe.load("w8a16")
    refused = run("quantize", work / "decoder", "-r", "w8a16", "-o", work / "encoder", "--overwrite")
    assert refused.exit_code == 1 and "not a qfx folder" in refused.stderr
    assert (work / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize("folder", ["decoder", "int8"])
def test_eval_measures_float_and_quantized(work: Path, folder: str) -> None:
    shown = passes("eval", work / folder, "--text", work / "text.txt", "--window", 32, "--max-windows", 5).stdout
    value = float(shown.split()[1])
    assert 3500 < value < 4800  # random weights: about the vocabulary
    assert "155 tokens in 5 windows of 32, each predicting" in shown
    shown = passes("eval", work / folder, "-t", work / "text.txt", "--max-windows", 2, "--overlap-one").stdout
    assert "128 tokens in 2 windows of 64, overlapping by one token" in shown  # the model's positions


def test_explain_solves_nothing(work: Path) -> None:
    shown = passes("explain", work / "decoder", "--recipe", "w8a8-smoothquant").stdout
    assert shown.startswith(f"{CAUSAL}: would quantize ") and "(14 of 15 linears)" in shown
    assert "use 4 of 9 sites; needs calibration data" in " ".join(shown.split())
    assert "model.layers.*.mlp.down_proj" in shown and "lm_head" in shown and "ignored by '@head'" in shown
    assert "model.layers.1.mlp.down_proj" in passes("explain", work / "decoder", "-r", "w8a8", "--verbose").stdout


def test_inspect_of_what_was_exported(work: Path, tmp_path: Path) -> None:
    passes("export", work / "int8", "-o", tmp_path / "onnx")
    shown = passes("inspect", tmp_path / "onnx").stdout
    assert "ONNX in" in shown and "ort-cpu" in shown and "model.onnx" in shown and "14 of 15 linears" in shown
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"")
    assert "model.onnx is truncated" in run("inspect", tmp_path / "onnx").stderr
    args = ("-r", "w4a16", "--group-size", "32", "-o", tmp_path / "gptq", "--format", "gptq", *FAST)
    passes("quantize", work / "decoder", *args)
    shown = passes("inspect", tmp_path / "gptq").stdout
    assert "gptq in" in shown and "W4A16" in shown and "model.safetensors" in shown
    for name in ("qfx_quant.json", "report.json"):  # as if another tool had written it
        (tmp_path / "gptq" / name).unlink()
    shown = passes("inspect", tmp_path / "gptq").stdout
    assert re.search(r"bits\s+4", shown) and re.search(r"I32\s+\S+\s+", shown) and "LlamaForCausalLM" in shown
    assert "q_proj.qweight" not in shown and "q_proj.qweight" in passes("inspect", tmp_path / "gptq", "-v").stdout
    (tmp_path / "gptq" / "model.safetensors").write_bytes(b"none")
    assert "model.safetensors cannot be read" in run("inspect", tmp_path / "gptq").stderr


def test_inspect_reads_no_weights(work: Path, tmp_path: Path) -> None:
    shown = passes("inspect", work / "int8").stdout
    assert "(14 of 15 linears)" in shown and "14 × W8A8" in shown and "input_ids [4, 16]" in shown
    assert f"qfx {qfx.__version__}" in shown and "tokenizer.json" in shown
    shown = passes("inspect", work / "int8", "-v").stdout
    assert "model.layers.1.mlp.down_proj.weight_codes" in shown
    shutil.copytree(work / "int8", tmp_path / "copy")
    (weights,) = (tmp_path / "copy").glob("*.safetensors")
    weights.write_bytes(bytes(weights.stat().st_size))
    assert passes("inspect", tmp_path / "copy").stdout


def test_recipes_lists_every_preset() -> None:
    first = [line.split()[0] for line in passes("recipes").stdout.splitlines() if line.strip()]
    assert set(PRESETS) <= set(first)


def test_help_and_version() -> None:
    assert passes("--version").stdout == f"qfx {qfx.__version__}\n"
    for verb in ("quantize", "eval", "explain", "inspect", "recipes"):
        assert verb in passes("--help").stdout and "Usage" in passes(verb, "--help").stdout


def broken(work: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the decoder with a fault."""
    folder = work / f"broken-{change.__name__}"
    if not folder.exists():
        shutil.copytree(work / "decoder", folder)
        change(folder)
    return folder


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llamma"}')


def quantized_elsewhere(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lost_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


FAULTS = [no_config, bad_config, unknown_type, quantized_elsewhere, no_weights, half_the_file, lost_weight]
MESSAGES = [
    "has no config.json, it has .*; give the folder of a Hugging Face model",
    "config.json cannot be read",
    "transformers cannot load .*llamma",
    "is quantized already .*start from the float model",
    "transformers cannot load .*no file named model.safetensors",
    "transformers cannot load .*broken-half_the_file: SafetensorError",
    r"lacks 1 weights of LlamaForCausalLM \(model.layers.1.mlp.up_proj.weight\); the checkpoint is incomplete",
]


def one_line_of(result: Result) -> str:
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == "" and isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"), list(zip(FAULTS, MESSAGES, strict=True)), ids=lambda v: getattr(v, "__name__", "")
)
def test_a_broken_checkpoint_is_one_line(work: Path, change: Callable, message: str) -> None:
    said = one_line_of(run("quantize", broken(work, change), "-r", "w8a8", "-o", work / "never"))
    assert re.search(message, said), said
    assert not (work / "never").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quantize", "nowhere", "-r", "w8a8", "-o", "never"), "there is no folder nowhere; download the model first"),
        (("quantize", "decoder", "-r", "w8a7", "-o", "never"), "'w8a7' is no preset and no YAML file; presets: w8a8"),
        (("quantize", "decoder", "-r", "gone.yaml", "-o", "never"), "cannot read gone.yaml"),
        (
            ("quantize", "decoder", "-r", "w4a16", "-o", "never"),
            "which group_size 128 does not divide; use group_size 32",
        ),
        (
            ("quantize", "decoder", "-r", "w4a16-gptq", "-o", "never"),
            "measures activations; give --calibration text.txt",
        ),
        (("quantize", "decoder", "-r", "fp8", "-c", "gone.txt", "-o", "never"), "there is no file gone.txt"),
        (("quantize", "decoder", "-r", "fp8", "-c", "text.txt", "-o", "never", "--sequence", "65"), "has 64 positions"),
        (("quantize", "decoder", "-r", "fp8", "-c", "text.txt", "-o", "never", "--samples", "0"), "samples is 0"),
        (("quantize", "decoder", "-r", "w8a8", "-o", "never", "--dtype", "int8"), "use auto, float32, bfloat16"),
        (("quantize", "decoder", "-r", "w8a8", "-o", "never", "--device", "gpu"), "the device 'gpu' is not there"),
        (("quantize", "decoder", "-r", "w8a8", "-o", "int8"), "int8 exists; choose another --output"),
        (("quantize", "decoder", "-r", "w8a8", "-o", "text.txt"), "text.txt exists; choose another --output"),
        (("quantize", "int8", "-r", "w8a8", "-o", "never"), "int8 is quantized already"),
        (("explain", "int8", "-r", "w8a8"), "int8 is quantized already"),
        (("explain", "decoder", "-r", "w8a7"), "'w8a7' is no preset"),
        (("eval", "nowhere", "-t", "text.txt"), "there is no folder nowhere"),
        (("eval", "decoder", "-t", "gone.txt"), "there is no file gone.txt"),
        (("eval", "decoder", "-t", "text.txt", "--window", "65"), "window 65; the model has 64 positions, use 64"),
        (("eval", "decoder", "-t", "decoder/model.safetensors"), "as UTF-8 text"),
        (("eval", "encoder", "-t", "text.txt"), "BertForMaskedLM is not a causal language model"),
        (("inspect", "decoder"), "inspect: decoder: not a qfx folder, it has no qfx.json"),
        (("inspect", "nowhere"), "inspect: nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(work: Path, args: tuple, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    assert message in one_line_of(run(*args))
    assert not (work / "never").exists()


def test_a_missing_tokenizer_matters_for_text_only(work: Path) -> None:
    folder = broken(work, no_tokenizer)
    text = ("-c", work / "text.txt")
    assert "has none that loads" in one_line_of(run("quantize", folder, "-r", "fp8", *text, "-o", work / "never"))
    assert "has none that loads" in one_line_of(run("eval", folder, "-t", work / "text.txt"))
    passes("quantize", folder, "-r", "fp8-dynamic", "-o", work / "untokenized")


@pytest.mark.parametrize(("module", "name"), [("qfx.quantize", "discover"), ("qfx.package", "write_shards")])
def test_an_interrupt_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setattr(sys.modules[module], name, interrupt)
    before = sorted(work.iterdir())
    result = run("quantize", work / "decoder", "-r", "w8a8", "-o", work / "interrupted")
    assert result.exit_code == 130 and "interrupted: nothing was saved" in result.stderr
    assert sorted(work.iterdir()) == before
