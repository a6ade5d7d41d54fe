"""`qfx.quantize` as a user meets it: what comes back, what is left alone, what is reported, what it may be given."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qfx
from qfx.core.report import Report
from qfx.inputs import feeds_of
from qfx.modules.linear import QLinear
from qfx.recipes import Recipe
from tests.zoo import ZOO
from tests.zoo.decoders import token_ids

BATCHES = [{"input_ids": token_ids(seed)} for seed in (0, 1)]
MIXED: dict[str, Any] = {
    "schemes": {
        "*": "W8A8",
        "*.down_proj": "W4A16_G16",
        r"re:.*layers\.1\..*(q|k)_proj": "W8A8_STATIC",
        "model.layers.0.self_attn.o_proj": None,
        "v_proj": {"preset": "W4A8", "group_size": 32},
    },
    "ignore": ["@head"],
    "steps": [{"smoothquant": {"alpha": 0.6}}, {"gptq": {"act_order": True}}],
}


class Run:
    """One quantization of a llama that was in training mode, and what it called meanwhile."""

    def __init__(self) -> None:
        self.model = ZOO["llama"].load()[0].train()
        self.before = clone(self.model)
        self.calls: list[tuple[str, int, int]] = []
        self.q = qfx.quantize(self.model, MIXED, BATCHES, progress=lambda *call: self.calls.append(call))
        self.report: Report = self.q.qfx.report


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k].float(), b[k].float()) and a[k].dtype == b[k].dtype for k in a)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(**BATCHES[0])
    return out if isinstance(out, Tensor) else out.logits


def error(model: nn.Module, want: Tensor) -> float:
    return ((logits(model) - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def stack() -> nn.Module:
    return ZOO["block_stack"].load()[0]


def test_the_model_given_is_not_changed(run: Run) -> None:
    assert equal(clone(run.model), run.before)
    assert run.model.training and all(m.training for m in run.model.modules())
    assert not any(isinstance(m, QLinear) for m in run.model.modules())
    assert not hasattr(run.model, "qfx")
    own = {p.data_ptr() for p in run.model.parameters()}
    assert not own & {t.data_ptr() for t in run.q.state_dict().values()}


def test_in_place_the_model_given_is_the_one_that_comes_back(stack: nn.Module) -> None:
    model, recipe = copy.deepcopy(stack), {"schemes": {"*": "W8A8"}, "steps": ["smoothquant"]}
    other = qfx.quantize(stack, recipe, BATCHES)
    q = qfx.quantize(model, recipe, BATCHES, inplace=True)
    assert q is model and isinstance(model.head, QLinear)
    assert equal(clone(model), clone(other))


def test_the_class_is_kept_and_the_model_evaluates(run: Run) -> None:
    assert type(run.q) is type(run.model) and run.q.config == run.model.config
    assert not any(m.training for m in run.q.modules())
    names = [name for name, _ in run.model.named_modules()]
    assert [name for name, _ in run.q.named_modules()] == names
    assert [n for n, m in run.q.named_modules() if type(m) is nn.Linear] == [
        "model.layers.0.self_attn.o_proj",
        "lm_head",
    ]
    assert error(run.q, logits(run.model)) < 0.1


def test_every_layer_gets_the_scheme_of_its_last_pattern(run: Run) -> None:
    found = {layer.name: layer.scheme for layer in run.report.layers}
    linears = [name for name, m in run.model.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(found) == sorted(linears) and len(run.report.layers) == len(linears)
    for name in linears:
        leaf = name.rpartition(".")[2]
        want: str | None = "W8A8"
        if leaf == "down_proj":
            want = "W4A16_G16"
        elif re.fullmatch(r".*layers\.1\..*(q|k)_proj", name):
            want = "W8A8_STATIC"
        elif name in ("model.layers.0.self_attn.o_proj", "lm_head"):
            want = None
        elif leaf == "v_proj":
            want = "W4A8_G32"
        assert found[name] == want, name


def test_what_the_report_says(run: Run) -> None:
    report = run.report
    sizes = {n: m.weight.numel() for n, m in run.model.named_modules() if isinstance(m, nn.Linear)}
    kept = sizes["lm_head"] + sizes["model.layers.0.self_attn.o_proj"]
    assert report.linear_weights == sum(sizes.values())
    assert report.share_quantized == pytest.approx(1 - kept / sum(sizes.values()))
    assert [s.name for s in report.steps if s.name != "discover"] == ["smoothquant", "gptq", "lower"]
    assert [s.settings for s in report.steps if s.name != "discover"] == [{"alpha": 0.6}, {"act_order": True}, {}]
    assert {f.kind for f in report.folds} == {"norm -> 3 linears", "norm -> 2 linears"}
    assert {f.step for f in report.folds} == {"smoothquant"} and len(report.folds) == 4
    stored = [*run.model.parameters(), *run.model.buffers()]
    assert report.bytes_before == sum(t.numel() * t.element_size() for t in stored)
    stored = [*run.q.parameters(), *run.q.buffers()]
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in stored) < 0.6 * report.bytes_before
    notes = {layer.name: layer.note for layer in report.layers if layer.scheme is None}
    assert notes == {
        "lm_head": "ignored by '@head'",
        "model.layers.0.self_attn.o_proj": "kept in float by 'model.layers.0.self_attn.o_proj'",
    }
    solved = [layer for layer in report.layers if layer.scheme]
    assert all(layer.solver == "gptq" and layer.op and 0 < layer.error < 0.3 for layer in solved)  # type: ignore[operator]
    want = [run.model.eval()(**b).logits.detach() for b in BATCHES]
    got = [run.q(**b).logits.detach() for b in BATCHES]
    worst = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))
    run.model.train()
    assert report.output_error == pytest.approx(worst, rel=1e-3)
    assert report.versions["torch"] == torch.__version__ and report.seconds > 0 and not report.warnings


def test_the_report_goes_through_json(run: Run) -> None:
    again = Report.from_json(run.report.to_json())
    assert again == run.report and str(again) == str(run.report)


def test_progress_is_called_and_never_goes_back(run: Run) -> None:
    done: dict[str, int] = {}
    for what, i, total in run.calls:
        assert done.get(what, 0) <= i <= total
        done[what] = i
    order = list(dict.fromkeys(what for what, _, _ in run.calls))
    assert order == ["capture", "sites", "smoothquant", "gptq", "lower"]
    ends = {what: total for what, _, total in run.calls}
    assert done == ends and ends["lower"] == 13


def test_a_state_dict_goes_from_one_copy_to_another(run: Run) -> None:
    other = copy.deepcopy(run.q)
    assert torch.equal(logits(other), logits(run.q))
    for t in other.state_dict().values():
        t.zero_()
    assert not torch.equal(logits(other), logits(run.q))  # a copy has its own tensors
    other.load_state_dict(run.q.state_dict())
    assert torch.equal(logits(other), logits(run.q))
    assert {"weight_codes", "weight_scale"} <= {k.rpartition(".")[2] for k in run.q.state_dict()}


def test_a_cast_leaves_codes_and_scales(run: Run) -> None:
    cast = copy.deepcopy(run.q).to(torch.bfloat16)
    before, after = run.q.state_dict(), cast.state_dict()
    for name, t in after.items():
        stored = name.rpartition(".")[2] in ("weight_codes", "weight_scale", "weight_zero", "g_idx", "input_scale")
        assert t.dtype == (before[name].dtype if stored else torch.bfloat16), name
        assert not stored or torch.equal(t, before[name])
    out = logits(cast)
    assert out.dtype == torch.bfloat16 and error(cast, logits(run.q)) < 0.1
    back = cast.to(torch.float32)
    assert error(back, logits(run.q)) < 0.05


def test_two_runs_are_equal_bit_by_bit(stack: nn.Module) -> None:
    recipe = {"schemes": {"*": "W4A8_G16_STATIC"}, "steps": [{"smoothquant": {"alpha": "search"}}, "gptq"]}
    first, second = (qfx.quantize(stack, recipe, BATCHES) for _ in range(2))
    assert equal(clone(first), clone(second))
    reports = [q.qfx.report.to_dict() for q in (first, second)]
    for report in reports:
        report["seconds"] = 0
        for step in report["steps"]:
            step["seconds"] = 0
    assert reports[0] == reports[1]


def loader(rows: Any) -> DataLoader:
    return DataLoader(rows, batch_size=2)


IDS = torch.cat([b["input_ids"] for b in BATCHES])
FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: [b["input_ids"] for b in BATCHES],
    "a generator": lambda: (b for b in BATCHES),
    "with labels": lambda: [{**b, "labels": b["input_ids"]} for b in BATCHES],
    "a loader of tensors": lambda: loader(IDS),
    "a loader of dicts": lambda: loader([{"input_ids": row} for row in IDS]),
    "a loader of a tensor data set": lambda: loader(TensorDataset(IDS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_may_be(form: str, stack: nn.Module) -> None:
    feeds = feeds_of(stack, FORMS[form](), Recipe.load("w8a8-static"))
    assert len(feeds) == 2
    for got, want in zip(feeds, BATCHES, strict=True):
        assert list(got) == ["input_ids"] and torch.equal(got["input_ids"], want["input_ids"])


@torch.no_grad()
def test_all_batches_are_used(stack: nn.Module) -> None:
    q = qfx.quantize(stack, {"schemes": {"blocks.0.qkv": "W8A8_STATIC"}}, loader(IDS))
    tops = [stack.blocks[0].norm(stack.embed(b["input_ids"])).abs().max().item() for b in BATCHES]
    assert tops[0] != tops[1]
    assert q.blocks[0].qkv.input_scale.item() == pytest.approx(max(tops) / 127, rel=1e-5)
