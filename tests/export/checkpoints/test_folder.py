"""A folder for other engines: transformers loads it and computes the same, qfx loads it and has the same bits."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, CompressedTensorsConfig, conversion_mapping
from transformers.core_model_loading import WeightRenaming

import qfx
from qfx import _shards
from qfx.assets import demo_model
from qfx.core.errors import PackageError
from qfx.export.checkpoints._rehearse import edit_config
from qfx.export.checkpoints.formats import FORMATS
from qfx.modules.linear import QLinear
from tests.export.checkpoints.models import (
    CLOSE,
    SAME,
    by_transformers,
    codes,
    distance,
    inputs_of,
    logits,
    quantized,
    wide,
    worst_linear,
)
from tests.plain import Plain
from tests.zoo import ZOO

FORMAT = "compressed-tensors"
DYNAMIC = ("W8A8", "W4A8_G16", "FP8_DYNAMIC")
# transformers makes no room for packed zero points; it takes them if it may dequantize as it loads
PACKED_ZEROS = ("W4A16_ASYM_G16", "W8A16_ASYM_G16")
CASES = [
    *(("llama", s) for s in ("W4A16_G16", "W8A16", "W2A16_G32", "W8A8", "W8A8_STATIC", "W4A8_G16", "FP8")),
    *(("llama", s) for s in ("FP8_DYNAMIC", "W8A8_STATIC_ASYM", *PACKED_ZEROS)),
    *(("opt", s) for s in ("W4A16_G16", "W8A8_STATIC")),
    *(("qwen2", s) for s in ("W4A16_CHANNEL", "FP8_DYNAMIC")),
    *(("llama_tied", s) for s in ("W8A8", "W4A16_G16")),
    ("bert", "W8A8"),
]
UNTIED = [("llama_tied", "W4A16_G16"), ("bert", "W8A16")]


def reload(model: Any, folder: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qfx.save(model, folder, format=FORMAT, **settings)
        return qfx.load(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def names_in(folder: Path) -> dict[str, str]:
    """Tensors by name, and their files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_transformers_computes_the_same(name: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = quantized(name, scheme), inputs_of(name)
    qfx.save(model, tmp_path / "out", format=FORMAT)
    settings = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if scheme in PACKED_ZEROS else {}
    theirs, floats = by_transformers(tmp_path / "out", type(model).__name__, **settings), ZOO[name].load()[0]
    found = logits(theirs, inputs)
    if scheme not in DYNAMIC:
        assert distance(found, logits(wide(model), inputs)) < CLOSE
    assert worst_linear(theirs, wide(model)) < SAME
    assert distance(found, logits(floats, inputs)) > 3 * CLOSE  # the float model is not that near
    assert worst_linear(floats, model) > 3 * CLOSE


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_qfx_loads_the_same_bits(name: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = quantized(name, scheme), inputs_of(name)
    loaded = reload(model, tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    ours, theirs = codes(model), codes(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert loaded.qfx.report == model.qfx.report and loaded.qfx.recipe == model.qfx.recipe
    assert loaded.qfx.example == model.qfx.example and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "scheme"), UNTIED)
def test_a_quantized_head_is_untied(name: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = quantized(name, scheme, head=True), inputs_of(name)
    loaded = reload(model, tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    theirs = by_transformers(tmp_path / "out", type(model).__name__)
    assert distance(logits(theirs, inputs), logits(model, inputs)) < CLOSE


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    qfx.save(quantized("llama_tied", "W8A8"), tmp_path / "out", format=FORMAT)
    names = names_in(tmp_path / "out")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    loaded: Any = qfx.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_float_head_that_a_fold_changed_is_untied(tmp_path: Path) -> None:
    model = copy.deepcopy(quantized("llama_tied", "W4A16_G16"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    loaded = reload(model, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    inputs = inputs_of("llama_tied")
    theirs = by_transformers(tmp_path / "out", "LlamaForCausalLM")
    assert distance(logits(theirs, inputs), logits(model, inputs)) < CLOSE
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_schemes_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    model, inputs = ZOO["llama"].load()
    schemes = {"*": "W4A16_G16", "*.o_proj": "W8A8", "*.down_proj": "FP8_DYNAMIC", "*.q_proj": None}
    model = qfx.quantize(model, {"schemes": schemes}, [inputs], progress=False)
    loaded = reload(model, tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["format"] == "mixed-precision"
    assert settings["ignore"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    theirs = by_transformers(tmp_path / "out", "LlamaForCausalLM")
    logits(theirs, inputs)  # decompresses
    assert worst_linear(theirs, wide(model)) < SAME


def test_shards_have_an_index_and_hold_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = quantized("qwen2", "W4A16_CHANNEL"), inputs_of("qwen2")
    sizes, write = [], _shards.save_file

    def counted(tensors: Any, *args: Any, **more: Any) -> None:
        sizes.append(sum(t.nbytes for t in tensors.values()))
        write(tensors, *args, **more)

    monkeypatch.setattr(_shards, "save_file", counted)
    loaded = reload(model, tmp_path / "out", max_shard_size="20KB")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == names_in(tmp_path / "out") and index["metadata"]["total_size"] == sum(sizes)
    biggest = max(p.nbytes for p in model.parameters())
    assert len(sizes) > 3 and max(sizes) <= max(20_000, biggest)
    by_transformers(tmp_path / "out", "Qwen2ForCausalLM")


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    model = quantized("opt", "W4A16_G16")
    qfx.save(model, tmp_path / "out", format=FORMAT, tokenizer=demo_model())
    said = json.loads((tmp_path / "out" / "qfx_quant.json").read_text())
    assert said["format"] == FORMAT and said["schemes"] == {"W4A16_G16": 12} and said["versions"]["qfx"]
    held = {p.name for p in (tmp_path / "out").iterdir()} - {"qfx_quant.json"}
    assert held == set(said["files"]) and {"report.json", "generation_config.json", "model.safetensors"} <= held
    assert config_of(tmp_path / "out")["architectures"] == ["OPTForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = copy.deepcopy(quantized("opt", "W4A16_G16")).to(dtype), inputs_of("opt")
    loaded = reload(model, tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert {m.dtype for m in loaded.modules() if isinstance(m, QLinear)} == {dtype}


def test_what_was_loaded_is_a_model_of_qfx(tmp_path: Path) -> None:
    model, inputs = quantized("llama", "W8A8"), inputs_of("llama")
    loaded = reload(model, tmp_path / "out")
    for format in ("qfx", FORMAT):
        qfx.save(loaded, tmp_path / format, format=format)
        assert torch.equal(logits(qfx.load(tmp_path / format), inputs), logits(model, inputs))
    assert config_of(tmp_path / "qfx").get("quantization_config", {}).get("quant_method") != FORMAT
    qfx.lower(loaded)
    qfx.save(loaded, tmp_path / "lowered", format=FORMAT)  # layouts of kernels are none of a checkpoint's
    assert torch.equal(logits(qfx.load(tmp_path / "lowered"), inputs), logits(model, inputs))
    with pytest.raises(PackageError, match=r"qfx\.save"):
        loaded.save_pretrained(tmp_path / "theirs")


SHIFTS = {"outlier_suppression_plus": {"shift_rmsnorm": True, "steps": 4}}
ONLINE = {"smoothquant": {"online": True}}
REFUSED: dict[str, tuple[str, dict[str, Any] | str, str]] = {
    "shifted norms": ("llama", {"schemes": {"*": "W8A8"}, "steps": [SHIFTS]}, "adds a shift"),
    "online maps": ("opt_post_norm", {"schemes": {"*": "W8A8"}, "steps": [ONLINE], "ignore": ["@head"]}, "maps its"),
    "experts": ("mixtral", {"schemes": {"*": "W8A8"}, "ignore": ["@router"]}, "quantized parameter"),
    "Conv1D": ("gpt2", "W8A8", "is a Conv1D"),
    "codebook": ("llama", "NF4_G16", "no nf4 weights; nearest: W4A16_G32"),
    "odd bits": ("llama", "W3A16_G16", "nearest: W4A16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_again_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    name, recipe, said = REFUSED[case]
    model, inputs = ZOO[name].load()
    model = (
        qfx.quantize(model, recipe, [inputs], progress=False) if isinstance(recipe, dict) else quantized(name, recipe)
    )
    with pytest.raises(PackageError) as error:
        qfx.save(model, tmp_path / "out", format=FORMAT)
    message = str(error.value)
    assert said in message and message.startswith("save: ") and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    model: Any = ZOO["llama"].load()[0]
    model.qfx = quantized("llama", "W8A8").qfx
    with pytest.raises(PackageError, match="no quantized linears"):
        qfx.save(model, tmp_path / "out", format=FORMAT)
    assert list(tmp_path.iterdir()) == []


def changed(case: str) -> Any:
    model = copy.deepcopy(quantized("llama", "W8A8"))
    projection = model.model.layers[0].self_attn.o_proj
    if case == "a bias":
        del projection.bias
        projection.register_buffer("bias", torch.zeros(64))
    elif case == "other sizes":
        model.config.intermediate_size = 128
    elif case == "fewer layers":
        model.config.num_hidden_layers = 1
    elif case == "another tensor":
        model.model.norm.extra = nn.Parameter(torch.zeros(3))
    elif case == "no values":
        model.model.norm.register_buffer("extra", torch.zeros(3, device="meta"))
    else:
        projection.to("meta")
    return model


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("a bias", "without shifts"),
        ("other sizes", r"builds one of \[128, 64\]"),
        ("fewer layers", "builds no model.layers.1"),
        ("another tensor", r"model.norm.extra is \[3\]"),
        ("no values", "model.norm.extra is on the meta device"),
        ("no codes", "o_proj is on the meta device"),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_refused(case: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=said):
        qfx.save(changed(case), tmp_path / "out", format=FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_linears_that_the_format_would_take_for_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS[FORMAT]
    config = form.config
    monkeypatch.setattr(form, "config", lambda layers, floats: config(layers, []))  # forgets what stays in float
    with pytest.raises(PackageError, match="lm_head stays in float"):
        qfx.save(quantized("llama", "W8A8"), tmp_path / "out", format=FORMAT)


def test_names_that_transformers_takes_for_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = WeightRenaming("q_proj", "k_proj")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(PackageError, match=r"q_proj\.\w+ under another name"):
        qfx.save(quantized("llama", "W8A8"), tmp_path / "out", format=FORMAT)


def test_a_text_model_inside_another_is_untied_as_well(tmp_path: Path) -> None:
    path, data = tmp_path / "config.json", {"text_config": {"tie_word_embeddings": True}, "dtype": "float32"}
    path.write_text(json.dumps(data))
    edit_config(tmp_path, {"tie_word_embeddings": False, "dtype": "bfloat16"})
    said = config_of(tmp_path)
    assert said["text_config"] == {"tie_word_embeddings": False} and not said["tie_word_embeddings"]
    assert said["dtype"] == "bfloat16"


def test_buffers_that_are_made_anew_are_compared(tmp_path: Path) -> None:
    model = copy.deepcopy(quantized("llama", "W8A8"))
    model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.warns(UserWarning, match="inv_freq"):
        qfx.save(model, tmp_path / "out", format=FORMAT)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    qfx.save(quantized("llama", "W8A8"), folder, format=FORMAT)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    written, write = [], _shards.save_file

    def full(tensors: Any, path: Path, **more: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(tensors, path, **more)

    monkeypatch.setattr(_shards, "save_file", full)
    for target in (folder, tmp_path / "new"):
        written.clear()
        with pytest.raises(PackageError, match=r"No space left on device; what was there is as it was"):
            qfx.save(quantized("llama", "W4A16_G16"), target, format=FORMAT, max_shard_size="20KB")
        assert len(written) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_replaced_only_if_it_is_ours(tmp_path: Path) -> None:
    model = quantized("llama", "W8A8")
    folder = tmp_path / "out"
    qfx.save(model, folder)
    qfx.save(model, folder, format=FORMAT)
    assert not (folder / "qfx.json").exists() and (folder / "qfx_quant.json").exists()
    with pytest.raises(PackageError, match="overwrite=True"):
        qfx.save(model, folder, format=FORMAT, overwrite=False)
    (folder / "README.md").write_text("mine")
    with pytest.raises(PackageError, match=r"README\.md"):
        qfx.save(model, folder, format=FORMAT)
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="save: "):
        qfx.save(model, tmp_path / "file" / "out", format=FORMAT)
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


OTHERS = [("gptq", "W4A16_ASYM_G16"), ("awq", "W4A16_ASYM_G32"), ("bitsandbytes", "W8A8")]


@pytest.mark.parametrize(("form", "scheme"), OTHERS)
def test_the_other_formats_go_through_the_same_door(form: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = quantized("llama", scheme), inputs_of("llama")
    folder = tmp_path / "out"
    qfx.save(model, folder, format=form)
    assert config_of(folder)["quantization_config"]["quant_method"] == form
    assert torch.equal(logits(qfx.load(folder), inputs), logits(model, inputs))


def test_zero_points_of_0_are_saved_in_the_second_version_of_gptq(tmp_path: Path) -> None:
    model, inputs = copy.deepcopy(quantized("llama", "W4A16_ASYM_G16")), inputs_of("llama")
    model.model.layers[1].mlp.up_proj.weight_zero[3, 1] = 0
    with pytest.raises(PackageError, match="use format='gptq_v2'"):
        qfx.save(model, tmp_path / "out", format="gptq")
    qfx.save(model, tmp_path / "out", format="gptq_v2")
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert torch.equal(logits(qfx.load(tmp_path / "out"), inputs), logits(model, inputs))
    change = {"quantization_config": {**settings, "quant_method": "gptq_v2"}}
    edit_config(tmp_path / "out", change)  # no reader knows such a method
    with pytest.raises(PackageError, match="quant_method 'gptq_v2'; qfx reads"):
        qfx.load(tmp_path / "out", verify=False)


def test_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no format 'gguf'; use qfx, compressed-tensors"):
        qfx.save(quantized("llama", "W8A8"), tmp_path / "out", format="gguf")
    with pytest.raises(PackageError, match="not a class of transformers"):
        qfx.save(Plain(), tmp_path / "out", format=FORMAT)
