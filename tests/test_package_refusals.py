"""What is not whole, or does not fit, is refused in one line that says what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qfx
from qfx._folder import describe_files
from qfx.core.errors import PackageError
from tests.plain import Plain
from tests.zoo import ZOO

WEIGHTS = "model-00001-of-00001.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = ZOO["llama"].load()
    folder = tmp_path_factory.mktemp("refusals") / "llama"
    qfx.save(qfx.quantize(model, "w8a8", [inputs], progress=False), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "qfx.json") -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    if name != "qfx.json":
        rehash(folder)


def rehash(folder: Path) -> None:
    """As someone would who changes a file and its hash: the other checks must find it."""
    files = {name: entry.model_dump() for name, entry in describe_files(folder).items()}
    edit(folder, lambda manifest: manifest.update(files=files))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refused(match: str, *args: Any, call: Callable[..., Any] = qfx.load, **kwargs: Any) -> None:
    with pytest.raises(PackageError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert re.search(match, text), text
    assert "\n" not in text and ";" in text and text.startswith(f"{call.__name__}: "), text


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda m: m.update(format=2, novelty=1), r"has format 2, this qfx reads up to 1; upgrade qfx"),
    "no format": (lambda m: m.pop("format"), r"is not a manifest of qfx, it has no format"),
    "another type": (lambda m: m["layers"][0].update(in_features="64"), r"layers\.0\.in_features: Input should be"),
    "unknown key": (lambda m: m.update(novelty=1), r"not valid: novelty: unknown key"),
    "unknown inner key": (lambda m: m["layers"][0].update(rank=4), r"not valid: layers\.0\.rank: unknown key"),
    "missing key": (lambda m: m.pop("ties"), r"not valid: ties: Field required"),
    "scheme": (lambda m: m["layers"][0]["scheme"].pop("weight"), r"layers\.0\.scheme: .*no scheme \(KeyError"),
    "scheme key": (lambda m: m["layers"][0]["scheme"].update(kv=1), r"layers\.0\.scheme: .*unknown keys \['kv'\]"),
    "dtype": (lambda m: m["layers"][0].update(dtype="load"), r"layers\.0\.dtype: .*no dtype of torch"),
    "path outside": (lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}), r"'\.\./x', which is not in"),
    "absolute path": (lambda m: m["files"].update({"/x": {"size": 0, "sha256": ""}}), r"'/x', which is not in"),
    "unlisted file": (lambda m: m["files"].pop(WEIGHTS), r"files: model-00001\S+ is not listed"),
    "no such module": (lambda m: m["layers"][0].update(paths=["model.x"]), r"LlamaForCausalLM has no module model\.x"),
    "not a linear": (lambda m: m["layers"][0].update(paths=["model.norm"]), r"model\.norm was a linear of \[out, in\]"),
    "another size": (lambda m: m["layers"][0].update(in_features=32), r"\[out, in\] = \[32, 32\], here .* \(32, 64\)"),
    "no op": (lambda m: m["layers"][0]["scheme"]["weight"].update(block=[2, 2]), r"no op computes .* use the qfx that"),
    "shift without values": (lambda m: m.update(shifts=["model.norm"]), r"it has no tensor model\.norm\.shift; "),
    "no such class": (lambda m: m["model"].update(qualname="Llama9"), r"transformers \S+ has no class Llama9; "),
    "no model class": (lambda m: m["model"].update(qualname="AutoModel"), r"has no class AutoModel; "),
    "no such config": (lambda m: m["model"]["transformers"].update(config="Gone"), r"has no class Gone; "),
    "class of one's own": (lambda m: m["model"].update(transformers=None), r"not a class of transformers; pass model="),
    "tensor missing": (lambda m: m["tensors"].pop("model.norm.weight"), r"lacks tensors of .* \(model\.norm\.weight\)"),
    "tensor extra": (lambda m: m["tensors"].update({"x.y": m["tensors"]["model.norm.weight"]}), r"has no module x; "),
    "tensor shape": (
        lambda m: m["tensors"]["model.norm.weight"].update(shape=[3]),
        r"norm\.weight was saved as a parameter of shape \[3\], here it is a parameter of \[64\]",
    ),
    "tensor kind": (lambda m: m["tensors"]["model.norm.weight"].update(kind="buffer"), r"saved as a buffer of shape"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str, folder: Path) -> None:
    change, match = MANIFESTS[case]
    edit(folder, change)
    refused(match, folder)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), r"no such folder; check the path"),
    "no manifest": (lambda f: (f / "qfx.json").unlink(), r"not a qfx folder, it has no qfx\.json"),
    "half a manifest": (lambda f: (f / "qfx.json").write_bytes((f / "qfx.json").read_bytes()[:99]), r"is not JSON \("),
    "binary manifest": (lambda f: (f / "qfx.json").write_bytes(b"\xff\xfe"), r"is not JSON \("),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model-00001\S+ is missing; copy or save the folder again"),
    "no report": (lambda f: (f / "report.json").unlink(), r"report\.json is missing"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), r"is truncated, [\d,]+ of"),
    "longer": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"1"), r"has [\d,]+ bytes instead of"),
    "one bit of the weights": (lambda f: flip(f / WEIGHTS), r"model-00001\S+ is not what was saved, its hash differs"),
    "one bit of the config": (lambda f: flip(f / "config.json", 20), r"config\.json is not what was saved"),
    "no safetensors": (
        lambda f: ((f / WEIGHTS).write_bytes(b"pickle"), rehash(f)),
        r"model-00001\S+ cannot be read \(",
    ),
    "no report in it": (lambda f: edit(f, lambda r: r.pop("version"), "report.json"), r"report\.json is not a report"),
    "config without sense": (
        lambda f: edit(f, lambda c: c.update(num_attention_heads="four"), "config.json"),
        r"LlamaForCausalLM cannot be built from config\.json: \w+: .*; use the versions",
    ),
    "config of another model": (
        lambda f: edit(f, lambda c: c.update(num_hidden_layers=1), "config.json"),
        r"this LlamaForCausalLM has no module model\.layers\.1\.",
    ),
    "generation config": (
        lambda f: ((f / "generation_config.json").write_text("{"), rehash(f)),
        r"generation_config\.json cannot be read",
    ),
    "lacks a tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.weight_codes")),
        rf"model-00001\S+ lacks tensors {LAYER}\.weight_codes; ",
    ),
    "has another": (
        lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))),
        r"model-00001\S+ has the unknown tensors x; ",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(5, 1)})),
        rf"has {LAYER}\.weight_scale as float32 \[5, 1\], not float32 \[96, 1\]; ",
    ),
    "another dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(96, 1).half()})),
        r"as float16 \[96, 1\], not float32 \[96, 1\]; ",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, folder: Path) -> None:
    change, match = FILES[case]
    change(folder)
    refused(match, folder)


def test_without_hashes_sizes_are_still_compared(folder: Path) -> None:
    flip(folder / WEIGHTS)
    qfx.load(folder, verify=False)
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"1")
    refused(r"bytes instead of", folder, verify=False)


def test_instances_that_do_not_fit(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "plain"
    qfx.save(Plain(), target)
    assert type(qfx.load(target, Plain(value=9.0))) is Plain
    refused(r"Plain is not a class of transformers; pass model=Plain\(\.\.\.\)", target)
    refused(r"the saved model is a \S+\.Plain, not a torch\S+\.Linear; pass", target, nn.Linear(4, 4))
    refused(
        r"weight was saved as a parameter of shape \[64, 64\], here it is a parameter of \[5, 5\]",
        target,
        Plain(size=5),
    )
    refused(r"this Plain lacks tensors of the saved model \(count\)", target, Plain(buffer="total"))
    with torch.device("meta"):
        on_meta = Plain()
    refused(r"the buffer scratch of the model given is on the meta device; build it on the CPU", target, on_meta)
    refused(r"drop it, or drop model=", target, Plain(), attn_implementation="sdpa")
    refused(r"quantized already; pass a fresh float one", folder, qfx.load(folder))
    uncopied = Plain()
    uncopied.lock = (i for i in ())
    refused(r"the Plain given cannot be copied \(.*generator", target, uncopied)
    refused(r"the device 'cuda:99' is not there \(", target, Plain(), device="cuda:99")
    odd = Plain()
    odd.scratch += 1
    with pytest.warns(UserWarning, match=r"buffers that Plain makes by itself differ from .* \(scratch\)"):
        qfx.load(target, odd)


def test_a_recipe_of_steps_that_are_gone_does_not_matter(folder: Path) -> None:
    edit(folder, lambda m: m["recipe"].update(steps=[{"gone": {}}]))
    assert qfx.load(folder).qfx.recipe is None


def plain(**attributes: Any) -> Plain:
    model = Plain()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Remembers(nn.Module):
    def get_extra_state(self) -> Any:
        return {"calls": 1}


def test_models_that_cannot_be_saved(tmp_path: Path, folder: Path) -> None:
    refused(
        r"this Linear has no \.qfx; give the model that qfx\.quantize", nn.Linear(1, 1), tmp_path / "x", call=qfx.save
    )
    refused(r"count is on the meta device and has no values", Plain().to("meta"), tmp_path / "x", call=qfx.save)
    refused(r"inner has extra state, which is not saved", plain(inner=Remembers()), tmp_path / "x", call=qfx.save)
    refused(r"max_shard_size '4 apples' is no size", Plain(), tmp_path / "x", call=qfx.save, max_shard_size="4 apples")
    refused(r"no files of a tokenizer", Plain(), tmp_path / "x", call=qfx.save, tokenizer=tmp_path)
    strange = Plain()
    strange.qfx.report.recipe = {"steps": [{"mine": {"f": print}}]}
    refused(r"holds what JSON does not \(", strange, tmp_path / "x", call=qfx.save)
    pruned = qfx.load(folder)
    del pruned.model.layers[1]
    refused(
        r"would not load again, the saved model lacks .*; make model\.config say",
        pruned,
        tmp_path / "x",
        call=qfx.save,
    )
    other = qfx.load(folder)
    other.model.norm.__class__ = type("Mine", (type(other.model.norm),), {})
    refused(
        r"would not load again, model\.norm is a \S+\.Mine, not a \S+LlamaRMSNorm; ",
        other,
        tmp_path / "x",
        call=qfx.save,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
