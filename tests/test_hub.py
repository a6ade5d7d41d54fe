"""`from_pretrained` gives what `qfx.load` gives, bit by bit, or one clear error."""

import copy
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import qfx
from qfx import _registration, checkpoints
from qfx.hub import QfxConfig, QfxQuantizer
from tests.test_package import ALL_SHIFTS, GPTQ, ONLINE, same, structure, tokens
from tests.zoo import ZOO

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tied, head quantized": ("llama_tied", AutoModelForCausalLM, {"schemes": {"*": "W8A8"}}),
    "tied, head float": (
        "llama_tied",
        AutoModelForCausalLM,
        {"schemes": {"*": "W8A8_STATIC_ASYM"}, "steps": [ALL_SHIFTS], "ignore": ["@head"]},
    ),
    "fp8": ("opt", AutoModelForCausalLM, {"schemes": {"*": "FP8_DYNAMIC"}}),
    "nf4": ("gpt2", AutoModelForCausalLM, {"schemes": {"*": "NF4_DQ_G16"}, "ignore": ["@head"]}),
    "g_idx": ("qwen2", AutoModelForCausalLM, {"schemes": {"*": "W4A16_ASYM_G16"}, "steps": [GPTQ]}),
    "online": (
        "opt_post_norm",
        AutoModelForCausalLM,
        {"schemes": {"*": "W8A8"}, "steps": [ONLINE], "ignore": ["@head"]},
    ),
    "experts": ("mixtral", AutoModelForCausalLM, {"schemes": {"*": "W8A8_STATIC"}, "ignore": ["@router"]}),
    "encoder": ("bert", AutoModelForMaskedLM, {"schemes": {"*": "W8A8"}}),
}
SHARD = 20_000
Folder = tuple[Path, nn.Module, dict[str, Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """Each case's model is quantized and saved once; change neither."""
    made: dict[str, Folder] = {}

    def get(case: str) -> Folder:
        if case not in made:
            name, _, recipe = CASES[case]
            model, inputs = ZOO[name].load()
            model = qfx.quantize(model, recipe, [inputs], progress=False)
            folder = tmp_path_factory.mktemp("saved") / "folder"
            qfx.save(model, folder, max_shard_size=SHARD)
            made[case] = folder, model, inputs
        return made[case]

    return get


@pytest.fixture
def mine(saved: Callable[[str], Folder], tmp_path: Path) -> Path:
    """A copy of one's own to damage, of a llama with tied embeddings in several files."""
    return Path(shutil.copytree(saved("tied, head float")[0], tmp_path / "mine"))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().float() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def quietly(cls: Any, folder: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cls.from_pretrained(folder, **settings)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_load_gives(
    case: str, saved: Callable[[str], Folder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model, inputs = saved(case)
    assert len(list(folder.glob("*.safetensors"))) > 1
    want = qfx.load(folder)
    before = torch.random.get_rng_state()
    transformers.utils.logging.enable_propagation()
    got, info = quietly(CASES[case][1], folder, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    assert not any(info.values()) and not [r for r in caplog.records if r.levelname == "WARNING"]
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing was drawn at random
    assert type(got) is type(model) and structure(got) == structure(want) == structure(model)
    a, b = values(want), values(got)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert same(model, got, inputs)
    if hasattr(model, "generate"):
        assert torch.equal(tokens(got, inputs), tokens(want, inputs))
        assert got.generation_config.to_dict() == want.generation_config.to_dict()
    assert got.qfx.report == model.qfx.report and got.qfx.recipe == model.qfx.recipe
    with pytest.raises(qfx.errors.PackageError, match=r"use qfx.save\(model, folder\)"):
        got.save_pretrained(tmp_path / "wrong")
    ours, theirs = want.config.to_dict(), got.config.to_dict()
    assert {n for n in ours | theirs if ours.get(n) != theirs.get(n)} == {"_name_or_path", "quantization_config"}
    assert got.hf_quantizer.is_serializable() is False
    with torch.no_grad():  # and what is compared here would show a change
        next(got.parameters()).mul_(1.01)
    assert not same(model, got, inputs) and not all(torch.equal(a[n], t) for n, t in values(got).items())


def test_what_was_loaded_is_saved_and_deep_copied(saved: Callable[[str], Folder], tmp_path: Path) -> None:
    folder, model, inputs = saved("tied, head quantized")
    got = type(model).from_pretrained(folder)  # a class, which does not tell the quantizer the folder
    qfx.save(copy.deepcopy(got), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "qfx", "weights": "model-00001-of-00001.safetensors"}
    }
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"), inputs)
    assert "quantization_config" not in qfx.load(tmp_path / "again").config.to_dict()


def test_dtypes_are_the_saved_ones(saved: Callable[[str], Folder]) -> None:
    folder, model, inputs = saved("fp8")
    for name, dtype in (("dtype", torch.float16), ("dtype", "bfloat16"), ("torch_dtype", torch.float16)):
        with pytest.warns(UserWarning, match=r"dtype=torch\.\w+ is not used"):
            got = AutoModelForCausalLM.from_pretrained(folder, **{name: dtype})
        assert structure(got) == structure(model) and same(model, got, inputs) and got.dtype == torch.float32


def test_a_dtype_that_is_not_used_is_told(saved: Callable[[str], Folder], tmp_path: Path) -> None:
    _, model, inputs = saved("tied, head float")
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    qfx.save(model, tmp_path / "saved")
    got = quietly(AutoModelForCausalLM, tmp_path / "saved", dtype=torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"from_pretrained: .*: dtype=torch.float16 is not used, .* cast the float"
    ) as w:
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float16)
    assert [one.filename for one in w] == [__file__]
    for one in (got, other):
        assert structure(one) == structure(model) and same(model, one, inputs)
        assert one.config.dtype == one.dtype == torch.bfloat16


def test_settings_of_the_caller_are_kept(saved: Callable[[str], Folder], tmp_path: Path) -> None:
    folder, model, inputs = saved("tied, head float")
    assert model.config._attn_implementation == "sdpa"
    for cls in (AutoModelForCausalLM, type(model)):
        got = cls.from_pretrained(folder, attn_implementation="eager", output_hidden_states=True, use_cache=False)
        out = got(**inputs)
        assert got.config._attn_implementation == "eager" and out.hidden_states and out.past_key_values is None
    want = qfx.load(folder, attn_implementation="eager")
    assert same(want, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), inputs)
    config = AutoConfig.from_pretrained(folder, use_cache=False)
    assert AutoModelForCausalLM.from_pretrained(folder, config=config).config.use_cache is False
    qfx.save(want, tmp_path / "eager")  # what was saved is kept, too
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "eager").config._attn_implementation == "eager"
    with pytest.raises(qfx.errors.PackageError, match=r"from_pretrained: .*has no module model\.layers\.1\."):
        AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=1)


def test_one_device(saved: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, inputs = saved("tied, head float")
    # for one device, transformers asks only that accelerate is there, and does not use it
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: True)
    cpu: list[Any] = ["cpu", {"": "cpu"}, torch.device("cpu"), {"model": "cpu", "lm_head": "cpu"}]
    for device_map in cpu if torch.accelerator.is_available() else [*cpu, "auto"]:
        assert same(model, AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), inputs)
    for device_map, some in (({"model": "cpu", "lm_head": "disk"}, "cpu, disk"), ({"": "meta"}, "meta"), ({}, "none")):
        with pytest.raises(qfx.errors.PackageError, match=f"device_map names the devices {some}, .*; name one"):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    with pytest.raises(qfx.errors.PackageError, match=r"^from_pretrained: .*the device 'xpu:77' is not there \("):
        AutoModelForCausalLM.from_pretrained(folder, device_map="xpu:77")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first weights": (lambda f: first(f).unlink(), r"model-00001\S+ is missing; copy or save"),
    "last weights": (lambda f: sorted(f.glob("*.safetensors"))[-1].unlink(), r"model-\S+ is missing; copy or save"),
    "truncated": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), r"model-00001\S+ is truncated, "),
    "one bit": (lambda f: flip(first(f)), r"model-00001\S+ is not what was saved, its hash differs"),
    "no report": (lambda f: (f / "report.json").unlink(), r"report\.json is missing"),
    "no manifest": (lambda f: (f / "qfx.json").unlink(), r"not a qfx folder, it has no qfx\.json"),
    "manifest": (lambda f: (f / "qfx.json").write_text("{"), r"qfx\.json is not JSON"),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("auto", [True, False])
def test_a_damaged_folder_is_one_error(what: str, auto: bool, mine: Path) -> None:
    damage, match = DAMAGE[what]
    damage(mine)
    cls = AutoModelForCausalLM if auto else transformers.LlamaForCausalLM
    with pytest.raises(qfx.errors.PackageError, match=rf"^from_pretrained: {re.escape(str(mine))}: {match}") as error:
        cls.from_pretrained(mine)
    assert "\n" not in str(error.value)
    with pytest.raises(qfx.errors.PackageError, match=match):
        qfx.load(mine)


def test_another_class_is_an_error(saved: Callable[[str], Folder]) -> None:
    llama, bert = saved("tied, head float")[0], saved("encoder")[0]
    for cls, folder, was, now in (
        (AutoModel, llama, "LlamaForCausalLM", "LlamaModel"),
        (transformers.AutoModelForSequenceClassification, llama, "LlamaForCausalLM", "LlamaForSequenceClassification"),
        (transformers.AutoModelForSequenceClassification, bert, "BertForMaskedLM", "BertForSequenceClassification"),
        (transformers.BertModel, bert, "BertForMaskedLM", "BertModel"),
    ):
        match = f"the saved model is a {was}, not a {now}; use {was}.from_pretrained or qfx.load"
        with pytest.raises(qfx.errors.PackageError, match=match):
            cls.from_pretrained(folder)


def test_a_bare_model_and_a_classifier(tmp_path: Path) -> None:
    config = ZOO["bert"].load()[0].config
    inputs = ZOO["bert"].inputs()
    for auto, cls in (
        (transformers.AutoModelForSequenceClassification, transformers.BertForSequenceClassification),
        (AutoModel, transformers.BertModel),
    ):
        model = qfx.quantize(cls(config).eval(), "w8a8", [inputs], progress=False)
        qfx.save(model, tmp_path / "saved")
        assert same(model, quietly(auto, tmp_path / "saved"), inputs)
    with pytest.raises(qfx.errors.PackageError, match="the arguments given change the model that the class builds"):
        transformers.BertModel.from_pretrained(tmp_path / "saved", add_pooling_layer=False)


def test_what_is_not_done_is_said(saved: Callable[[str], Folder], tmp_path: Path) -> None:
    folder, _, _ = saved("tied, head float")
    with pytest.raises(qfx.errors.PackageError, match="use_kernels=True would replace modules"):
        AutoModelForCausalLM.from_pretrained(folder, use_kernels=True)
    config = AutoConfig.from_pretrained(folder)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(qfx.errors.PackageError, match="it is loaded to one device, not distributed"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = "some/name"
    with pytest.raises(qfx.errors.PackageError, match="hf download some/name --local-dir FOLDER"):
        QfxQuantizer(QfxConfig()).update_attn_implementation(config)
    ZOO["llama_tied"].load()[0].save_pretrained(tmp_path / "float")
    with pytest.raises(qfx.errors.PackageError, match=r"^from_pretrained: this .* quantize with qfx.quantize$"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=QfxConfig())
    with pytest.raises(qfx.errors.QfxError, match=r"was saved by qfx, qfx.load\('.*'\) loads it; here, start from the"):
        checkpoints.load_model(folder)


def test_folders_without_the_mark(mine: Path, saved: Callable[[str], Folder]) -> None:
    _, model, inputs = saved("tied, head float")
    config = json.loads((mine / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "qfx", "weights": first(mine).name}
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(qfx.errors.PackageError, match=r"config\.json is truncated"):
        qfx.load(mine)
    manifest = json.loads((mine / "qfx.json").read_text())
    manifest["files"].pop("config.json")
    entry = qfx.package.describe_files(mine)["config.json"]  # type: ignore[attr-defined]
    manifest["files"]["config.json"] = entry.model_dump()
    (mine / "qfx.json").write_text(json.dumps(manifest))
    assert same(model, qfx.load(mine), inputs)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # not garbage
        AutoModelForCausalLM.from_pretrained(mine)


LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model.qfx).__name__ == "Quantized" and type(model.hf_quantizer).__name__ == "QfxQuantizer"
assert not any(type(f).__module__ == "qfx._registration" for f in sys.meta_path)
spec = sys.modules["transformers.quantizers"].__spec__
assert type(spec.loader).__name__ == "SourceFileLoader" and spec.loader is transformers.quantizers.__loader__
"""
QFX_FIRST = (
    """
import sys, qfx
assert not {{"torch", "transformers", "qfx.hub"}} & set(sys.modules)
import importlib, importlib.util
importlib.reload(qfx)  # still one finder
assert sum(type(f).__module__ == "qfx._registration" for f in sys.meta_path) == 1
import transformers
assert importlib.util.find_spec("transformers.quantizers").loader.get_filename().endswith("__init__.py")
assert "transformers.quantizers" not in sys.modules
"""
    + LOAD
)
TRANSFORMERS_FIRST = (
    """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained({folder!r})
except OSError as e:
    assert "no file named model.safetensors" in str(e)
else:
    raise AssertionError("random weights")
assert "qfx" not in sys.modules
import qfx
"""
    + LOAD
)


@pytest.mark.parametrize("code", [QFX_FIRST, TRANSFORMERS_FIRST], ids=["qfx first", "transformers first"])
def test_both_orders_of_import(code: str, saved: Callable[[str], Folder]) -> None:
    command = [sys.executable, "-c", code.format(folder=str(saved("tied, head float")[0]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited_module.py").write_text("ran = True")
    monkeypatch.setattr(_registration, "AWAITED", "awaited_module")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = [*sys.meta_path]
    _registration.register_with_transformers()
    _registration.register_with_transformers()
    assert len(sys.meta_path) == len(before) + 1
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module_anywhere")
    monkeypatch.setitem(sys.modules, "qfx.hub", None)  # its import fails
    with pytest.warns(UserWarning, match=r"will not load folders of qfx \(ModuleNotFoundError: .*; qfx.load does"):
        import awaited_module  # type: ignore[import-not-found]
    monkeypatch.delitem(sys.modules, "awaited_module")
    assert awaited_module.ran and sys.meta_path == before
