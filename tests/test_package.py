"""What is saved comes back: the same outputs bit by bit, the same tokens, the same tree."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

import qfx
from qfx.core.shifted import Shifted
from qfx.modules.linear import QLinear
from qfx.package import Quantized
from tests.zoo import ZOO

GPTQ = {"gptq": {"act_order": True, "static_groups": False}}
ALL_SHIFTS = {"outlier_suppression_plus": {"shift_rmsnorm": True, "steps": 4}}
ONLINE = {"smoothquant": {"online": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, head quantized": ("llama_tied", {"schemes": {"*": "W8A8"}}),
    "tied, head float": ("llama_tied", {"schemes": {"*": "W8A8"}, "ignore": ["@head"]}),
    "Conv1D": ("gpt2", {"schemes": {"*": "W4A16_G16"}, "ignore": ["@head"]}),
    "experts": ("mixtral", {"schemes": {"*": "W8A8_STATIC"}, "ignore": ["@router"]}),
    "nf4": ("gpt2", {"schemes": {"*": "NF4_DQ_G16"}, "ignore": ["@head"]}),
    "experts on a codebook": (
        "mixtral",
        {"schemes": {"*": "NF4_DQ_G16", "*.q_proj": "FP4_G16"}, "ignore": ["@router"]},
    ),
    "multiples": ("qwen2", {"schemes": {"*": "W4A8_DQ_G16"}, "ignore": ["@head"]}),
    "multiples of experts": ("mixtral", {"schemes": {"*": "W4A8_DQ_G16"}, "ignore": ["@router"]}),
    "fp8": ("opt", {"schemes": {"*": "FP8_DYNAMIC"}}),
    "g_idx": ("qwen2", {"schemes": {"*": "W4A16_ASYM_G16"}, "steps": [GPTQ]}),
    "static, shifts and biases": ("llama", {"schemes": {"*": "W8A8_STATIC_ASYM"}, "steps": [ALL_SHIFTS]}),
    "online": ("opt_post_norm", {"schemes": {"*": "W8A8"}, "steps": [ONLINE], "ignore": ["@head"]}),
    "transform only": ("llama", {"schemes": {}, "steps": [ALL_SHIFTS]}),
    "raw parameters": ("raw_parameters", {"schemes": {"*": "W8A8"}}),
    "a module of one's own": ("block_stack", {"schemes": {"*": "W8A8"}, "steps": ["smoothquant"]}),
}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tree_leaves(model(**inputs)) if isinstance(t, Tensor)]


def same(a: nn.Module, b: nn.Module, inputs: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(outputs(a, inputs), outputs(b, inputs), strict=True))


def tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy, with a cache of keys and values, past the end of a text."""
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)


def structure(model: nn.Module) -> dict[str, Any]:
    """Everything of a tree that a load could get wrong and that outputs need not show."""
    named = {n: t for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    return {
        "tensors": {n: (type(t), t.dtype, t.shape) for n, t in named.items()},
        "state_dict": list(model.state_dict()),
        "ties": sorted(sorted(n for n in named if named[n] is t) for t in named.values()),
        "training": [m.training for m in model.modules()],
        "classes": [(type(m).__name__, type(m).__module__) for m in model.modules()],
        "layers": [m.extra_repr() + str(m.dtype) for m in model.modules() if isinstance(m, QLinear)],
        "slots": {n: m._slots for n, m in model.named_modules() if hasattr(m, "_slots")},
    }


Case = tuple[str, nn.Module, dict[str, Tensor]]


@pytest.fixture(scope="module")
def quantized() -> Callable[[str], Case]:
    """Each case's model is quantized once; do not change it."""
    made: dict[str, Case] = {}

    def get(case: str) -> Case:
        if case not in made:
            name, recipe = CASES[case]
            model, inputs = ZOO[name].load()
            made[case] = name, qfx.quantize(model, recipe, [inputs], progress=False), inputs
        return made[case]

    return get


def reload(folder: Path, name: str, model: nn.Module, **save: Any) -> Any:
    qfx.save(model, folder, **save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also that buffers differ
        return qfx.load(folder, None if hasattr(model, "config") else ZOO[name].build())


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_is_the_saved_one(case: str, quantized: Callable[[str], Case], tmp_path: Path) -> None:
    name, model, inputs = quantized(case)
    before = tokens(model, inputs) if hasattr(model, "generate") else None
    loaded = reload(tmp_path / "saved", name, model)
    assert structure(loaded) == structure(model)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    assert same(model, loaded, inputs)
    if before is not None:
        assert torch.equal(tokens(model, inputs), before) and torch.equal(tokens(loaded, inputs), before)
    assert isinstance(loaded.qfx, Quantized) and loaded.qfx.recipe == model.qfx.recipe
    assert loaded.qfx.report == model.qfx.report and loaded.qfx.example == model.qfx.example
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    again = reload(tmp_path / "again", name, loaded)  # what was loaded can be saved
    assert same(model, again, inputs)


def test_cases_are_what_they_say(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    found = {}
    for case in CASES:
        qfx.save(quantized(case)[1], tmp_path / case)
        found[case] = json.loads((tmp_path / case / "qfx.json").read_text())
    assert found["tied, head quantized"]["ties"] == []
    assert found["tied, head float"]["ties"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert {p["name"] for p in found["experts"]["parameters"]} == {"gate_up_proj", "down_proj"}
    assert {p["owner"] for p in found["raw parameters"]["parameters"]} == {""}
    assert any(p["layout"] == [1, 0] for p in found["raw parameters"]["parameters"])
    assert all(layer["g_idx"] for layer in found["g_idx"]["layers"])
    for case in ("static, shifts and biases", "transform only"):
        assert "model.layers.0.input_layernorm" in found[case]["shifts"]
        assert "model.layers.0.self_attn.q_proj.bias" in found[case]["tensors"]
    assert found["online"]["online"] and any("online_gain" in group[0] for group in found["online"]["ties"])
    assert found["transform only"]["layers"] == [] and found["fp8"]["layers"]
    assert found["a module of one's own"]["model"]["transformers"] is None
    assert "model.rotary_emb.inv_freq" in found["transform only"]["derived"]
    assert any(isinstance(m, Shifted) for m in quantized("transform only")[1].modules())


def test_a_model_is_saved_as_it_is_now(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    for case in ("static, shifts and biases", "experts", "transform only"):
        name, model, inputs = quantized(case)
        model = copy.deepcopy(model).to(torch.bfloat16)  # also the rotary frequencies
        loaded = reload(tmp_path / "saved", name, model)
        assert structure(loaded) == structure(model) and loaded.dtype == torch.bfloat16
        assert same(model, loaded, inputs) and torch.equal(tokens(model, inputs), tokens(loaded, inputs))
    model.model.norm.weight.data.mul_(2)
    assert same(model, reload(tmp_path / "saved", name, model), inputs)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_models_of_bfloat16(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].load()
    model = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()  # GPT-J computes its positions in it
    model = qfx.quantize(model, "w8a8", [inputs], progress=False)
    loaded = reload(tmp_path / "saved", name, model)
    assert structure(loaded) == structure(model) and same(model, loaded, inputs)


def test_buffers_that_come_out_otherwise_are_told(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    model = copy.deepcopy(quantized("transform only")[1]).to(torch.bfloat16).to(torch.float32)
    qfx.save(model, tmp_path / "saved")
    with pytest.warns(
        UserWarning, match=r"load: .*buffers that LlamaForCausalLM makes .*\(model.rotary_emb.inv_freq, "
    ):
        qfx.load(tmp_path / "saved")


def test_settings_that_config_json_leaves_out(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    name, model, inputs = quantized("experts")
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    model.generation_config.max_new_tokens = 3
    loaded = reload(tmp_path / "saved", name, model)
    assert loaded.config._attn_implementation == "eager" and loaded.config._experts_implementation == "batched_mm"
    assert loaded.generation_config.max_new_tokens == 3 and same(model, loaded, inputs)
    assert qfx.load(tmp_path / "saved", attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_tensors_are_spread_over_files(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    name, model, inputs = quantized("tied, head float")
    loaded = reload(tmp_path / "saved", name, model, max_shard_size="20KB")
    files = sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(model, loaded, inputs)
    reload(tmp_path / "saved", name, model)  # and nothing of it is left by a save with fewer
    assert [p.name for p in (tmp_path / "saved").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_weights_in_one_memory_stay_one_and_slices_do_not_take_all(tmp_path: Path) -> None:
    model, inputs = ZOO["swiglu"].load()
    model = qfx.quantize(model, {"schemes": {}, "steps": ["smoothquant"]}, [inputs], progress=False)
    both = torch.randn(2, *model.ups[0].weight.shape) / 8
    model.ups[0].weight.data, model.gates[0].weight.data = both.unbind()
    model.ups[1].weight.data = model.gates[1].weight.data  # two objects
    model.downs[1].weight.data = model.downs[1].weight.data.t().contiguous().t()
    loaded = reload(tmp_path / "saved", "swiglu", model)
    assert torch.allclose(outputs(loaded, inputs)[0], outputs(model, inputs)[0], atol=1e-5)
    assert loaded.ups[1].weight is loaded.gates[1].weight and loaded.ups[0].weight.untyped_storage().nbytes() == 24576


def test_the_given_instance_is_not_changed(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    _, model, inputs = quantized("a module of one's own")
    qfx.save(model, tmp_path / "saved")
    fresh = ZOO["block_stack"].build().train()
    before, names = copy.deepcopy(fresh.state_dict()), list(fresh.state_dict())
    loaded = qfx.load(tmp_path / "saved", fresh)
    assert same(model, loaded, inputs) and not loaded.training and fresh.training
    assert list(fresh.state_dict()) == names and all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())


def test_loading_leaves_no_trace(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    qfx.save(quantized("experts")[1], tmp_path / "saved")
    register, state = nn.Module.register_parameter, torch.get_rng_state()
    loaded = qfx.load(tmp_path / "saved", device="cpu")
    assert nn.Module.register_parameter is register and torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32 and not any(t.is_meta for t in loaded.parameters())
    # what is loaded does not read the files any more
    (tmp_path / "saved" / "model-00001-of-00001.safetensors").write_bytes(b"")
    assert same(quantized("experts")[1], loaded, quantized("experts")[2])


def test_tokenizers(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    model = quantized("fp8")[1]
    source = Path(qfx.__file__).parent / "assets" / "wiki-demo"
    tokenizer = AutoTokenizer.from_pretrained(source)
    for given in (tokenizer, source, str(source)):
        qfx.save(model, tmp_path / "saved", tokenizer=given)
        found = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert found("a text to encode")["input_ids"] == tokenizer("a text to encode")["input_ids"]
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert config["architectures"] == ["OPTForCausalLM"]  # not that of the folder copied from
    qfx.load(tmp_path / "saved")


def test_a_compiled_model_is_saved_as_what_it_wraps(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    _, model, inputs = quantized("fp8")
    qfx.save(torch.compile(model, backend="eager"), tmp_path / "saved")
    assert same(model, qfx.load(tmp_path / "saved"), inputs)


def test_transformers_does_not_save_what_it_would_load_wrong(quantized: Callable[[str], Case], tmp_path: Path) -> None:
    model = quantized("experts")[1]
    qfx.save(model, tmp_path / "saved")
    for one in (model, copy.deepcopy(model), qfx.load(tmp_path / "saved")):
        with pytest.raises(qfx.errors.PackageError, match=r"use qfx.save\(model, folder\)"):
            one.save_pretrained(tmp_path / "wrong")
    # a model that keeps its form after folds is an ordinary checkpoint
    plain, inputs = ZOO["qwen2"].load()
    folded = qfx.quantize(plain, {"schemes": {}, "steps": ["smoothquant"]}, [inputs], progress=False)
    folded.save_pretrained(tmp_path / "plain")
    assert same(folded, type(plain).from_pretrained(tmp_path / "plain"), inputs)
