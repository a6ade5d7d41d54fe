"""Writes a quantized model as a Hugging Face folder in a format that other engines load.

config.json with `quantization_config`, generation_config.json, the tokenizer, `model.safetensors` or shards with their
index, report.json, and `qfx_quant.json`, which lists the other files and says what wrote them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qfx._build import describe_class
from qfx._folder import EXPORTED, describe_files, staged
from qfx._manifest import ModelEntry, TensorEntry, versions
from qfx._shards import plan_shards, write_shards
from qfx._side_files import write_configs, write_report, write_tokenizer
from qfx.core.errors import PackageError
from qfx.core.report import Report
from qfx.core.spec import scheme_label
from qfx.export.checkpoints._format import Format
from qfx.export.checkpoints._outline import Outline, model_dtype, outline
from qfx.export.checkpoints._rehearse import build_as_written, changed_buffers, compare, edit_config, floats, tied
from qfx.export.checkpoints._stored import INDEX, SINGLE


def write_checkpoint(
    model: nn.Module,
    folder: Path,
    form: Format,
    *,
    report: Report,
    example: Mapping[str, list[int]],
    tokenizer: Any = None,
    overwrite: bool = True,
    max_shard_size: int | str = "4GB",
) -> None:
    """Writes the folder; it appears whole or not at all, and one shard is in memory at a time.

    Args:
        model: a model of transformers with `QLinear`s, on any device.
        folder: where to.
        form: the format.
        report: what is written as report.json.
        example: shapes of the model's inputs by name.
        tokenizer: as `qfx.save` takes it.
        overwrite: whether a saved model there is replaced.
        max_shard_size: the largest size of a file of tensors.

    Raises:
        PackageError: the format does not hold the model, or its class would not load it again; before tensors are
            written.
    """
    entry = describe_class(model)
    if entry.transformers is None:
        raise PackageError(f"{entry.qualname} is not a class of transformers, which engines build; use format='qfx'")
    found = outline(model, form)
    with staged(folder, overwrite) as made:
        write_tokenizer(made, tokenizer)
        write_configs(made, model)
        stored = _rehearse(made, model, entry, found, form)
        plan = _plan(found, stored, max_shard_size)
        _write_index(made, plan)
        write_report(made, report)
        write_shards(made, found.tensors, plan)
        _write_exported(made, found, form, entry, example)


def _rehearse(made: Path, model: nn.Module, entry: ModelEntry, found: Outline, form: Format) -> list[str]:
    """Completes config.json and checks that the model loads again; gives the names of the tensors to store."""
    fresh = build_as_written(made, entry, model_dtype(found.linears), found)
    config = form.config(list(found.layers.values()), floats(fresh, found))
    compare(fresh, found, form, config)
    edit_config(made, {"quantization_config": config})
    if names := changed_buffers(model, fresh):
        some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        warnings.warn(
            f"save: {type(model).__name__} makes buffers with other values when it is loaded ({some}): outputs may "
            "differ a little; format='qfx' keeps them",
            stacklevel=5,
        )
    aliases = {name for group in tied(fresh) for name in group[1:]}
    return [name for name in found.tensors if name not in aliases]


def _plan(found: Outline, stored: list[str], max_shard_size: int | str) -> dict[str, TensorEntry]:
    plan = plan_shards({name: found.tensors[name] for name in stored}, max_shard_size)
    if len({entry.file for entry in plan.values()}) > 1:
        return plan
    return {name: entry.model_copy(update={"file": SINGLE}) for name, entry in plan.items()}


def _write_index(made: Path, plan: Mapping[str, TensorEntry]) -> None:
    files = {name: entry.file for name, entry in plan.items()}
    if set(files.values()) == {SINGLE}:
        return
    total = sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in plan.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_exported(
    made: Path, found: Outline, form: Format, entry: ModelEntry, example: Mapping[str, list[int]]
) -> None:
    schemes = Counter(scheme_label(layer.scheme) for layer in found.layers.values())
    data = {
        "format": form.name,
        "versions": versions(),
        "schemes": dict(schemes),
        "model": entry.model_dump(mode="json"),
        "example": {name: list(shape) for name, shape in example.items()},
        "files": {name: file.model_dump() for name, file in describe_files(made).items()},
    }
    (made / EXPORTED).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
