"""The README's code runs, and prints what the README says."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

import qfx
from qfx.passes import METHODS
from qfx.recipes import PRESETS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


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
