"""The small files beside the tensors: tokenizer, configs, report."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ._manifest import CONFIG, GENERATION, REPORT, one_line
from .core.errors import PackageError
from .core.report import Report


def write_report(made: Path, report: Report) -> None:
    """Writes report.json."""
    try:
        text = report.to_json()
    except (TypeError, ValueError) as e:  # settings of a step of one's own may be anything
        raise PackageError(f"the report holds what JSON does not ({one_line(e)}); give steps plain settings") from None
    (made / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """Reads report.json; PackageError if it is none."""
    try:
        return Report.from_json((path / REPORT).read_text(encoding="utf-8"))
    except ValueError as e:
        raise PackageError(f"{REPORT} is not a report ({one_line(e)}); save the model again") from None


def write_configs(made: Path, model: nn.Module) -> None:
    """Writes config.json, with the model's class, and generation_config.json, if the model has them."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_file") and hasattr(config, "architectures"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.to_json_file(made / CONFIG)
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_file"):
        generation.to_json_file(made / GENERATION)


def read_generation(model: Any, path: Path) -> None:
    """Gives a model the generation_config.json of a folder."""
    try:
        model.generation_config = type(model.generation_config).from_pretrained(path)
    except (OSError, ValueError, TypeError) as e:
        raise PackageError(f"{GENERATION} cannot be read ({one_line(e)}); save the model again") from None


def write_tokenizer(made: Path, tokenizer: Any) -> None:
    """Writes a tokenizer, or copies the files of one from the folder given."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(made)
    elif tokenizer is not None:
        source = Path(tokenizer)
        patterns = ("*token*.json", "*token*.model", "vocab*", "merges*.txt", "*.jinja", "*processor_config.json")
        found = {p for pattern in (*patterns, "sentencepiece*.model", "spiece.model") for p in source.glob(pattern)}
        if not found:
            raise PackageError(f"{source} has no files of a tokenizer; pass the tokenizer itself")
        for path in found:
            shutil.copyfile(path, made / path.name)
