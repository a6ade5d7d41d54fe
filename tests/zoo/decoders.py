"""Decoder-only language models: dense, then mixtures of experts.

The sizes are all different where an architecture lets them be (hidden 64, attention width 32,
intermediate 96, experts 48, vocabulary 128), so that a transposed or misread dimension fails.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# A name, how to build the model, how to make its inputs, and its kind.
Row = tuple[str, Callable[[], nn.Module], Callable[[], dict[str, Tensor]], str]

BATCH, LENGTH, VOCAB = 2, 12, 128

# Ids below this are special in one architecture or another (padding, end of text).
FIRST_ID = 8

TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
HIDDEN: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Most families since llama. `head_dim` is not hidden / heads, where a family lets one say so.
GATED: dict[str, Any] = {**HIDDEN, "intermediate_size": 96}
GROUPED: dict[str, Any] = {**GATED, "num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 8}
# The names that GPT-2 and its descendants use.
GPT: dict[str, Any] = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# A window shorter than the inputs, so that it masks something.
SLIDING: dict[str, Any] = {"sliding_window": 6}
ALTERNATING: dict[str, Any] = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# One dense layer, then one of experts; DeepSeek and those that follow it.
FINE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}


def token_ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    """Return seeded ids (batch, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ID, VOCAB, (BATCH, length), generator=generator)


def token_inputs() -> dict[str, Tensor]:
    """Return the inputs of a decoder."""
    return {"input_ids": token_ids()}


def build(model: str, config: str, **sizes: Any) -> nn.Module:
    """Build the transformers class `model` from the class `config`, both without weights."""
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def causal(
    name: str,
    family: str,
    sizes: dict[str, Any],
    kind: str = "decoder",
    **more: Any,
) -> Row:
    """Describe the language model of `family`, of the given sizes and `more`."""
    model = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    make = partial(build, model, config, **{**sizes, **more})
    return name, make, token_inputs, kind


def moe(name: str, family: str, sizes: dict[str, Any], **more: Any) -> Row:
    """Describe `{family}ForCausalLM` with experts, kept as 3-D parameters."""
    # The eager loop over experts depends on the data, so it cannot be exported.
    return causal(name, family, sizes, "moe", experts_implementation="grouped_mm", **more)


DENSE: tuple[Row, ...] = (
    causal("llama", "Llama", WIDE),
    causal("llama_tied", "Llama", WIDE, tie_word_embeddings=True),
    causal("llama_bias", "Llama", WIDE, attention_bias=True, mlp_bias=True),
    causal("mistral", "Mistral", WIDE, **SLIDING),
    causal("ministral", "Ministral", WIDE, **SLIDING),
    causal("qwen2", "Qwen2", GROUPED),
    causal("qwen3", "Qwen3", WIDE),
    causal("gemma", "Gemma", WIDE),
    causal("gemma2", "Gemma2", WIDE, query_pre_attn_scalar=8, **SLIDING),
    causal("gemma3_text", "Gemma3", WIDE, query_pre_attn_scalar=8, **ALTERNATING),
    causal("phi", "Phi", GROUPED),
    causal("phi_qk_norm", "Phi", GROUPED, qk_layernorm=True),
    causal("phi3", "Phi3", GROUPED),
    causal("gpt2", "GPT2", GPT, n_inner=96),
    causal(
        "gpt_neo",
        "GPTNeo",
        {**TOKENS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96},
        attention_types=[[["global", "local"], 1]],
        window_size=6,
    ),
    causal("gpt_neox", "GPTNeoX", GATED),
    causal("gpt_neox_serial", "GPTNeoX", GATED, use_parallel_residual=False),
    causal("gptj", "GPTJ", GPT, n_inner=96, rotary_dim=8),
    causal("bloom", "Bloom", TOKENS, hidden_size=64, n_layer=2, n_head=4),
    causal("falcon", "Falcon", HIDDEN, ffn_hidden_size=96, multi_query=True, parallel_attn=True),
    causal(
        "falcon_grouped",
        "Falcon",
        {**HIDDEN, "ffn_hidden_size": 96, "num_kv_heads": 2},
        new_decoder_architecture=True,
    ),
    causal(
        "falcon_rw",
        "Falcon",
        {**HIDDEN, "ffn_hidden_size": 96, "multi_query": False, "parallel_attn": False},
        alibi=True,
        bias=True,
    ),
    causal("opt", "OPT", HIDDEN, ffn_dim=96),
    causal(
        "opt_post_norm",
        "OPT",
        {**HIDDEN, "ffn_dim": 96},
        do_layer_norm_before=False,
        word_embed_proj_dim=32,
    ),
    causal("mpt", "Mpt", TOKENS, d_model=64, n_heads=4, n_layers=2, expansion_ratio=2),
    causal("olmo", "Olmo", GROUPED, clip_qkv=2.0),
    causal("olmo2", "Olmo2", GROUPED),
    causal("olmo3", "Olmo3", GROUPED, **ALTERNATING),
    causal("starcoder2", "Starcoder2", GROUPED),
    causal("stablelm", "StableLm", GROUPED, use_qkv_bias=True),
    causal("stablelm_parallel", "StableLm", GROUPED, use_parallel_residual=True, qk_layernorm=True),
    causal("cohere", "Cohere", GROUPED, use_qk_norm=True),
    causal("cohere2", "Cohere2", GROUPED, **SLIDING),
    causal(
        "granite",
        "Granite",
        GROUPED,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=4.0,
    ),
    causal("persimmon", "Persimmon", GATED),
    causal("glm", "Glm", WIDE),
    causal("glm4", "Glm4", WIDE),
    causal("codegen", "CodeGen", GPT, n_inner=96, rotary_dim=8),
    causal("biogpt", "BioGpt", GATED),
    causal("gpt_bigcode", "GPTBigCode", GPT, n_inner=96),
    causal("xglm", "XGLM", TOKENS, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96),
    causal("helium", "Helium", GROUPED, head_dim=16),
    causal("smollm3", "SmolLM3", GROUPED, no_rope_layers=[1, 0]),
    causal("nemotron", "Nemotron", WIDE),
    causal("exaone4", "Exaone4", GROUPED, **ALTERNATING),
    causal("ernie4_5", "Ernie4_5", WIDE),
    causal("hunyuan_dense", "HunYuanDenseV1", WIDE),
    causal("arcee", "Arcee", WIDE),
    causal("minicpm3", "MiniCPM3", {**GATED, **MLA}, dim_model_base=32, scale_emb=3),
    causal("seed_oss", "SeedOss", WIDE),
    causal("apertus", "Apertus", GROUPED),
    causal("nanochat", "NanoChat", GROUPED),
    causal("diffllama", "DiffLlama", GROUPED),
    causal(
        "lfm2",
        "Lfm2",
        {**GROUPED, "layer_types": ["conv", "full_attention"]},
        block_auto_adjust_ff_dim=False,
    ),
)

EXPERTS: tuple[Row, ...] = (
    moe("mixtral", "Mixtral", {**WIDE, **LOCAL}),
    moe(
        "qwen2_moe",
        "Qwen2Moe",
        {**GROUPED, **ROUTED},
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
    ),
    moe(
        "qwen3_moe",
        "Qwen3Moe",
        {**WIDE, **ROUTED},
        moe_intermediate_size=48,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    moe("olmoe", "Olmoe", {**GROUPED, **ROUTED}),
    moe("flex_olmo", "FlexOlmo", {**GROUPED, **ROUTED}),
    moe("deepseek_v2", "DeepseekV2", {**GATED, **MLA, **FINE}),
    moe("deepseek_v2_lite", "DeepseekV2", {**GATED, **MLA, **FINE, "q_lora_rank": None}),
    moe("deepseek_v3", "DeepseekV3", {**GATED, **MLA, **FINE, **GROUPS}),
    moe(
        "deepseek_v3_no_q_lora",
        "DeepseekV3",
        {**GATED, **MLA, **FINE, **GROUPS, "q_lora_rank": None},
    ),
    moe("glm4_moe", "Glm4Moe", {**WIDE, **FINE}, use_qk_norm=True),
    moe("dots1", "Dots1", {**WIDE, **FINE}),
    moe("gpt_oss", "GptOss", {**WIDE, **LOCAL, **SLIDING}),
    moe("granitemoe", "GraniteMoe", {**GROUPED, **LOCAL}, residual_multiplier=0.5),
    moe("phimoe", "Phimoe", {**GROUPED, **LOCAL}),
    # Its experts are a loop over the data and nothing else, so this one is not captured. The
    # attention reads the base of its rotation from a field that its own config lacks.
    causal(
        "dbrx",
        "Dbrx",
        {**TOKENS, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "moe",
        attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    moe(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
        moe_intermediate_size=48,
        moe_layer_start_index=1,
    ),
    moe("hunyuan_moe", "HunYuanMoEV1", WIDE, num_experts=4, moe_topk=2),
    # Longer inputs than one block of its linear attention would fix the number of blocks.
    moe("minimax", "MiniMax", {**WIDE, **LOCAL}, block_size=64),
)

DECODERS: tuple[Row, ...] = (*DENSE, *EXPERTS)
