"""Encoders, vision towers and encoder-decoders."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .decoders import BATCH, GATED, LENGTH, TOKENS, VOCAB, Row, build, token_ids

TEXT: dict[str, Any] = {**{k: v for k, v in GATED.items() if k != "use_cache"}, "num_labels": 10}
DISTIL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
DINO: dict[str, Any] = {**IMAGE, "mlp_ratio": 2}
DINO.pop("intermediate_size")
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "num_labels": 10,
}
T5: dict[str, Any] = {
    **TOKENS,
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
FRAMES, MELS = 24, 16


def masked_inputs() -> dict[str, Tensor]:
    """Return ids and an attention mask of ones."""
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs() -> dict[str, Tensor]:
    """Return seeded images."""
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}


def pair_inputs() -> dict[str, Tensor]:
    """Return the inputs of a text-to-text model; the two lengths differ."""
    return {**masked_inputs(), "decoder_input_ids": token_ids(2, LENGTH - 4)}


def speech_inputs() -> dict[str, Tensor]:
    """Return mel frames and decoder ids."""
    generator = torch.Generator().manual_seed(3)
    return {
        "input_features": torch.randn(BATCH, MELS, FRAMES, generator=generator),
        "decoder_input_ids": token_ids(2),
    }


def clip_inputs() -> dict[str, Tensor]:
    """Return texts and as many images."""
    return {**masked_inputs(), **image_inputs()}


def build_clip() -> nn.Module:
    """Build a CLIP of both towers."""
    config = transformers.CLIPConfig(
        text_config={**TEXT, "projection_dim": 32},
        vision_config={**IMAGE, "projection_dim": 32},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def encoder(name: str, model: str, config: str, sizes: dict[str, Any], **more: Any) -> Row:
    """Describe a text encoder."""
    return name, partial(build, model, config, **{**sizes, **more}), masked_inputs, "encoder"


def vision(name: str, model: str, config: str, sizes: dict[str, Any], **more: Any) -> Row:
    """Describe an image encoder."""
    return name, partial(build, model, config, **{**sizes, **more}), image_inputs, "vision"


def pair(name: str, family: str, sizes: dict[str, Any], **more: Any) -> Row:
    """Describe `{family}` with a language head, text to text."""
    head = "MTModel" if family == "Marian" else "ForConditionalGeneration"
    make = partial(build, f"{family}{head}", f"{family}Config", **{**sizes, **more})
    return name, make, pair_inputs, "encoder-decoder"


ENCODERS: tuple[Row, ...] = (
    encoder("bert", "BertForMaskedLM", "BertConfig", TEXT),
    encoder("bert_classifier", "BertForSequenceClassification", "BertConfig", TEXT),
    encoder("roberta", "RobertaForMaskedLM", "RobertaConfig", TEXT),
    encoder(
        "roberta_pre_norm",
        "RobertaPreLayerNormForMaskedLM",
        "RobertaPreLayerNormConfig",
        TEXT,
    ),
    encoder("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    encoder("albert", "AlbertForMaskedLM", "AlbertConfig", TEXT, embedding_size=32),
    encoder("electra", "ElectraForMaskedLM", "ElectraConfig", TEXT, embedding_size=32),
    encoder(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        local_attention=8,
        layer_types=["full_attention", "sliding_attention"],
    ),
    encoder("mpnet", "MPNetForMaskedLM", "MPNetConfig", TEXT),
    encoder(
        "esm",
        "EsmForMaskedLM",
        "EsmConfig",
        {**TEXT, "mask_token_id": 3},
        position_embedding_type="rotary",
    ),
    encoder(
        "eurobert",
        "EuroBertForMaskedLM",
        "EuroBertConfig",
        {**TEXT, "mask_token_id": 3, "num_key_value_heads": 2},
    ),
    encoder("nomic_bert", "NomicBertModel", "NomicBertConfig", TEXT),
    encoder("roformer", "RoFormerForMaskedLM", "RoFormerConfig", TEXT),
    encoder("clip_text", "CLIPTextModelWithProjection", "CLIPTextConfig", TEXT, projection_dim=32),
)

VISION: tuple[Row, ...] = (
    vision("vit", "ViTForImageClassification", "ViTConfig", IMAGE),
    vision("deit", "DeiTForImageClassification", "DeiTConfig", IMAGE),
    vision("dinov2", "Dinov2ForImageClassification", "Dinov2Config", DINO),
    vision("dinov2_swiglu", "Dinov2Model", "Dinov2Config", DINO, use_swiglu_ffn=True),
    vision("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, num_register_tokens=2),
    vision("dinov3_gated", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, use_gated_mlp=True),
    vision(
        "beit",
        "BeitForImageClassification",
        "BeitConfig",
        IMAGE,
        use_relative_position_bias=True,
    ),
    vision("swin", "SwinForImageClassification", "SwinConfig", SWIN),
    vision("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", IMAGE),
    vision(
        "clip_vision",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        IMAGE,
        projection_dim=32,
    ),
    ("clip", build_clip, clip_inputs, "vision"),
)

PAIRS: tuple[Row, ...] = (
    pair("t5", "T5", T5),
    # Untied is how its config says 1.1: the head is tied still, but its input not rescaled.
    pair("t5_gated", "T5", T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    pair("umt5", "UMT5", T5),
    pair("bart", "Bart", BART),
    pair("mbart", "MBart", BART),
    pair("pegasus", "Pegasus", BART),
    pair("marian", "Marian", BART),
    pair("m2m_100", "M2M100", BART, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    (
        "whisper",
        partial(
            build,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            num_mel_bins=MELS,
            max_source_positions=FRAMES // 2,
            max_target_positions=64,
        ),
        speech_inputs,
        "encoder-decoder",
    ),
)

OTHERS: tuple[Row, ...] = (*ENCODERS, *VISION, *PAIRS)
