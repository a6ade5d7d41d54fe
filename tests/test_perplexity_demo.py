"""On a trained model and real text: what each format costs in perplexity, and what GPTQ wins back."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qfx.assets import demo_calibration, demo_model, demo_text
from qfx.core.passes import Pass
from qfx.data import text_batches
from qfx.evaluate import perplexity
from qfx.passes.lower.modules import Lower
from qfx.passes.solve.gptq import Gptq
from qfx.passes.solve.rtn import Rtn
from qfx.passes.transform.smoothquant import SmoothQuant
from tests.passes.discovered import Discovered

Measure = Callable[..., float]


@pytest.fixture(scope="module")
def measure() -> Measure:
    """The perplexity of wiki-demo after some steps under a scheme; of the float model without any."""
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    calibration = text_batches(demo_calibration(), tokenizer, sequence=256, samples=24, batch_size=8)
    found = Discovered(model, calibration)

    def perplexity_of(module: nn.Module) -> float:
        return perplexity(module, demo_text(), tokenizer, window=256, max_windows=24, batch_size=8).value

    @cache
    def measured(scheme: str | None = None, *steps: Pass) -> float:
        if scheme is None:
            return perplexity_of(model)
        state = found.fresh({"*": scheme}, ["@head"])
        with torch.no_grad():
            for step in (*steps, Lower()):
                step(state)
        assert len(state.solved) == 28
        assert len(state.report.folds) == (8 if SmoothQuant() in steps else 0)
        return perplexity_of(state.graph.module)

    return measured


def test_the_model_has_learnt_something(measure: Measure) -> None:
    assert 25 < measure() < 40


@pytest.mark.parametrize("steps", [(Rtn(),), (SmoothQuant(), Rtn())], ids=["rtn", "smoothquant"])
def test_eight_bits_cost_next_to_nothing(measure: Measure, steps: tuple[Pass, ...]) -> None:
    assert measure("W8A8", *steps) == pytest.approx(measure(), rel=0.005)


def test_static_inputs_cost_little(measure: Measure) -> None:
    assert measure() * 0.995 < measure("W8A8_STATIC", Rtn()) < measure() * 1.02


def test_gptq_wins_back_a_part_of_four_bits(measure: Measure) -> None:
    rounded, solved = measure("W4A16_G64", Rtn()), measure("W4A16_G64", Gptq(act_order=True))
    assert measure() < solved < rounded < 1.06 * measure()
    assert solved - measure() < 0.8 * (rounded - measure())


def test_gptq_wins_back_more_of_three_bits(measure: Measure) -> None:
    rounded, solved = measure("W3A16_G64", Rtn()), measure("W3A16_G64", Gptq())
    assert 1.1 * measure() < rounded < 1.3 * measure()
    assert solved < 0.97 * rounded
