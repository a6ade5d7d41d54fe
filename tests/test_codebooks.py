"""NF4 and FP4 from the recipe's name to the saved file: no data, the size that the scheme says, and the same bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qfx
from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear
from qfx.modules.merged import merge
from qfx.recipes import Recipe
from qfx.resume import Store

SIZE = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BITS = {"nf4": 4 + 32 / 64, "fp4": 4 + 32 / 64, "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256)}
"""Codes, and a scale for 64 of them: of 32 bits, or of 8 and a part of 32 bits for 256 scales."""


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, **SIZE)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(14).view(2, 7)


def linears(model: nn.Module) -> dict[str, QLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}


@pytest.mark.parametrize("name", BITS)
@torch.no_grad()
def test_without_data_and_back_from_disk(name: str, llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    assert not Recipe.load(name).needs_data
    model = qfx.quantize(llama, name, progress=False)
    label = name.upper().replace("-", "_")
    layers = [layer for layer in model.qfx.report.layers if layer.scheme]
    assert len(layers) == 14 == len(linears(model)) and {layer.scheme for layer in layers} == {label}
    # rows of 128 inputs have 2 scales: 256 of them are 128 rows, and k and v have 64
    short = 32 / (64 * 128) - 32 / (64 * 256) if name == "nf4-dq" else 0
    for layer in layers:
        whole = not layer.name.endswith(("k_proj", "v_proj"))
        assert layer.bits == pytest.approx(BITS[name] + (0 if whole else short)) and layer.op == "wna16_linear"
    want, got = llama(ids).logits, model(ids).logits
    assert 0.01 < ((got - want).norm() / want.norm()).item() < 0.2
    qfx.save(model, tmp_path / "saved")
    loaded = qfx.load(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, got) and loaded.qfx.recipe == Recipe.load(name)
    for path, module in linears(loaded).items():
        assert module.scheme == parse_scheme(label)
        assert torch.equal(module.dequantize(), model.get_submodule(path).dequantize())
    tensors = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    stored = sum(t.numel() * t.element_size() for k, t in tensors.items() if ".weight_" in k)
    assert 8 * stored == pytest.approx(sum(layer.bits * layer.weights for layer in layers))


def test_names_in_yaml(tmp_path: Path, llama: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("schemes:\n  '*': NF4_DQ\n  mlp.*: {preset: FP4_BNB, group_size: 32}\nignore: ['@head']\n")
    recipe = Recipe.load(path)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe and not recipe.needs_data
    plan = {layer.name: layer.scheme for layer in qfx.explain(llama, path).layers}
    assert plan["model.layers.0.self_attn.q_proj"] == "NF4_DQ" and plan["model.layers.0.mlp.up_proj"] == "FP4_BNB_G32"


@torch.no_grad()
def test_gptq_on_a_codebook_is_better_than_rounding(llama: Any, ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 64, (4, 32))} for _ in range(4)]
    errors = {}
    for solver in ("rtn", {"gptq": {"act_order": True}}):
        recipe = {"schemes": {"*": "NF4_DQ"}, "steps": [solver], "ignore": ["@head"]}
        model = qfx.quantize(llama, recipe, batches, progress=False)
        want, got = (m(batches[0]["input_ids"]).logits for m in (llama, model))
        errors[str(solver)[:6]] = ((got - want).norm() / want.norm()).item()
    assert min(errors.values()) == errors["{'gptq"] and len(errors) == 2


@torch.no_grad()
def test_the_layout_of_the_gpu_and_merged_linears(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """On any device: what is computed and what is saved stays the same."""
    model = qfx.quantize(llama, "nf4-dq", progress=False)
    want, before = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    for layer in model.model.layers:
        attention = layer.self_attn
        merge([attention.q_proj, attention.k_proj, attention.v_proj]).whole.use_kernel("nf4_linear")
        layer.mlp.down_proj.use_kernel("nf4_linear")
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    qfx.save(model, tmp_path / "saved")
    assert torch.equal(qfx.load(tmp_path / "saved")(ids).logits, want)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """Solved layers are kept with the scales that their codes stand for, which are quantized to the same bits again."""
    spec = parse_scheme("NF4_DQ_G16").weight
    q = qfx.core.qtensor.encode_minmax(torch.randn(40, 64), spec)
    store = Store(tmp_path / "run", "a run")
    store.put("w", q, {"error": 0.0})
    found = store.get("w")
    assert found is not None and found[0].spec == spec and torch.equal(found[0].dequantize(), q.dequantize())
    module = QLinear.from_qtensor(found[0], None, parse_scheme("NF4_DQ_G16"), dtype=torch.float32)
    assert torch.equal(module.dequantize(), q.dequantize())


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """The same bits as on a CPU, the kernel of the table, and files that do not depend on the device."""
    w = torch.randn(300, 256) * torch.logspace(-2, 2, 300)[:, None]
    for name in ("NF4", "NF4_DQ", "FP4_DQ_G16", "FP4_BNB_CHANNEL"):
        here, there = (qfx.core.qtensor.encode_minmax(t, parse_scheme(name).weight) for t in (w, w.cuda()))
        assert torch.equal(there.codes.cpu(), here.codes) and torch.equal(there.scale.cpu(), here.scale)
        assert torch.equal(there.dequantize().cpu(), here.dequantize())
    here = qfx.quantize(copy.deepcopy(llama).bfloat16(), "nf4-dq", progress=False)
    qfx.save(here, tmp_path / "saved")
    model = qfx.load(tmp_path / "saved", device="cuda")
    assert {layer.kernel for layer in model.qfx.lowering.layers} == {"nf4_linear"}
    want, got = here(ids).logits.float(), model(ids.cuda()).logits.float().cpu()
    assert ((got - want).norm() / want.norm()).item() < 0.02
    before, after = here.state_dict(), model.state_dict()
    assert list(before) == list(after) and all(torch.equal(after[k].cpu(), v) for k, v in before.items())
    qfx.save(model, tmp_path / "again")
    again = qfx.load(tmp_path / "again")
    assert torch.equal(again(ids).logits, here(ids).logits)
