"""Recipes: every form of one recipe is the same recipe, what cannot be read is refused, and patterns choose layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import qfx
from qfx.core.errors import RecipeError
from qfx.core.grid import E4M3, Codebook, Int
from qfx.core.spec import QSpec, Scheme, parse_scheme, scheme_label
from qfx.passes import METHODS, SOLVERS
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import make_plan
from qfx.passes.solve.gptq import Gptq
from qfx.passes.transform.smoothquant import SmoothQuant
from qfx.recipes import PRESETS, Recipe, settings
from tests.zoo import ZOO

MIXED = Recipe(
    {
        "*": parse_scheme("W4A16_ASYM_G32"),
        "mlp.*": Scheme(QSpec(Int(3), (1, 16))),
        "up_proj": Scheme(QSpec(Codebook("e2m1"), (1, 16), scale=QSpec(E4M3, (-1, -1)))),
        "re:.*o_proj": parse_scheme("FP8"),
        "@head": None,
    },
    (SmoothQuant(alpha="search", smooth_o=True), Gptq(act_order=True, damp=0.05)),
    ("model.layers.0.*",),
)
RECIPES = {name: make() for name, make in PRESETS.items()} | {"mixed": MIXED, "empty": Recipe()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_a_mapping_and_yaml(name: str, tmp_path: Path) -> None:
    recipe, path = RECIPES[name], tmp_path / "recipe.yaml"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.load(recipe.to_dict()) == recipe
    path.write_text(recipe.to_yaml())
    for given in (path, str(path), recipe):
        assert Recipe.load(given) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name: str) -> None:
    recipe = Recipe.load(name)
    assert [type(s) in SOLVERS for s in recipe.steps].count(True) == 1 and type(recipe.steps[-1]) in SOLVERS
    assert recipe.needs_data == (
        name not in {"w8a8", "w8a8-dynamic", "w8a16", "w4a16", "nf4", "nf4-dq", "fp4", "fp8-dynamic"}
    )
    for scheme in recipe.schemes.values():
        assert scheme is not None and scheme_label(scheme)


def test_names_stand_for_what_they_name() -> None:
    written = Recipe({"*": "W8A8"}, ["smoothquant", {"gptq": {"damp": 0.1}}], ["@head"])  # type: ignore[dict-item,list-item]
    assert written == Recipe({"*": parse_scheme("W8A8")}, (SmoothQuant(), Gptq(damp=0.1)), ("@head",))
    assert qfx.Recipe is Recipe and Recipe.load({"schemes": {"*": None}}).schemes == {"*": None}


def test_every_step_is_known_by_its_name() -> None:
    for name, cls in METHODS.items():
        step = cls()
        assert step.name == name and settings(step) == {}
        assert Recipe.from_dict({"steps": [name]}).steps == Recipe.from_dict({"steps": [{name: None}]}).steps == (step,)


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({"schemes": {"*": "W8A8"}}, ["rtn"]),
        ({"schemes": {"*": "W8A8"}, "steps": ["smoothquant"]}, ["smoothquant", "rtn"]),
        ({"schemes": {"*": "W8A8"}, "steps": ["smoothquant", "gptq"]}, ["smoothquant", "gptq"]),
        ({"schemes": {"*": None}, "steps": ["smoothquant"]}, ["smoothquant"]),
        ({"steps": ["smoothquant"]}, ["smoothquant"]),
        ({}, []),
    ],
)
def test_schemes_get_the_solver_that_they_need(recipe: dict, steps: list[str]) -> None:
    assert [s.name for s in Recipe.load(recipe).steps] == steps


def test_which_recipes_need_data() -> None:
    def needs(scheme: str, *steps: Any) -> bool:
        return Recipe.from_dict({"schemes": {"*": scheme}, "steps": list(steps)}).needs_data

    assert not needs("W8A8") and not needs("W4A16") and not needs("FP8_DYNAMIC")
    assert needs("W8A8_STATIC") and needs("FP8") and needs("W4A16", "gptq") and needs("W8A8", "smoothquant")
    assert needs("W4A16", {"rtn": {"clip": "output"}}) and not needs("W4A16", {"rtn": {"clip": "mse"}})


WRONG: list[tuple[Any, str]] = [
    ({"scheme": {"*": "W8A8"}}, r"unknown keys \['scheme'\]; use 'schemes', 'steps', 'ignore'"),
    ({"schemes": "W8A8"}, "'schemes' maps patterns to schemes, not 'W8A8'"),
    ({"schemes": {"*": "W9A8"}}, "'W9A8' asks for weights of 9 bits; use 1 to 8"),
    ({"schemes": {"*": "W8A1"}}, "activations of 1 bits; use 2 to 8, or 16"),
    ({"schemes": {"*": "W4A16_STATIC"}}, "static but keeps float activations; drop '_STATIC'"),
    ({"schemes": {"*": "int4"}}, r"unknown scheme 'int4'; use W<bits>A<bits> \(W8A8.*or one of .*FP8"),
    ({"schemes": {"*": 4}}, "a scheme is a name, a mapping, or null, not 4"),
    ({"schemes": {"*": {"preset": "W4A16", "group": 64}}}, r"unknown scheme keys \['group'\]; use 'preset' and"),
    ({"schemes": {"*": {"preset": "W4A16", "group_size": "64"}}}, "group_size is '64'; use a positive number, or -1"),
    ({"schemes": {"*": {"preset": "W4A16", "group_size": 0}}}, "group_size is 0; use a positive number"),
    ({"schemes": {"*": {"input": None}}}, "lacks 'weight'; write its name, or 'preset', or 'weight'"),
    ({"schemes": {"*": {"weight": {"grid": {"type": "int", "bits": 9}, "block": [1, -1]}}}}, "bad scheme .*9 bits"),
    ({"steps": "gptq"}, "'steps' is a list, not 'gptq'"),
    ({"steps": {"gptq": None}}, "'steps' is a list, not {'gptq': None}"),
    ({"steps": [{"gptq": None, "rtn": None}]}, "a step is a name or {name: settings}, not {'gptq'"),
    ({"steps": [7]}, "a step is a name or {name: settings}, not 7"),
    ({"steps": ["gtpq"]}, "unknown step 'gtpq'; steps: smoothquant, .*gptq"),
    ({"steps": [{"gptq": {"dampening": 1}}]}, r"step 'gptq' has no setting \['dampening'\]; its settings: .*damp"),
    ({"steps": [{"gptq": 0.5}]}, "step 'gptq' has no setting 0.5"),
    ({"steps": [{"gptq": {"damp": "much"}}]}, "step 'gptq': damp = 'much': .*valid number"),
    ({"steps": [{"gptq": {"clip": "max"}}]}, "step 'gptq': clip = 'max': .*'minmax', 'mse' or 'output'"),
    ({"steps": [{"gptq": {"block_size": 1.5}}]}, "step 'gptq': block_size = 1.5: .*valid integer"),
    ({"steps": [{"smoothquant": {"smooth_o": "perhaps"}}]}, "step 'smoothquant': smooth_o = 'perhaps': .*boolean"),
    ({"steps": [{"smoothquant": {"alpha": 1.5}}]}, "alpha is 1.5; use a number from 0 to 1, or 'search'"),
    ({"steps": [{"outlier_suppression_plus": {"steps": 1}}]}, "steps is 1; use 2 or more"),
    ({"ignore": "lm_head"}, "'ignore' is a list of patterns, not 'lm_head'"),
    ({"ignore": 3}, "'ignore' is a list of patterns, not 3"),
    ({"ignore": [3]}, r"'ignore' is a list of patterns, not \[3\]"),
    ("w8a8-smothquant", "'w8a8-smothquant' is no preset and no YAML file; presets: w8a8, .*w8a8-smoothquant"),
    ("nothing.yaml", "cannot read nothing.yaml: No such file"),
    (["w8a8"], r"a preset's name, a YAML file, a mapping or a Recipe, not \['w8a8'\]"),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=[str(value)[:60] for value, _ in WRONG])
def test_what_is_no_recipe_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(value)


@pytest.mark.parametrize(
    ("text", "message"), [("- w8a8\n", "holds list, not a mapping"), ("a: [", "is not YAML"), ("", "holds NoneType")]
)
def test_what_is_no_yaml_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


Planned = Callable[[dict], dict[str, str | None]]


@pytest.fixture(scope="module")
def planned() -> Planned:
    """For a recipe, the label of each layer's scheme, or why the layer stays in float."""
    model, inputs = ZOO["llama"].load()
    graph = capture(model, inputs)
    linears, _ = find_linears(graph)
    names = {linear.weight: linear.name for linear in linears}

    def plan(given: dict) -> dict[str, str | None]:
        recipe = Recipe.from_dict(given)
        made = make_plan(graph, linears, recipe.schemes, recipe.ignore)
        return {names[w]: scheme_label(s) for w, s in made.schemes.items()} | dict.fromkeys(map(names.get, made.floats))

    return plan


ATTENTION = {f"self_attn.{leaf}_proj" for leaf in "qkvo"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("schemes", "ignore", "quantized"),
    [
        ({"*": "W8A8"}, [], {*ATTENTION, *MLP, "lm_head"}),
        ({"*": "W8A8"}, ["@head"], {*ATTENTION, *MLP}),
        ({"*": "W8A8"}, ["@router"], {*ATTENTION, *MLP, "lm_head"}),  # there is none: a role may be empty
        ({"*": "W8A8", "lm_head": None}, [], {*ATTENTION, *MLP}),
        ({"lm_head": None, "*": "W8A8"}, [], {*ATTENTION, *MLP, "lm_head"}),  # the last match wins
        ({"*": "W8A8", "mlp.*": None, "up_proj": "W4A16_G32"}, [], {*ATTENTION, "mlp.up_proj", "lm_head"}),
        ({"mlp.*": "W8A8"}, ["down_proj"], {"mlp.gate_proj", "mlp.up_proj"}),  # ignore wins over all
        ({r"re:.*\.(q|k)_proj": "W8A8"}, [], {"self_attn.q_proj", "self_attn.k_proj"}),
        ({"re:lm_head": "W8A8"}, [], {"lm_head"}),
        ({"model.layers.?.self_attn.[qk]_proj": "W8A8"}, [], {"self_attn.q_proj", "self_attn.k_proj"}),
    ],
)
def test_patterns_choose_layers(planned: Planned, schemes: dict, ignore: list[str], quantized: set[str]) -> None:
    chosen = [name for name, scheme in planned({"schemes": schemes, "ignore": ignore}).items() if scheme is not None]
    assert {name.split(".", 3)[-1] for name in chosen} == quantized
    assert len(chosen) == len(set(chosen)) == sum(1 if name == "lm_head" else 2 for name in quantized)


def test_the_last_match_gives_the_scheme(planned: Planned) -> None:
    labels = planned({"schemes": {"*": "W8A8", "mlp.*": "W4A16_G32", "model.layers.1.mlp.up_proj": "FP8_DYNAMIC"}})
    assert labels["model.layers.0.self_attn.q_proj"] == "W8A8"
    assert labels["model.layers.0.mlp.up_proj"] == labels["model.layers.1.mlp.down_proj"] == "W4A16_G32"
    assert labels["model.layers.1.mlp.up_proj"] == "FP8_DYNAMIC"


def test_routers_are_found_by_what_they_do() -> None:
    model, inputs = ZOO["mixtral"].load()
    layers = qfx.explain(model, "w8a8", [inputs]).layers
    assert {layer.name: layer.note for layer in layers if layer.scheme is None} == {
        "model.layers.0.mlp.gate": "ignored by '@router'",
        "model.layers.1.mlp.gate": "ignored by '@router'",
        "lm_head": "ignored by '@head'",
    }
