"""An interrupted run goes on where it stopped, and ends as an uninterrupted one."""

import pytest
import torch

import qfx
from qfx.core.errors import PackageError
from tests.zoo import ZOO

RECIPE = {"schemes": {"*": "W4A8_G16"}, "ignore": ["@head", "@router"], "steps": ["smoothquant", "gptq"]}


@pytest.fixture(scope="module")
def given():
    model, inputs = ZOO["llama"].load()
    return model, inputs, qfx.quantize(model, RECIPE, [inputs], progress=False)


def interrupted(model, inputs, folder, at: int) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "gptq" and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qfx.quantize(model, RECIPE, [inputs], progress=stop, resume=folder)


def test_it_goes_on_and_gives_the_same_bits(given, tmp_path, monkeypatch) -> None:
    model, inputs, whole = given
    interrupted(model, inputs, tmp_path / "run", 2)
    kept = list((tmp_path / "run").glob("*.safetensors"))
    assert kept
    solved = []
    import qfx.passes.solve._driver as driver

    real = driver._round
    monkeypatch.setattr(driver, "_round", lambda *a: solved.append(a[1]) or real(*a))
    q = qfx.quantize(model, RECIPE, [inputs], progress=False, resume=tmp_path / "run")
    layers = sum(layer.scheme is not None for layer in q.qfx.report.layers)
    assert len(solved) == layers - len(kept) < layers
    assert any(f"{len(kept)} layers were solved before" in n for s in q.qfx.report.steps for n in s.notes)
    got, want = q.state_dict(), whole.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_file_that_is_cut_short_is_solved_again(given, tmp_path) -> None:
    model, inputs, whole = given
    interrupted(model, inputs, tmp_path / "run", 2)
    victim = next((tmp_path / "run").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-7])
    q = qfx.quantize(model, RECIPE, [inputs], progress=False, resume=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(q.state_dict().values(), whole.state_dict().values(), strict=True))


def test_another_run_s_folder_is_refused(given, tmp_path) -> None:
    model, inputs, _ = given
    interrupted(model, inputs, tmp_path / "run", 2)
    with pytest.raises(PackageError, match="belongs to a run with another model, recipe, or calibration set"):
        qfx.quantize(model, {**RECIPE, "steps": ["gptq"]}, [inputs], progress=False, resume=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(PackageError, match="holds other files"):
        qfx.quantize(model, RECIPE, [inputs], progress=False, resume=tmp_path / "other")
