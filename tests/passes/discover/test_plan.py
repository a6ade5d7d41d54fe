"""Plans: which pattern takes which layer, what is refused, and heads that are untied from their embedding."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.errors import RecipeError
from qfx.core.spec import Scheme, parse_scheme
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import Plan, find_heads, find_routers, make_plan, untie
from tests.zoo.captured import Captured, captured

A, B, C = (parse_scheme(name) for name in ("W8A8", "W8A16", "W4A16_G32"))
ATTENTION, MLP = "q_proj k_proj v_proj o_proj".split(), "gate_proj up_proj down_proj".split()  # noqa: SIM905
BLOCKS = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.", "mlp.")]
LAYERS = [b + n for b in BLOCKS for n in (ATTENTION if "attn" in b else MLP)] + ["lm_head"]


def plan_of(model: Captured, patterns: dict[str, Scheme | None], ignore: tuple[str, ...] = ()) -> Plan:
    return make_plan(model.graph, model.linears, patterns, ignore)


def taken(patterns: dict[str, Scheme | None], ignore: tuple[str, ...] = (), name: str = "llama") -> dict[str, Scheme]:
    plan = plan_of(captured(name), patterns, ignore)
    return {weight.removesuffix(".weight"): scheme for weight, scheme in plan.schemes.items()}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", LAYERS),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("up_proj", [n for n in LAYERS if n.endswith("up_proj")]),  # the last part of a name
        ("mlp.up_proj", [n for n in LAYERS if n.endswith("up_proj")]),
        ("*.up_proj", [n for n in LAYERS if n.endswith("up_proj")]),
        ("*_proj", LAYERS[:-1]),
        ("[qk]_proj", [n for n in LAYERS if n[-6:-5] in "qk" and n.endswith("_proj")]),
        ("layers.1.*", [n for n in LAYERS if ".1." in n]),
        ("model.layers.?.self_attn.*", [n for n in LAYERS if "attn" in n]),
        ("re:.*layers\\.0\\.(mlp|self_attn)\\..*", [n for n in LAYERS if ".0." in n]),
        ("re:lm_.*", ["lm_head"]),
        ("@head", ["lm_head"]),
    ],
)
def test_what_a_pattern_takes(pattern: str, wanted: list[str]) -> None:
    assert wanted and taken({pattern: B}) == dict.fromkeys(wanted, B)
    ignored = plan_of(captured("llama"), {"*": B}, (pattern,))
    assert set(ignored.floats) == {f"{n}.weight" for n in wanted} and len(ignored.schemes) == 15 - len(wanted)


def test_the_last_match_wins_and_ignore_over_all() -> None:
    assert taken({"*": A, "mlp.*": B, "down_proj": C, "@head": None}) == {
        n: C if "down" in n else B if "mlp" in n else A for n in LAYERS[:-1]
    }
    assert set(taken({"mlp.*": B, "*": A}).values()) == {A}
    assert taken({"*": A, "@head": None, "lm_head": B})["lm_head"] == B
    plan = plan_of(captured("llama"), {"*_proj": A, "v_proj": None}, ("layers.0.*", "up_proj"))
    why = {n: plan.floats.get(f"{n}.weight") for n in LAYERS}
    assert why["lm_head"] == "no pattern matches it"
    assert why["model.layers.1.self_attn.v_proj"] == "kept in float by 'v_proj'"
    assert why["model.layers.0.self_attn.v_proj"] == "ignored by 'layers.0.*'"
    assert why["model.layers.0.mlp.up_proj"] == why["model.layers.1.mlp.up_proj"] == "ignored by 'up_proj'"
    assert set(plan.schemes) | set(plan.floats) == {f"{n}.weight" for n in LAYERS}
    assert not set(plan.schemes) & set(plan.floats) and len(plan.schemes) == 5


@pytest.mark.parametrize(
    ("name", "heads", "routers"),
    [
        ("llama", ["lm_head"], []),
        ("mixtral", ["lm_head"], ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        ("deepseek_v3", ["lm_head"], ["model.layers.1.mlp.gate"]),  # the other gates are gated MLPs'
        ("bert", ["cls.predictions.decoder"], []),
    ],
)
def test_roles(name: str, heads: list[str], routers: list[str]) -> None:
    model = captured(name)
    assert find_heads(model.graph, model.linears) == {f"{n}.weight" for n in heads}
    assert find_routers(model.graph, model.linears) == {f"{n}.weight" for n in routers}
    every = {lin.weight for lin in model.linears}
    plan = plan_of(model, {"*": A, "@head": None}, ("@router",))  # a model without routers may be asked for them
    assert set(plan.schemes) == every - {f"{n}.weight" for n in heads + routers}


@pytest.mark.parametrize(
    ("patterns", "ignore", "why"),
    [
        (
            {"*": A, "q_prj": B},
            (),
            "pattern 'q_prj' matches no layer of LlamaForCausalLM; its 15 layers are lm_head, m",
        ),
        ({"*": A}, ("head",), r"pattern 'head' matches no layer .* model.layers.0.self_attn.o_proj \.\.\.$"),
        ({"q_pro": A}, (), "'q_pro' matches no layer"),
        ({"Q_proj": A}, (), "'Q_proj' matches no layer"),
        ({"re:q_proj": A}, (), "'re:q_proj' matches no layer"),  # a regular expression is for the whole name
        ({"re:(": A}, (), r"'re:\(' is not a regular expression"),
        ({"@heads": A}, (), "unknown role '@heads'; use @head, @router"),
        (
            {"*": parse_scheme("W4A16")},
            (),
            "q_proj has 64 inputs, which group_size 128 does not divide; use group_size 64",
        ),
        ({"*": A, "o_proj": parse_scheme("W4A16")}, (), "o_proj has 32 inputs, .* use group_size 32"),
        (
            {"down_proj": parse_scheme("W4A16_G64")},
            (),
            "down_proj has 96 inputs, which group_size 64 .* use group_size 32",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(patterns: dict, ignore: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe: .*{why}"):
        plan_of(captured("llama"), patterns, ignore)


def test_group_sizes_count_only_where_they_are_used() -> None:
    wide = parse_scheme("W4A16_G64")
    assert "model.layers.0.mlp.down_proj" not in taken({"*": wide, "o_proj": A}, ("down_proj",))
    assert taken({"*": wide, "o_proj": A, "down_proj": C})["model.layers.1.mlp.down_proj"] == C


def test_models_without_linears_and_odd_widths() -> None:
    graph = capture(nn.LayerNorm(8), {"input": torch.randn(2, 8)})
    with pytest.raises(RecipeError, match=r"matches no layer of LayerNorm; it has no linear layer"):
        make_plan(graph, [], {"*": A})
    graph = capture(nn.Sequential(nn.Linear(10, 8)), {"input": torch.randn(2, 10)})
    with pytest.raises(
        RecipeError, match=r"0 has 10 inputs, .*; use one scale per channel \(W4A16_CHANNEL\), or ignore it"
    ):
        make_plan(graph, find_linears(graph)[0], {"*": C})


@pytest.mark.parametrize("pattern", ["@head", "lm_head", "*"])
def test_a_tied_head_gets_a_weight_of_its_own(pattern: str) -> None:
    model = captured("llama_tied")
    module, wanted, table = model.module, model.run(), model.module.model.embed_tokens.weight
    plan = plan_of(model, {pattern: A})
    untie(model.graph, model.linears, plan)
    head = model.linears[-1]
    assert module.model.embed_tokens.weight is table and module.lm_head.weight is not table
    assert (head.name, head.weight) == ("lm_head", "lm_head.weight") and plan.schemes["lm_head.weight"] == A
    assert plan.notes == ["lm_head: untied from model.embed_tokens.weight, which keeps the float weight"]
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(wanted, model.run(), model.call(), strict=True))
    hidden, old = model.env()[head.x], table.detach().clone()
    head.write(model.graph, torch.zeros(head.shape(model.graph)))
    assert table.equal(old) and not module.lm_head.weight.any()
    assert not model.run()[0].any() and not model.call()[0].any() and model.env()[head.x].equal(hidden)
    model.graph.fx.lint()
    start = model.snapshot()
    untie(model.graph, model.linears, plan)  # there is nothing left to do
    assert model.snapshot() == start


def test_a_head_that_stays_in_float_stays_tied() -> None:
    model = captured("llama_tied")
    start = model.snapshot()
    untie(model.graph, model.linears, plan_of(model, {"*": A, "@head": None}))
    assert model.snapshot() == start and model.module.lm_head.weight is model.module.model.embed_tokens.weight


class Tied(nn.Module):
    """A head that shares the embedding's weight, registered and read in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "head first":
            self.head = nn.Linear(8, 16, bias=False)
        self.embed, self.middle = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.other = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        if kind == "two heads":
            self.other.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.embed.weight
        x = F.embedding(ids, weight.double()).float() if self.kind == "cast" else self.embed(ids)
        x = weight[ids] if self.kind == "indexed" else x
        x = self.middle(x)
        x = F.linear(x, weight) if self.kind == "functional" else self.head(x)
        return x + self.other(x[..., :8]) if self.kind == "two heads" else x


@pytest.mark.parametrize("kind", ["plain", "head first", "cast", "indexed", "two heads", "functional"])
def test_ways_to_tie_a_head(kind: str) -> None:
    torch.manual_seed(0)
    feeds = {"ids": torch.arange(16).view(2, 8)}
    graph = capture(Tied(kind).eval(), feeds)
    model = Captured(graph, feeds, find_linears(graph)[0], torch.float32)
    plan, wanted, table = plan_of(model, {"*": A}), model.run(), model.module.embed.weight
    untie(graph, model.linears, plan)
    assert model.run()[0].equal(wanted[0]) and model.call()[0].equal(wanted[0])
    if kind == "functional":  # there is no layer that could be given a weight
        assert set(plan.schemes) == {"middle.weight"}
        assert plan.floats == {"head.weight": "its weight is also used by embed"} and not plan.notes
        return
    heads = {"head.weight", "other.weight"} if kind == "two heads" else {"head.weight"}
    assert set(plan.schemes) == {"middle.weight"} | heads == {lin.weight for lin in model.linears}
    old = table.detach().clone()
    for linear in model.linears:
        linear.write(graph, torch.randn(linear.shape(graph)))
    assert model.module.embed.weight is table and table.equal(old)
    assert not model.run()[0].equal(wanted[0]) and model.run()[0].equal(model.call()[0])
