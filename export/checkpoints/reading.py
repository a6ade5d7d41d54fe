"""Reads a Hugging Face folder with quantized linears, of this qfx or of another tool, into a model with `QLinear`s."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn

from qfx._build import METHOD, build
from qfx._folder import EXPORTED, check_files, exported_files
from qfx._manifest import CONFIG, GENERATION, MANIFEST, REPORT, HubEntry, ModelEntry, one_line
from qfx._shards import put_tensor
from qfx._side_files import read_generation, read_report
from qfx._tree import named_tensors, owner_of, stored_names
from qfx.core.errors import KernelError, PackageError
from qfx.core.report import Layer, Report
from qfx.core.spec import scheme_label
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints._rehearse import tied
from qfx.export.checkpoints._stored import Stored
from qfx.export.checkpoints.formats import METHODS
from qfx.modules.linear import QLinear


class Read(NamedTuple):
    """A model that was read.

    Attributes:
        model: with its `QLinear`s, in evaluation mode.
        report: report.json, or one of what was found.
        example: shapes of inputs that it was quantized with; empty if another tool wrote the folder.
        float_names: those of the `state_dict` that its class makes.
    """

    model: nn.Module
    report: Report
    example: dict[str, list[int]]
    float_names: set[str]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a quantized model that is not in qfx's own format."""
    settings = _json(folder / CONFIG).get("quantization_config")
    own = isinstance(settings, dict) and settings.get("quant_method") == METHOD
    return bool(settings) and not own and not (folder / MANIFEST).is_file()


def read_checkpoint(
    folder: Path, device: torch.device, *, verify: bool = True, attn_implementation: str | None = None
) -> Read:
    """Builds the model that config.json names and fills it, one linear at a time.

    Args:
        folder: with config.json and safetensors files.
        device: where to put the tensors.
        verify: compare the hash of every file, if qfx wrote the folder.
        attn_implementation: instead of the one that the model had.

    Raises:
        PackageError: the settings are none that qfx computes, or tensors are missing, unknown, or of other shapes.
    """
    config = _json(folder / CONFIG)
    settings: dict[str, Any] = config["quantization_config"]
    method = settings.get("quant_method")
    if (form := METHODS.get(str(method))) is None:
        raise PackageError(f"{CONFIG} has the quant_method {method!r}; qfx reads {', '.join(METHODS)}")
    ours = _json(folder / EXPORTED)
    if ours:
        check_files(folder, exported_files(folder), verify)
    entry = _entry(folder, config, ours)
    assert entry.transformers is not None
    dtype = entry.transformers.dtype
    fresh: Any = build(folder, entry, dtype, attn_implementation)
    names = stored_names(fresh)
    with Stored(folder) as stored:
        quantized = {
            path: leaves
            for path, module in fresh.named_modules()
            if isinstance(module, nn.Linear) and (leaves := form.leaves(settings, path)) is not None
        }
        if not quantized:
            raise PackageError(f"quantization_config fits no linear of {type(fresh).__name__}; check {CONFIG}")
        floats = _floats(fresh, quantized)
        _check_names(fresh, stored, quantized, floats)
        report = _blank_report(fresh, method)
        _fill(fresh, stored, floats, device, None if ours else dtype)
        for path, leaves in stored.in_order(quantized):
            layer = form.read(settings, path, stored.under(path, leaves), dtype)
            _put(fresh, path, layer, device, report)
    fresh.to(device)
    if (folder / GENERATION).is_file():
        read_generation(fresh, folder)
    with contextlib.suppress(AttributeError):
        del fresh.config.quantization_config  # it is of the folder: what is saved from here on is not in its format
    if (folder / REPORT).is_file() and ours:
        report = read_report(folder)
    example = ours.get("example")
    return Read(fresh.eval(), report, example if isinstance(example, dict) else {}, names)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _entry(folder: Path, config: Mapping[str, Any], ours: Mapping[str, Any]) -> ModelEntry:
    import transformers

    architecture = (config.get("architectures") or [None])[0]
    if not isinstance(architecture, str):
        raise PackageError(f"{CONFIG} names no architecture; add the model's class as 'architectures'")
    try:
        known: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # whatever transformers raises
        raise PackageError(f"{CONFIG} is no config that transformers reads ({one_line(e)})") from None
    try:  # which implementations the model had, config.json does not say
        said = ModelEntry.model_validate(ours["model"]).transformers if "model" in ours else None
    except ValidationError as e:
        raise PackageError(f"{EXPORTED} is not valid ({one_line(e)}); save the model again") from None
    dtype = getattr(known, "dtype", None)
    hub = HubEntry(
        config=type(known).__name__,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        attn_implementation=said.attn_implementation if said else None,
        experts_implementation=said.experts_implementation if said else None,
    )
    return ModelEntry(module="transformers", qualname=architecture, transformers=hub)


def _floats(fresh: nn.Module, quantized: Mapping[str, Any]) -> dict[str, tuple[list[str], str, torch.Size]]:
    """What is stored as it is, by the name that comes first: all of its names, its kind, its shape."""
    others = {name: group[0] for group in tied(fresh) for name in group[1:]}
    found: dict[str, tuple[list[str], str, torch.Size]] = {}
    for held in named_tensors(fresh):
        if held.stored and held.name.rpartition(".")[0] not in quantized:
            first = others.get(held.name, held.name)
            found.setdefault(first, ([], held.kind, held.tensor.shape))[0].append(held.name)
    return found


def _check_names(fresh: nn.Module, stored: Stored, quantized: Mapping[str, tuple[str, ...]], floats: Any) -> None:
    cls = type(fresh).__name__
    known = {f"{path}.{leaf}" for path, leaves in quantized.items() for leaf in leaves}
    known |= {name for names, _, _ in floats.values() for name in names}
    patterns = getattr(fresh, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = [n for n in stored.names if n not in known and not any(re.search(p, n) for p in patterns)]
    missing = [first for first, (names, _, _) in floats.items() if not any(n in stored.names for n in names)]
    for path in quantized:
        builds, has = fresh.get_submodule(path).bias is not None, f"{path}.bias" in stored.names
        if builds != has:
            (missing if builds else unknown).append(f"{path}.bias")
    for names, what in ((missing, f"lacks tensors of {cls}"), (unknown, f"has tensors that {cls} has not")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise PackageError(f"the checkpoint {what} ({some}); it is incomplete, or of another class or layout")


def _fill(fresh: nn.Module, stored: Stored, floats: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    for names, kind, shape in floats.values():
        name = next(n for n in names if n in stored.names)
        tensor = stored.get(name)
        if tensor.shape != shape:
            cls = type(fresh).__name__
            raise PackageError(f"{name} has the shape {list(tensor.shape)}, {cls} builds {list(shape)}; check {CONFIG}")
        wanted = dtype if dtype is not None and tensor.is_floating_point() and kind == "parameter" else tensor.dtype
        put_tensor(fresh, names, tensor.to(device, wanted, copy=True), kind)


def _put(fresh: nn.Module, path: str, layer: LinearWeights, device: torch.device, report: Report) -> None:
    parent, leaf = owner_of(fresh, path)
    linear = parent.get_submodule(leaf)
    want, got = [linear.out_features, linear.in_features], list(layer.weight.codes.shape)
    if got != want:
        raise PackageError(f"{path} is a linear of {got}, {type(fresh).__name__} builds {want}; check {CONFIG}")
    try:
        module = QLinear.from_qtensor(
            layer.weight.to(device),
            layer.bias,
            layer.scheme,
            input_scale=layer.input_scale,
            input_zero=layer.input_zero,
            dtype=layer.dtype,
        )
    except KernelError as e:
        raise PackageError(f"{path}: {e}") from None
    parent._modules[leaf] = module.eval()
    bits = layer.weight.bits_per_weight
    row = Layer(
        path, scheme_label(layer.scheme), got, solver="", bits=bits, op=module.op, note="read from a checkpoint"
    )
    report.layers.append(row)
    report.linear_weights += row.weights


def _blank_report(fresh: nn.Module, method: Any) -> Report:
    report = Report(type(fresh).__name__, {}, 0)
    report.warnings.append(f"read from a checkpoint of {method}: what was done to the model is not known")
    return report
