"""Tables of a report."""

import math

import pytest
from rich.console import Group

from qfx.core.report import Fold, Layer, Miss, Report, StepRecord
from qfx.report import EXAMPLES, WORST, render, text


def make_report(layers: int = 25) -> Report:
    return Report(
        model="LlamaForCausalLM",
        recipe={},
        linear_weights=100 * layers,
        folds=[Fold(f"n{i}", "norm", "smooth", "Diagonal", [], [f"l{i}"], 9, i) for i in range(4)],
        misses=[Miss(f"site{i}", "reads [h, 3, d] rows", "smooth", 100) for i in range(5)],
        layers=[
            Layer(f"model.layers.{i}.proj", "W8A8", [10, 10], "rtn", i / 1000, 8.25, "int8") for i in range(layers)
        ],
        steps=[StepRecord("gptq", {"damp": 0.01}, 25, 3.25, ["damped twice"])],
        bytes_before=5 * 2**20,
        bytes_after=2**20,
        seconds=12.5,
        warnings=["[1] is not markup"],
    )


def test_the_default_shows_the_worst() -> None:
    shown = text(make_report())
    lines = shown.splitlines()
    assert lines[0].startswith("quantized 100.0 % of linear weights (25 of 25 linears), folded 0")
    assert "warning: [1] is not markup" in shown
    assert "5.0 MiB" in shown and "1.0 MiB" in shown and "5.00 ×" in shown and "12.5" in shown
    assert "damp=0.01" in shown and "damped twice" in shown
    assert f"Layers: the worst {WORST} of 25" in shown and shown.count(".proj") == WORST
    first = next(line for line in lines if ".proj" in line)
    assert "model.layers.24.proj" in first and "2.4 %" in first
    miss = next(line for line in lines if "reads [h, 3, d] rows" in line)
    assert "20 %" in miss and f"and {5 - EXAMPLES} more" in miss
    norm = next(line for line in lines if line.startswith("norm"))
    assert norm.split()[1] == "4" and "3.0e+00" in norm


def test_verbose_shows_all() -> None:
    shown = text(make_report(), verbose=True)
    assert shown.count(".proj") == 25 and "more" not in shown
    assert all(f"site{i}" in shown and f"n{i}" in shown for i in range(4))


@pytest.mark.parametrize("width", [60, 110])
@pytest.mark.parametrize("verbose", [False, True])
def test_lines_keep_to_the_width(width: int, verbose: bool) -> None:
    assert max(len(line) for line in text(make_report(), width, verbose).splitlines()) <= width


def test_nan_is_the_worst_error() -> None:
    report = make_report()
    report.layers[3].error = report.folds[1].error = math.nan
    shown = [line for line in text(report).splitlines() if ".proj" in line or line[:4] == "norm"]
    assert "nan" in shown[0] and "layers.3.proj" in shown[1] and "nan" in shown[1]


def test_an_empty_report_renders() -> None:
    shown = text(Report("m", {}, 0))
    assert isinstance(render(Report("m", {}, 0)), Group)
    assert "Model" in shown and "Folds" not in shown and "Misses" not in shown
