"""Builds the float model that an engine will build from config.json, and compares: before gigabytes are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qfx._build import build
from qfx._manifest import CONFIG, ModelEntry, dtype_name
from qfx._tree import Named, digest, named_tensors
from qfx.core.errors import PackageError
from qfx.export.checkpoints._format import Format
from qfx.export.checkpoints._outline import Outline

UNTIE = "tie_word_embeddings"


def build_as_written(made: Path, entry: ModelEntry, dtype: torch.dtype, found: Outline) -> nn.Module:
    """The class's own model; if it ties what is not one tensor any more, config.json is made to say so first.

    Raises:
        PackageError: it cannot be built, or still ties such tensors.
    """
    edit_config(made, {"dtype": dtype_name(dtype)})
    fresh = build(made, entry, dtype)
    if untied(fresh, found):
        edit_config(made, {UNTIE: False})
        fresh = build(made, entry, dtype)
    if names := untied(fresh, found):
        raise PackageError(
            f"{type(fresh).__name__} makes {' and '.join(names)} one tensor, here they differ; "
            "keep both in float with the recipe's ignore, or use format='qfx'"
        )
    return fresh


def edit_config(made: Path, changes: Mapping[str, Any]) -> None:
    """Sets keys of config.json, and of the text model's part in it where the key stands there."""
    path = made / CONFIG
    data = json.loads(path.read_text(encoding="utf-8"))
    inner = data.get("text_config")
    for key, value in changes.items():
        data[key] = value
        if isinstance(inner, dict) and key in inner:
            inner[key] = value
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def untied(fresh: nn.Module, found: Outline) -> list[str]:
    """Names of one tensor of the class that are several, or quantized, in the model."""
    for names in tied(fresh):
        ours = {_identity(found.tensors.get(name)) for name in names}
        if len(ours) > 1 or None in ours:
            return names
    return []


def tied(fresh: nn.Module) -> Iterator[list[str]]:
    """Groups of names of one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    yield from (names for names in groups.values() if len(names) > 1)


def _identity(named: Named | None) -> Any:
    if named is None or named.make is not None:
        return None
    t = named.tensor
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def compare(fresh: nn.Module, found: Outline, form: Format, config: Mapping[str, Any]) -> None:
    """Raises PackageError unless the class with the format's leaves has all that is written, and nothing else."""
    cls = type(fresh).__name__
    for path, layer in found.layers.items():
        module = _linear(fresh, path)
        out, columns = layer.weight.codes.shape
        if (module.out_features, module.in_features) != (out, columns):
            raise PackageError(
                f"{path} is a linear of [{out}, {columns}], {cls} builds one of "
                f"[{module.out_features}, {module.in_features}]; make model.config say what the model is"
            )
        if (layer.bias is None) != (module.bias is None):
            raise PackageError(
                f"{path} has {'no' if layer.bias is None else 'a'} bias, which {cls} builds differently: a fold added "
                "it; use format='qfx', or a recipe without shifts"
            )
        if strange := sorted(found.leaves[path] - set(form.leaves(config, path) or ())):
            raise PackageError(f"{path}: {form.name} has no place for {strange[0]}; use format='qfx'")
    for path, linear in fresh.named_modules():
        if isinstance(linear, nn.Linear) and path not in found.linears and form.leaves(config, path) is not None:
            raise PackageError(f"{path} stays in float, {form.name} would have it quantized; use format='qfx'")
    ours = {name: list(held.tensor.shape) for name, held in found.tensors.items() if held.make is None}
    theirs = {
        held.name: list(held.tensor.shape)
        for held in named_tensors(fresh)
        if held.stored and held.name.rpartition(".")[0] not in found.linears
    }
    if differ := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = differ[0]
        raise PackageError(
            f"{name} is {ours.get(name, 'missing')}, {cls} builds {theirs.get(name, 'none')}; make model.config say "
            "what the model is, or use format='qfx'"
        )
    if (taken := renamed(fresh, found.tensors)) is not None:
        raise PackageError(f"transformers stores {taken} under another name; use format='qfx'")


def _linear(fresh: nn.Module, path: str) -> nn.Linear:
    try:
        module = fresh.get_submodule(path)
    except AttributeError:
        raise PackageError(
            f"{type(fresh).__name__} builds no {path}; make model.config say what the model is"
        ) from None
    if not isinstance(module, nn.Linear):
        raise PackageError(
            f"{path} is a {type(module).__name__}; engines put quantized linears in the place of nn.Linear only; "
            "use format='qfx'"
        )
    return module


def renamed(fresh: nn.Module, names: Iterable[str]) -> str | None:
    """A name that transformers takes for that of another tensor when it loads a checkpoint of the class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # a release that renames in another way
        return None
    rules: list[Any] = get_model_conversion_mapping(fresh)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = set(names)
    for name in held:
        other = rename_source_key(name, renamings, converters)[0]
        if other != name and other in held:
            return name
    return None


def floats(fresh: nn.Module, found: Outline) -> list[str]:
    """Paths of what an engine could take for a linear, and is in float: linears, and routers of one's own class."""
    return [
        path
        for path, module in fresh.named_modules()
        if path not in found.linears
        and not isinstance(module, nn.Embedding)
        and (weight := module._parameters.get("weight")) is not None
        and (isinstance(module, nn.Linear) or weight.dim() == 2)
    ]


def changed_buffers(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Names of buffers that are not stored, and that the class makes with other values."""
    makes = {f.name: f.tensor for f in named_tensors(fresh) if not f.stored}
    return [
        f.name
        for f in named_tensors(model)
        if not f.stored and f.name in makes and digest(f.tensor) != digest(makes[f.name])
    ]
