"""Exact sites of some architectures: who writes, who reads, which rows, which channel where, and why not."""

import functools

import pytest
import torch

from qfx.core.passes import State
from qfx.core.site import Site
from qfx.quantize import discover
from qfx.recipes import Recipe
from tests.zoo import ZOO

HEADS, WIDTH = 4, 16  # of most models of the zoo: hidden 64, inner 96
ALL = {"Diagonal", "SignedDiagonal", "Shift"}
SCALES = {"Diagonal", "SignedDiagonal"}


@functools.cache
def found(name: str) -> State:
    model, inputs = ZOO[name].load()
    with torch.no_grad():
        return discover(model, Recipe({}), [inputs], lambda *_: None)


def site(name: str, writer: str, kind: str | None = None) -> Site:
    (only,) = [s for s in found(name).sites if s.writer.name == writer and kind in (None, s.kind)]
    return only


def readers(s: Site) -> list[str]:
    return [r.linear.name for r in s.readers]


def rows(s: Site) -> list[int]:
    return s.writer.rows.tolist()


def why(name: str, layer: str) -> str:
    return " / ".join(dict.fromkeys(m.why for m in found(name).report.misses if m.where == layer))


def test_a_gated_decoder_has_five_kinds_of_site_and_no_miss() -> None:
    state, block = found("llama"), "model.layers.0"
    expected = [
        (f"{block}.input_layernorm", "norm", 64, [f"{block}.self_attn.{p}_proj" for p in "qkv"], SCALES),
        (f"{block}.self_attn.v_proj", "value", 16, [f"{block}.self_attn.o_proj"], ALL),
        (f"{block}.post_attention_layernorm", "norm", 64, [f"{block}.mlp.{p}_proj" for p in ("gate", "up")], SCALES),
        (f"{block}.mlp.up_proj", "inner", 96, [f"{block}.mlp.down_proj"], SCALES),
    ]
    got = [(s.name, s.kind, s.channels, readers(s), s.folds & ALL) for s in state.sites]
    assert got[:4] == expected
    second = [(n.replace("s.0", "s.1"), k, c, [r.replace("s.0", "s.1") for r in rs], f) for n, k, c, rs, f in expected]
    assert got[4:] == [*second, ("model.norm", "norm", 64, ["lm_head"], SCALES)]
    assert not state.report.misses
    assert "AddedShift" in state.sites[0].folds  # an RMS norm has no bias, but may be given one


def test_a_norm_is_read_channel_by_channel() -> None:
    for reader in site("llama", "model.layers.0.input_layernorm").readers:
        assert torch.equal(reader.index, torch.arange(64))


def test_value_heads_repeat_over_query_groups() -> None:
    groups, head_dim = 2, 8
    (o_proj,) = site("llama", "model.layers.0.self_attn.v_proj").readers
    kv_heads = torch.arange(groups * head_dim).view(groups, head_dim)
    assert torch.equal(o_proj.index, kv_heads.repeat_interleave(HEADS // groups, 0).flatten())


def test_one_value_head_serves_all_queries() -> None:
    s = site("falcon", "transformer.h.0.self_attention.query_key_value")
    assert rows(s) == [*range(80, 96)]  # 4 query heads, a key, a value
    assert s.readers[0].index.tolist() == [*range(WIDTH)] * HEADS


# In which rows of a fused product the value is.
HELD = {
    "gpt2": ("transformer.h.0.attn.c_attn", [*range(128, 192)]),
    "mpt": ("transformer.blocks.0.attn.Wqkv", [*range(128, 192)]),
    "phi3": ("model.layers.0.self_attn.qkv_proj", [*range(96, 128)]),
    # [head, (q, k, v), width]
    "bloom": (
        "transformer.h.0.self_attention.query_key_value",
        [48 * h + 32 + i for h in range(HEADS) for i in range(WIDTH)],
    ),
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", [48 * h + 32 + i for h in range(4) for i in range(16)]),
    # [group, (q, q, k, v), width]
    "falcon_grouped": (
        "transformer.h.0.self_attention.query_key_value",
        [64 * g + 48 + i for g in range(2) for i in range(WIDTH)],
    ),
    # [head, (16 of the key, 12 of the value)]
    "deepseek_v3": ("model.layers.0.self_attn.kv_b_proj", [28 * h + 16 + i for h in range(HEADS) for i in range(12)]),
    "multihead_attention": ("attention.in_proj_weight", [*range(128, 192)]),
}


@pytest.mark.parametrize("name", HELD)
def test_the_value_is_found_among_the_rows_of_a_fused_product(name: str) -> None:
    writer, held = HELD[name]
    s = site(name, writer)
    assert (s.kind, rows(s), len(s.readers)) == ("value", held, 1)
    assert s.folds >= ALL
    if s.channels == s.readers[0].linear.read(found(name).graph).shape[-1]:
        assert torch.equal(s.readers[0].index, torch.arange(s.channels))


@pytest.mark.parametrize(
    ("name", "writer", "reader"),
    [
        ("phi3", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"),
        ("glm4", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_only_the_up_half_of_a_gated_product_folds(name: str, writer: str, reader: str) -> None:
    s = site(name, writer)
    assert (s.kind, rows(s), readers(s), s.folds & ALL) == ("inner", [*range(96, 192)], [reader], SCALES)
    assert torch.equal(s.readers[0].index, torch.arange(96))


def test_the_gain_of_a_norm_is_read_with_what_is_added_to_it() -> None:
    gains = {name: site(name, "model.layers.0.input_layernorm").writer.gain for name in ("llama", "gemma", "nemotron")}
    assert {n: (g.param, g.slope, g.offset) for n, g in gains.items()} == {
        "llama": ("model.layers.0.input_layernorm.weight", 1, 0),
        "gemma": ("model.layers.0.input_layernorm.weight", 1, 1),
        "nemotron": ("model.layers.0.input_layernorm.weight", 1, 1),
    }


def test_routers_and_experts_read_a_norm_with_the_other_branches() -> None:
    mlp = "model.layers.0.mlp"
    s = site("mixtral", "model.layers.0.post_attention_layernorm")
    assert readers(s) == [f"{mlp}.gate", f"{mlp}.experts.gate_up_proj"]
    assert not {"Shift", "AddedShift"} & s.folds
    assert "router" not in s.why_not["Shift"] and f"{mlp}.gate has no bias" in s.why_not["Shift"]
    shared = site("deepseek_v3", "model.layers.1.post_attention_layernorm")
    names = {"gate", "experts.gate_up_proj", "shared_experts.gate_proj", "shared_experts.up_proj"}
    assert set(readers(shared)) == {f"model.layers.1.mlp.{n}" for n in names}


def test_parallel_branches_read_one_norm() -> None:
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    expected = [*(f"{attention}.{p}_proj" for p in "qkv"), f"{mlp}.fc1"]
    assert readers(site("phi", "model.layers.0.input_layernorm")) == expected


def test_a_rectifier_passes_positive_scales_only() -> None:
    s = site("opt", "model.decoder.layers.0.fc1")
    assert (s.kind, readers(s), s.folds) == ("inner", ["model.decoder.layers.0.fc2"], {"Diagonal"})
    assert set(s.why_not) == {"SignedDiagonal", "Shift"}


def test_a_sink_takes_probability_so_values_do_not_shift() -> None:
    s = site("gpt_oss", "model.layers.0.self_attn.v_proj")
    assert s.folds == SCALES
    assert "does not commute" in s.why_not["Shift"]


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        (
            "gpt_neox",
            "gpt_neox.layers.0.mlp.dense_4h_to_h",
            "dense_h_to_4h writes its input, but 'gelu' at gelu",
        ),
        ("gpt2", "transformer.h.0.mlp.c_proj", "c_fc writes its input, but 'pow' at pow_1 does not commute"),
        ("bert", "bert.encoder.layer.0.attention.self.key", "embeddings.LayerNorm writes its input, but 'add' at"),
        ("bert", "bert.encoder.layer.1.intermediate.dense", "attention.output.LayerNorm writes its input, but 'add'"),
        ("bert", "bert.encoder.layer.0.output.dense", "intermediate.dense writes its input, but 'gelu'"),
        ("olmo2", "model.layers.0.self_attn.q_proj", "no norm or linear writes its input"),
        ("diffllama", "model.layers.0.self_attn.o_proj", "v_proj writes its input, but 'rms_norm'"),
        (
            "t5",
            "decoder.block.0.layer.1.EncDecAttention.k",
            "encoder.final_layer_norm writes its input, but its value is",
        ),
        ("llama_tied", "lm_head", "model.norm writes its input, but lm_head.weight is also used by model.embed_tokens"),
        ("norm_to_residual", "up", "norm writes its input, but 'add' at add does not commute"),
        ("branching_output", "up", "norm writes its input, but its value is an output of the model"),
        ("shared_linear", "linear", "norm_a writes its input, but linear.weight is also used by linear"),
        ("shared_linear", "down", "linear writes its input, but linear.bias is also used by linear"),
        ("shared_block", "block.up", "block.norm writes its input, but block.norm.bias is also used by block.norm"),
        ("shared_block", "block.down", "block.up writes its input, but block.up.bias is also used by block.up"),
        ("esm", "esm.contact_head.regression", "the captured call does not run it"),
        ("siglip_vision", "head.attention.in_proj_weight", "linear takes a computed part of it, which no view covers"),
    ],
)
def test_what_is_not_a_site_says_why(name: str, layer: str, reason: str) -> None:
    assert reason in why(name, layer)
    assert layer not in {r for s in found(name).sites for r in readers(s)}


def test_what_surrounds_a_shared_part_still_folds() -> None:
    assert [s.name for s in found("shared_block").sites] == ["norm"]
    assert not found("shared_linear").sites
    assert [s.name for s in found("norm_to_residual").sites] == ["up"]


def test_every_layer_is_reported_once() -> None:
    for name in ("siglip_vision", "shared_block", "esm", "t5"):
        names = [layer.name for layer in found(name).report.layers]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["deepseek_v3", "bloom", "gpt_oss"])
def test_a_second_discovery_finds_the_same(name: str) -> None:
    first = [(s.name, s.folds, s.why_not, readers(s)) for s in found(name).sites]
    assert first == [(s.name, s.folds, s.why_not, readers(s)) for s in found.__wrapped__(name).sites]
