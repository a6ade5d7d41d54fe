"""`genai_config.json`: how ONNX Runtime GenAI generates with an exported decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qfx.export.onnx_graph.forms import Form

FILE = "genai_config.json"


def write_genai(folder: Path, model: Any, form: Form) -> None:
    """Writes the file for a decoder with a cache; what the model's configs do not say is left out."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    generation = getattr(model, "generation_config", None)
    heads, size = form.cache[0]
    inputs = {k: k for k in ("input_ids", "attention_mask", "position_ids") if k in form.inputs}
    decoder: dict[str, Any] = {
        "filename": f"{form.name}.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": size,
        "hidden_size": getattr(config, "hidden_size", None),
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_hidden_layers": len(form.cache),
        "num_key_value_heads": heads,
        "inputs": {
            **inputs,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    length = getattr(config, "max_position_embeddings", None)
    tokens = {name: _token(name, generation, config) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:  # it wants one: the first end of text, as is the custom
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
    described: dict[str, dict[str, Any]] = {
        "model": {
            **tokens,
            "context_length": length,
            "decoder": {k: v for k, v in decoder.items() if v is not None},
            "type": getattr(config, "model_type", None),
            "vocab_size": getattr(config, "vocab_size", None),
        },
        # keys and values are concatenated: the past cannot be written in place
        "search": {"max_length": length, "past_present_share_buffer": False, **_search(generation)},
    }
    plain = {part: {k: v for k, v in values.items() if v is not None} for part, values in described.items()}
    (folder / FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _token(name: str, *configs: Any) -> Any:
    return next((found for c in configs if (found := getattr(c, name, None)) is not None), None)


def _search(generation: Any) -> dict[str, Any]:
    names = ("do_sample", "num_beams", "temperature", "top_k", "top_p", "repetition_penalty")
    return {name: found for name in names if (found := getattr(generation, name, None)) is not None}
