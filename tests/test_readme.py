"""The README's code runs, and prints what the README says."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

import qfx
from qfx.passes import METHODS
from qfx.recipes import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_prints_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(blocks("python")[0], {})

    def stable(report: str) -> list[str]:  # seconds and rounding errors are the machine's
        text = re.sub(r"in [\d.]+ s|worst error \S+|output error \S+", "", report)
        return [line.rstrip() for line in text.strip().splitlines()]

    assert stable(printed.getvalue()) == stable(blocks("text")[0])
    assert qfx.load(tmp_path / "wiki-demo-int8").qfx.recipe == qfx.Recipe.load("w8a8-smoothquant")


def test_the_recipe_is_one() -> None:
    recipe = qfx.Recipe.from_dict(yaml.safe_load(blocks("yaml")[0]))
    assert [step.name for step in recipe.steps] == ["smoothquant", "gptq"] and len(recipe.schemes) == 3
    assert re.fullmatch(list(recipe.schemes)[2].removeprefix("re:"), "model.layers.0.mlp.up_proj")


def test_the_table_of_steps_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\|.*\| (.*) \| .* \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(METHODS)
    named = {preset for _, presets in rows for preset in re.findall(r"`([\w-]+)`", presets)}
    assert named and named <= set(PRESETS)


def test_every_command_is_one_of_the_cli() -> None:
    from qfx.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^qfx (\w+)", "\n".join(blocks("bash")), re.MULTILINE)) == commands


KERNELS = {
    "W4A16, groups of 128": "w4a16_linear",
    "W4A8 (int8), groups of 128, product alone": "w4a8_gemm",
    "W4A8_DQ, the same with scales in multiples": "w4a8_dq_gemm",
    "W8A8 (int8), with quantization": "int8_linear",
    "FP8, with quantization": "fp8_linear",
    "NF4": "nf4_linear",
    "LLM.int8, 1 % static outliers": "int8_outlier_linear static",
}


def test_the_speeds_are_those_that_were_measured() -> None:
    lines = (ROOT / "benchmarks/results/kernels.jsonl").read_text().splitlines()
    layer = [r for r in map(json.loads, lines) if (r.get("N"), r.get("K")) == (28672, 8192) and "us" in r]
    table = README.partition("<!-- kernels: begin -->")[2].partition("<!-- kernels: end -->")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    tokens = [int(m) for m in lines[0][1:]]
    assert [line[0] for line in lines[2:]] == list(KERNELS)
    for label, *cells in lines[2:]:
        for m, cell in zip(tokens, cells, strict=True):
            own = {r["name"]: r for r in layer if r["M"] == m}
            ours, bf16 = own[KERNELS[label]], own["bf16"]["us"]
            peers = [r["us"] for r in own.values() if r["role"] == "peer" and r["family"] == ours["family"]]
            best = f" ({bf16 / min(peers):.2f})" if peers else ""
            assert cell == f"{bf16 / ours['us']:.2f}{best}"
