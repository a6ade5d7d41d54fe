"""Explain: what it announces is what quantize does, and it leaves the model alone."""

import copy
import json
from collections import Counter

import pytest
import torch
from torch import nn

import qfx
from qfx.core.report import general
from qfx.explanation import Explanation
from qfx.passes import METHODS
from qfx.report import plain
from tests.zoo import ZOO

TRANSFORMS = {
    "smoothquant": {"smooth_o": True},
    "outlier_suppression": {},
    "outlier_suppression_plus": {"value": True, "steps": 4},
}


@pytest.mark.parametrize("step", TRANSFORMS)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "block_stack"])
def test_the_plan_is_what_is_done(name: str, step: str) -> None:
    model, inputs = ZOO[name].load()
    recipe = {"schemes": {"*": "W8A8_STATIC", "@head": None}, "steps": [{step: TRANSFORMS[step]}]}
    plan = qfx.explain(model, recipe, [inputs])
    report = qfx.quantize(model, recipe, [inputs], progress=False).qfx.report
    taken = {s.name for s in plan.sites if 1 in s.steps}
    assert taken and taken == {f.site for f in report.folds} | {m.where for m in report.misses if m.step == step}
    assert {(x.name, x.scheme, tuple(x.shape)) for x in plan.layers} == {
        (x.name, x.scheme, tuple(x.shape)) for x in report.layers
    }
    assert {m for m in plan.misses} <= set(report.misses)
    assert plan.linear_weights == report.linear_weights and plan.warnings == [
        text for text in report.warnings if "reference graph" not in text
    ]


def test_what_nothing_absorbs_may_be_mapped_online() -> None:
    model, recipe, data = _with_inputs("gpt2")
    recipe["steps"] = [{"smoothquant": {"online": True}}]
    plan = qfx.explain(model, recipe, data)
    online = {s.name: s for s in plan.sites if s.kind == "online"}
    assert len(online) == 4 and all(s.steps == [1] for s in online.values())
    assert plan.steps[0].does == "9 sites: 5 norm, 4 online"
    report = qfx.quantize(model, recipe, data, progress=False).qfx.report
    assert {f.site for f in report.folds if f.online} | {m.where for m in report.misses} >= set(online)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_the_model_is_left_alone(name: str) -> None:
    model, inputs = ZOO[name].load()
    model.train()
    names, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    qfx.explain(model, {"schemes": {"*": "W8A8"}}, [inputs])  # the head is tied to the embedding
    assert model.training and not hasattr(model, "qfx")
    assert {key: id(value) for key, value in model.named_parameters()} == {key: id(p) for key, p in names.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def plan() -> Explanation:
    return qfx.explain(ZOO["llama"].load()[0], "w8a8-smoothquant")  # no data, though the recipe measures


def test_sites_say_what_folds_and_why_not(plan: Explanation) -> None:
    norm, value, *_ = plan.sites
    assert (norm.name, norm.kind, norm.steps) == ("model.layers.0.input_layernorm", "norm", [1])
    assert norm.readers == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"] and "Diagonal" in norm.folds
    assert "has no bias" in norm.why_not["Shift"]
    assert (value.kind, value.steps, value.unused) == ("value", [], "no step takes value sites")
    assert plan.sites[-1].name == "model.norm" and plan.sites[-1].unused == "its readers stay in float"
    assert [(s.name, s.needs_data, s.does) for s in plan.steps] == [
        ("smoothquant", True, "4 sites: 4 norm"),
        ("rtn", False, "14 layers"),
    ]


def test_layers_say_why_they_stay_in_float(plan: Explanation) -> None:
    assert [(x.name, x.note) for x in plan.layers if x.scheme is None] == [("lm_head", "ignored by '@head'")]
    assert [x.name for x in plan.layers[:3]] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]


def test_static_inputs_need_data() -> None:
    model, inputs = ZOO["mlp"].load()
    plan = qfx.explain(model, {"schemes": {"*": "W8A8_STATIC", "1": "W8A8"}}, [inputs])
    assert [(s.needs_data, s.does) for s in plan.steps] == [(True, "2 layers, 1 of them with static inputs")]
    assert "needs calibration data" in plan.headline()
    assert "needs no data" in qfx.explain(model, {"schemes": {"*": "W8A8"}}, [inputs]).headline()


def test_a_recipe_without_schemes_takes_every_site() -> None:
    model, inputs = ZOO["mlp"].load()
    plan = qfx.explain(model, {"steps": ["smoothquant"]}, [inputs])
    assert [s.steps for s in plan.sites if s.kind == "norm"] == [[1]] and not any(x.scheme for x in plan.layers)


def test_misses_have_reasons() -> None:
    plan = qfx.explain(*_with_inputs("gpt2"))
    assert {m.where for m in plan.misses} == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}
    shown = " ".join(str(plan).split())
    assert "transformer.h.*.mlp.c_proj 2 transformer.h.*.mlp.c_fc writes its input, but" in shown
    assert "not commute" in shown and "untied" in shown


def test_blocks_are_shown_once(plan: Explanation) -> None:
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 120
    (row,) = [line.split() for line in lines if line.startswith("model.layers.*.mlp.down_proj")]
    assert row[1:3] == ["2", "W8A8"]
    assert not any(line.startswith("model.layers.1") for line in lines)
    every = plain(plan.render(verbose=True), 300).splitlines()
    first = Counter(line.split()[0] for line in every if line)
    assert all(first[layer.name] for layer in plan.layers) and "AddedShift" in "".join(every)


def test_it_is_plain_data(plan: Explanation) -> None:
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["version"] == 1 and data["model"] == "LlamaForCausalLM" and len(data["sites"]) == 9
    assert data["recipe"] == qfx.Recipe.load("w8a8-smoothquant").to_dict()


def test_every_transform_says_what_it_wants() -> None:
    wanting = {name for name, cls in METHODS.items() if hasattr(cls, "wanted")}
    folding = {name for name, cls in METHODS.items() if ".transform." in cls.__module__}
    assert wanting == folding


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.mlp.experts.12.up", "model.layers.*.mlp.experts.*.up"),
        ("layers.3.up writes it, but 'pow' at pow_2 does not", "layers.*.up writes it, but 'pow' at pow does not"),
        ("undone: changed its block by 0.0023 (at most 1e-04)", "undone: changed its block by 0.0023 (at most 1e-04)"),
        ("h.1.attn.c_attn[128:192]", "h.*.attn.c_attn[128:192]"),
        ("fc_1", "fc_1"),
    ],
)
def test_general_drops_the_numbers_of_blocks_only(text: str, shown: str) -> None:
    assert general(text) == shown


def _with_inputs(name: str) -> tuple[nn.Module, dict, list]:
    model, inputs = ZOO[name].load()
    return model, {"schemes": {"*": "W8A8"}}, [inputs]
