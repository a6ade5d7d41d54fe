"""What cannot work is refused before it does harm, with one line that says who, what is so, and what to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.core.errors import CalibrationError, CaptureError, QfxError, RecipeError
from tests.zoo import ZOO

W8A8, STATIC = {"schemes": {"*": "W8A8"}}, {"schemes": {"*": "W8A8_STATIC"}}
IDS = torch.arange(24).view(2, 12)


class Branching(nn.Module):
    """Control flow that depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Overflowing(nn.Module):
    """Finite inputs and weights, and a value that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.exp()) - self.linear(x.exp() * 2)


LLAMA = ZOO["llama"].load()[0]
MLP, FEATURES = ZOO["mlp"].load()


def changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    model = copy.deepcopy(model)
    change(model)
    return model


def nan_weight(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = torch.nan


def nan_batch() -> dict[str, Tensor]:
    x = FEATURES["input"].clone()
    x[0, 1, 2] = torch.nan
    return {"input": x}


Case = tuple[type[QfxError], str, Callable[[], nn.Module], Any, Any]
CASES: dict[str, Case] = {
    # calibration
    "no batches": (CalibrationError, r"no batches; pass some, or a recipe that", lambda: LLAMA, W8A8, []),
    "an iterator that was read": (CalibrationError, "read before is empty", lambda: LLAMA, STATIC, iter([])),
    "none, and static inputs": (
        CalibrationError,
        r"measures activations \(static inputs\); pass calibration=",
        lambda: LLAMA,
        STATIC,
        None,
    ),
    "none, and a step that measures": (
        CalibrationError,
        r"measures activations \(smoothquant, gptq\); pass calibration=",
        lambda: LLAMA,
        {**W8A8, "steps": ["smoothquant", "gptq"]},
        None,
    ),
    "none, and unknown inputs": (CalibrationError, "pass one batch, so that the", lambda: MLP, W8A8, None),
    "text": (CalibrationError, r"data is text; use text_batches\(", lambda: LLAMA, STATIC, "some text"),
    "NaN in a batch": (CalibrationError, "batch 0: 1 of .* 'input' are NaN", lambda: MLP, W8A8, [nan_batch()]),
    "NaN inside the model": (
        CalibrationError,
        r"Overflowing gives NaN on batch 0 \(x float32 \[2, 8\]\), before .*look at",
        Overflowing,
        W8A8,
        [{"x": torch.full((2, 8), 200.0)}],
    ),
    "an input that forward does not take": (
        CalibrationError,
        "batch 0 has y, which Sequential.forward does not take",
        lambda: MLP,
        W8A8,
        [{"y": FEATURES["input"]}],
    ),
    "an input that forward lacks": (
        CalibrationError,
        r"fails on batch 0 \(input_ids int64 \[2, 12\]\): ValueError: .*Check that it holds the model.s own inputs",
        lambda: ZOO["t5"].load()[0],
        W8A8,
        [IDS],
    ),
    "ids of another tokenizer": (
        CalibrationError,
        "LlamaForCausalLM fails on batch 0 .*IndexError.*ids of its tokenizer",
        lambda: LLAMA,
        STATIC,
        [IDS + 10**6],
    ),
    "batches of different width": (
        CalibrationError,
        r"Sequential fails on batch 1 \(input float32 \[2, 12, 63\]\)",
        lambda: MLP,
        W8A8,
        [FEATURES, {"input": FEATURES["input"][..., :-1]}],
    ),
    "a later batch of different width": (
        CalibrationError,
        r"batch 2 has 'input' of shape \[2, 12, 63\]; the model was captured for \['any', 'any', 64\]. Use batches of",
        lambda: MLP,
        W8A8,
        [FEATURES, FEATURES, {"input": FEATURES["input"][..., :-1]}],
    ),
    "a later batch of another type": (
        CalibrationError,
        r"batch 2 has 'input' in torch.float64; the model was captured for torch.float32. Use batches of",
        lambda: MLP,
        W8A8,
        [FEATURES, FEATURES, {"input": FEATURES["input"].double()}],
    ),
    "an input that the first batch had": (
        CalibrationError,
        "batch 1 lacks the input 'attention_mask' that the first",
        lambda: LLAMA,
        W8A8,
        [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, {"input_ids": IDS}],
    ),
    "an input that the first batch had not": (
        CalibrationError,
        "batch 1 has attention_mask, which the first batch had not. Use batches of one form",
        lambda: LLAMA,
        W8A8,
        [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}],
    ),
    # the model
    "no model": (RecipeError, "model is a str, not a torch.nn.Module", lambda: "llama", W8A8, [IDS]),  # type: ignore[dict-item,return-value]
    "weights with NaN": (
        RecipeError,
        r"model.layers.1.mlp.up_proj.weight has NaN .* the checkpoint is damaged",
        lambda: changed(LLAMA, nan_weight),
        W8A8,
        [IDS],
    ),
    "weights on the meta device": (
        RecipeError,
        "embed_tokens.weight is on the meta device and has no values; load the weights",
        lambda: changed(LLAMA, lambda m: m.to("meta")),
        W8A8,
        [IDS],
    ),
    "float16 on the CPU": (
        RecipeError,
        r"is float16 on the CPU.*use model.float\(\) or model.bfloat16\(\), or move",
        lambda: changed(LLAMA, lambda m: m.half()),
        W8A8,
        [IDS],
    ),
    "control flow on values": (
        CaptureError,
        r"Branching does not export.* at .*test_bad_input.py:\d+ in forward: .*remove branches that depend on values",
        Branching,
        W8A8,
        [{"x": torch.randn(2, 8)}],
    ),
    "quantized already": (
        RecipeError,
        "the model is quantized already; start from the float model",
        lambda: qfx.quantize(MLP, W8A8, [FEATURES], progress=False),
        W8A8,
        [FEATURES],
    ),
    "no linears": (
        RecipeError,
        r"pattern '\*' matches no layer of Sequential; it has no linear layer",
        lambda: nn.Sequential(nn.ReLU()),
        W8A8,
        [FEATURES],
    ),
    # the recipe, as the model shows it
    "a pattern without a layer": (
        RecipeError,
        r"pattern '\*.fc1' matches no layer of LlamaForCausalLM; its 15 layers are lm_head, .* \.\.\.",
        lambda: LLAMA,
        {"schemes": {"*": "W8A8", "*.fc1": None}},
        [IDS],
    ),
    "an ignored pattern without a layer": (
        RecipeError,
        "pattern 'lm_haed' matches no layer",
        lambda: LLAMA,
        {**W8A8, "ignore": ["lm_haed"]},
        [IDS],
    ),
    "an unknown role": (
        RecipeError,
        "unknown role '@heads'; use @head, @router",
        lambda: LLAMA,
        {**W8A8, "ignore": ["@heads"]},
        [IDS],
    ),
    "a broken expression": (
        RecipeError,
        r"'re:\(' is not a regular expression",
        lambda: LLAMA,
        {"schemes": {"re:(": "W8A8"}},
        [IDS],
    ),
    "groups that do not divide": (
        RecipeError,
        r"q_proj has 64 inputs, which group_size 100 does not divide; use group_size 64, or ignore it",
        lambda: LLAMA,
        {"schemes": {"*": "W4A16_G100"}},
        [IDS],
    ),
    "groups of a step that do not divide": (
        RecipeError,
        "rtn: .*q_proj: group_size 7 does not divide 64 .*; choose another group_size, or ignore",
        lambda: LLAMA,
        {"schemes": {"*": "W4A16_CHANNEL"}, "steps": [{"rtn": {"group_size": 7}}]},
        [IDS],
    ),
    "an unknown scheme": (
        RecipeError,
        "unknown scheme 'Q4_K'; use W<bits>",
        lambda: LLAMA,
        {"schemes": {"*": "Q4_K"}},
        [IDS],
    ),
    "an unknown step": (RecipeError, "unknown step 'awk'; steps: ", lambda: LLAMA, {**W8A8, "steps": ["awk"]}, [IDS]),
    "an unknown key": (
        RecipeError,
        r"unknown keys \['layers'\]; use 'sch",
        lambda: LLAMA,
        {**W8A8, "layers": 1},
        [IDS],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_advice(case: str) -> None:
    error, message, build, recipe, calibration = CASES[case]
    model = build()
    with pytest.raises(error, match=message) as caught:
        qfx.quantize(model, recipe, calibration, progress=False)
    assert "\n" not in str(caught.value)


def test_refusing_changes_nothing() -> None:
    before = copy.deepcopy(LLAMA.state_dict())
    for recipe in ({"schemes": {"*": "W4A16_G100"}}, {**W8A8, "steps": [{"rtn": {"group_size": 7}}]}):
        with pytest.raises(RecipeError):
            qfx.quantize(LLAMA, recipe, [IDS], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in LLAMA.state_dict().items())


@pytest.mark.parametrize(
    "case", ["control flow on values", "weights with NaN", "groups that do not divide", "no model"]
)
def test_explain_refuses_it_too(case: str) -> None:
    error, message, build, recipe, calibration = CASES[case]
    with pytest.raises(error, match=message):
        qfx.explain(build(), recipe, calibration)


def test_masks_may_be_infinite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf] * 4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.mask

    quantized = qfx.quantize(Masked(), W8A8, [{"x": torch.randn(2, 8)}], progress=False)
    assert quantized.qfx.report.output_error < 0.1
