"""The report's shares, its headline, and its JSON."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from qfx.core.report import Fold, Layer, Miss, Report, StepRecord


def make_report() -> Report:
    """Two blocks of a decoder with a head in float; 1000 linear weights."""
    layers = [
        Layer("0.q", "W8A8", [10, 10], "rtn", 0.01, 8.2, "int8_linear"),
        Layer("0.up", "W8A8", [20, 10], "gptq", 0.03, 8.1, "int8_linear"),
        Layer("0.experts", "W8A8", [2, 10, 10], "rtn", None, 8.1),
        Layer("1.down", "W4A16", [10, 30], "gptq", 0.02, 4.1),
        Layer("head", None, [20, 10], note="left in float by the recipe"),
    ]
    folds = [
        Fold("0.norm", "norm", "smoothquant", "Diagonal", ["0.norm.weight"], ["0.q"], 100, 1e-7),
        Fold("0.norm", "norm", "rotate", "Rotate", ["0.norm.weight"], ["0.q", "gate"], 100, 3e-7),
        Fold("1.act", "up", "smoothquant", "Diagonal", ["1.up.weight"], ["1.down"], 300, 2e-7),
        Fold("1.act", "up", "rotate", "Rotate", [], ["0.up"], 200, 0.0, online=True),
    ]
    misses = [
        Miss("1.norm", "GELU stands between", "smoothquant", 100),
        Miss("2.norm", "a residual add takes the value", "smoothquant", 300),
        Miss("3.norm", "GELU stands between", "smoothquant", 100),
    ]
    steps = [StepRecord("smoothquant", {"alpha": 0.5}, 2, 1.25, ["alpha searched"])]
    return Report(
        model="Llama",
        recipe={"steps": ["smoothquant"]},
        linear_weights=1000,
        folds=folds,
        misses=misses,
        layers=layers,
        steps=steps,
        bytes_before=4000,
        bytes_after=1000,
        seconds=2.5,
        output_error=0.0123,
        versions={"torch": "2.13"},
        warnings=["layer 0.experts got no tokens"],
    )


def test_shares_count_each_layer_once() -> None:
    report = make_report()
    assert report.share_quantized == pytest.approx(0.8)
    assert report.share_folded == pytest.approx(0.4)  # 0.q once; not what is folded online
    assert Report("m", {}, 0).share_quantized == Report("m", {}, 0).share_folded == 0


def test_headline() -> None:
    assert make_report().headline() == (
        "quantized 80.0 % of linear weights (4 of 5 linears), "
        "folded 40.0 % (2 norm, 1 up, 1 up (online)), output error 1.23 %"
    )
    assert Report("m", {}, 0).headline() == (
        "quantized 0.0 % of linear weights (0 of 0 linears), folded 0.0 % (no folds), output error not measured"
    )


def test_summary_in_lines() -> None:
    lines = str(make_report()).splitlines()
    assert lines[0] == make_report().headline()
    assert "  Llama: 4,000 → 1,000 bytes (4.00 × smaller) in 2.5 s" in lines
    assert "  folded norm: 2, worst error 3.0e-07" in lines
    assert "  missed 2: GELU stands between (1.norm, ...)" in lines
    assert lines[-1] == "  warning: layer 0.experts got no tokens"


def test_a_miss_is_falsy_and_grouped() -> None:
    assert not Miss("a", "b")
    groups = make_report().misses_by_reason()
    assert [(why, len(group)) for why, group in groups.items()] == [
        ("a residual add takes the value", 1),
        ("GELU stands between", 2),
    ]


def test_json_both_ways() -> None:
    report = make_report()
    assert Report.from_json(report.to_json()) == report
    assert Report.from_dict(report.to_dict()) == report
    assert json.loads(report.to_json())["version"] == 1
    report.output_error = math.nan
    assert math.isnan(Report.from_json(report.to_json()).output_error)


def test_every_field_travels() -> None:
    data = make_report().to_dict()
    assert set(data) == {"version", *(f.name for f in dataclasses.fields(Report))}
    for name in ("folds", "misses", "layers", "steps"):
        assert all(data[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"color": 1}, r"unknown keys \['color'\] in report"),
        ({"layers": [{"name": "a", "scheme": None, "shape": [], "size": 1}]}, "in layers"),
        ({"folds": [{"site": "a"}]}, "folds: .*missing"),
        ({"misses": [3]}, "misses holds 3"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_dict(make_report().to_dict() | change)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}'])
def test_text_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Report.from_json(text)


def test_it_needs_no_torch() -> None:
    code = "import sys, qfx.core.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
