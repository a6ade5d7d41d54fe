"""Loads a model and its tokenizer from a local folder in Hugging Face's form, or says in one line why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._build import is_marked
from ._manifest import MANIFEST, one_line
from .core.errors import QfxError

CONFIG = "config.json"
DTYPES = ("auto", "float32", "bfloat16")


def load_model(folder: Path, dtype: str = "auto", device: str = "cpu") -> tuple[nn.Module, list[str]]:
    """A model of the class that its config names, in evaluation mode, and remarks on how it was loaded.

    Args:
        folder: with config.json and the weights.
        dtype: "auto" (the checkpoint's; float32 instead of float16 on a CPU), "float32" or "bfloat16".
        device: where to put it.

    Raises:
        QfxError: there is no such folder, or transformers cannot load it whole.
    """
    if dtype not in DTYPES:
        raise QfxError(f"model: dtype is {dtype!r}; use {', '.join(DTYPES)}")
    place = _device(device)
    stored = _read_config(folder)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = _class_of(transformers, stored)
        wanted, notes = _dtype(config, dtype, place)
        model, info = cls.from_pretrained(
            folder, config=config, dtype=wanted, local_files_only=True, output_loading_info=True
        )
    except Exception as e:  # whatever transformers, safetensors or the checkpoint raise
        raise QfxError(f"model: transformers cannot load {folder}: {type(e).__name__}: {one_line(e)}") from e
    lacking = sorted(map(str, info["missing_keys"]))
    if lacking:  # transformers would draw them at random
        more = " ..." if len(lacking) > 3 else ""
        raise QfxError(
            f"model: {folder} lacks {len(lacking)} weights of {cls.__name__} ({', '.join(lacking[:3])}{more}); "
            "the checkpoint is incomplete, or config.json names another architecture"
        )
    if info["unexpected_keys"]:
        notes.append(f"{len(info['unexpected_keys'])} weights of the checkpoint are not in {cls.__name__}: left out")
    return model.to(place).eval(), notes


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        QfxError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises many kinds
        raise QfxError(f"tokenizer: {folder} has none that loads: {type(e).__name__}: {one_line(e)}") from e


def is_quantized(folder: Path) -> bool:
    """Whether `qfx.save` wrote the folder."""
    return (folder / MANIFEST).is_file()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise QfxError(
            f"model: there is no folder {folder}; download the model first (hf download NAME --local-dir {folder.name})"
        )
    path = folder / CONFIG
    if not path.is_file():
        held = sorted(p.name for p in folder.iterdir())
        found = f"it has {', '.join(held[:4])}{' ...' if len(held) > 4 else ''}" if held else "it is empty"
        raise QfxError(f"model: {folder} has no {CONFIG}, {found}; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise QfxError(f"model: {path} cannot be read: {one_line(e)}") from None
    if not isinstance(config, dict):
        raise QfxError(f"model: {path} holds no JSON object")
    if is_marked(config):
        raise QfxError(
            f"model: {folder} was saved by qfx, qfx.load('{folder}') loads it; here, start from the float model"
        )
    if config.get("quantization_config"):
        raise QfxError(f"model: {folder} is quantized already (its {CONFIG} says how); start from the float model")
    return config


def _class_of(transformers: Any, config: dict[str, Any]) -> Any:
    """The class that the config names, so that heads and encoders are what they were; else a causal language model."""
    names = config.get("architectures") or []
    found = getattr(transformers, str(names[0]), None) if names else None
    return found if hasattr(found, "from_pretrained") else transformers.AutoModelForCausalLM


def _dtype(config: Any, wanted: str, place: torch.device) -> tuple[torch.dtype | str, list[str]]:
    if wanted != "auto":
        return getattr(torch, wanted), []
    stored = getattr(config, "dtype", None)
    if stored == torch.float16 and place.type == "cpu":
        return torch.float32, [
            "the checkpoint is float16: loaded as float32, since float16 is slow and overflows on a CPU"
        ]
    return "auto", []


def _device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise QfxError(f"model: the device {device!r} is not there ({one_line(e)}); choose another") from None
