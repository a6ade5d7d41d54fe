"""Scales in whole multiples of one of their row, from the recipe's name to the lowered model and the saved file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qfx
from qfx import lowering
from qfx.core.errors import PackageError, SolverError
from qfx.core.qtensor import encode_minmax, quantize_scale
from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear
from qfx.modules.merged import Whole
from qfx.resume import Store

SIZE = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=384, **SIZE)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(14).view(2, 7)


def recipe(solver: Any = "rtn", scheme: str = "W4A8_DQ") -> dict[str, Any]:
    return {"schemes": {"*": scheme}, "steps": [solver], "ignore": ["@head"]}


def linears(model: nn.Module) -> dict[str, QLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QLinear) and not isinstance(m, Whole)}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def test_without_data_and_back_from_disk(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = qfx.quantize(llama, recipe(), progress=False)
    layers = {layer.name: layer for layer in model.qfx.report.layers if layer.scheme}
    assert layers.keys() == linears(model).keys() and len(layers) == 14
    for name, module in linears(model).items():
        assert layers[name].scheme == "W4A8_DQ" and module.scheme == parse_scheme("W4A8_DQ")
        assert layers[name].bits == pytest.approx(4 + 8 / 128 + 32 / module.in_features)
        multiples, second = module.weight_scale, module.weight_scale_scale
        assert bool((multiples >= 1).all()) and bool((multiples.amax(1) == 15).all())
        assert second is not None and second.shape == (module.out_features,)
    want, got = llama(ids).logits, model(ids).logits
    plain = distance(qfx.quantize(llama, recipe(scheme="W4A8"), progress=False)(ids).logits, want)
    assert 0.5 < distance(got, want) / plain < 1.5 and plain > 0.01  # a model of random weights
    qfx.save(model, tmp_path / "saved")
    loaded = qfx.load(tmp_path / "saved")
    before, after = model.state_dict(), loaded.state_dict()
    assert torch.equal(loaded(ids).logits, got)
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


@torch.no_grad()
def test_gptq(llama: Any, ids: torch.Tensor) -> None:
    """The scales are those of rounding to nearest, and known before; ranges that come later are not."""
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 64, (4, 32))} for _ in range(4)]
    errors = {}
    for name, solver in {"rtn": "rtn", "gptq": "gptq", "ordered": {"gptq": {"act_order": True}}}.items():
        model = qfx.quantize(llama, recipe(solver), batches, progress=False)
        errors[name] = distance(model(batches[0]["input_ids"]).logits, llama(batches[0]["input_ids"]).logits)
        for module in linears(model).values():
            q = module.qtensor()
            assert torch.equal(q.scale, quantize_scale(q.scale, q.spec)[0] * module.weight_scale_scale[:, None])
    assert max(errors["gptq"], errors["ordered"]) < errors["rtn"]
    late = {"gptq": {"act_order": True, "static_groups": False}}
    with pytest.raises(SolverError, match="quantized scales share scales across groups; use static_groups=True"):
        qfx.quantize(llama, recipe(late), batches, progress=False)


@torch.no_grad()
def test_lowered_for_a_gpu(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """On any device: every product has its rows' second scales, also a merged one, and the files stay the same."""
    model = qfx.quantize(llama, recipe(), progress=False)
    want, before = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    report = qfx.lower(model, {"input_ids": ids}, device="cuda")
    assert {layer.kernel for layer in report.layers} == {"w4a8_linear"} and len(report.groups) == 4
    assert {layer.scheme for layer in report.layers} == {"W4A8_DQ"} and report.error is not None
    holders = {m.part.group.whole if m.part else m for m in linears(model).values()}  # type: ignore[attr-defined]
    assert len(holders) == 8
    for module in holders:
        second = module.get_buffer("kernel_second")
        multiples = module.get_buffer("kernel_scale")[:, : module.out_features] / second[: module.out_features]
        assert torch.equal(multiples, multiples.round()) and bool((multiples.amax(0) == 15).all())
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    qfx.save(model, tmp_path / "saved")
    assert torch.equal(qfx.load(tmp_path / "saved")(ids).logits, want)
    lowering.restore(model)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.usefixtures("dynamo")
@torch.no_grad()
def test_compiled(llama: Any, ids: torch.Tensor) -> None:
    options = {"recipe": "W4A8_DQ", "fuse": False, "then": "eager"}
    want = qfx.quantize(llama, qfx.backend("W4A8_DQ").recipe, progress=False)(ids).logits
    assert torch.equal(torch.compile(llama, backend="qfx", options=options)(ids).logits, want)
    assert distance(want, llama(ids).logits) > 0.01


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq", "bitsandbytes"])
def test_other_tools_files_cannot_say_it(format: str, llama: Any, tmp_path: Path) -> None:
    model = qfx.quantize(llama, recipe(scheme="W4A16_DQ"), progress=False)
    with pytest.raises(PackageError, match="nearest: "):
        qfx.save(model, tmp_path / "saved", format=format)
    assert not (tmp_path / "saved").exists()


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    spec = parse_scheme("W4A8_DQ").weight
    q = encode_minmax(torch.randn(40, 256), spec)
    store = Store(tmp_path / "run", "a run")
    store.put("w", q, {"error": 0.0})
    found = store.get("w")
    assert found is not None and found[0].spec == spec and torch.equal(found[0].dequantize(), q.dequantize())
    module = QLinear.from_qtensor(found[0], None, parse_scheme("W4A8_DQ"), dtype=torch.float32)
    assert torch.equal(module.dequantize(), q.dequantize())
