"""What hangs on a quantized model as `.qfx`, and how it is saved and loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn

from ._build import blank_copy, build, describe_class, has_mark, mark_config
from ._folder import describe_files, open_folder, staged
from ._manifest import FORMAT, GENERATION, Manifest, ModelEntry, one_line, versions
from ._shards import load_shards, plan_shards, write_shards
from ._side_files import read_generation, read_report, write_configs, write_report, write_tokenizer
from ._tree import describe, rebuild, restore_derived, stored_names, unlike
from .core.errors import PackageError, RecipeError
from .core.lowering import LoweringReport
from .core.report import Report
from .recipes import Recipe

FORMAT_NAME = "qfx"
"""The format of one's own, which holds everything."""


@dataclass
class Quantized:
    """What was done to a model.

    Attributes:
        report: every fold, miss, layer and step.
        recipe: what was asked for; None once loaded if it has steps that this qfx does not know (`report.recipe` names
            them).
        example: shapes of the inputs that it was captured with, by name.
        lowering: what `qfx.lower` did on this machine; it is not saved.
    """

    report: Report
    recipe: Recipe | None
    example: dict[str, list[int]]
    lowering: LoweringReport | None = None


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = FORMAT_NAME,
    tokenizer: Any = None,
    overwrite: bool = True,
    max_shard_size: int | str = "4GB",
) -> None:
    """Saves a model that `quantize` gave, as it is now, in a folder that `load` reads.

    The folder appears when it is whole; until then, and if anything fails, the target stays as it was. Buffers that
    `state_dict` leaves out are not saved: the class makes them anew.

    Args:
        model: any model with `.qfx`.
        folder: where to. What is there is replaced if `save` wrote it.
        format: "qfx" holds every model and scheme, bit for bit. "compressed-tensors", "gptq", "gptq_v2", "awq" and
            "bitsandbytes" are Hugging Face folders for other engines; what they do not hold is an error, before
            anything is written.
        tokenizer: anything with `save_pretrained`, or the path of a folder to copy the tokenizer's files from.
        overwrite: False raises if there is a saved model.
        max_shard_size: the largest size of a file of tensors, in bytes or as "4GB".

    Raises:
        PackageError: the model cannot be saved, or not there; in one line.
    """
    try:
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        info = getattr(model, "qfx", None)
        if not isinstance(info, Quantized):
            raise PackageError(f"this {type(model).__name__} has no .qfx; give the model that qfx.quantize returned")
        if format != FORMAT_NAME:
            _save_as(format, model, info, Path(folder), tokenizer, overwrite, max_shard_size)
            return
        tree = describe(model)
        tensors = tree.pop("tensors")
        manifest = Manifest(
            **tree,
            format=FORMAT,
            versions=versions(),
            model=describe_class(model),
            tensors=plan_shards(tensors, max_shard_size),
            recipe=info.report.recipe,
            example=info.example,
            files={},
        )
        with staged(Path(folder), overwrite) as made:
            write_tokenizer(made, tokenizer)
            write_configs(made, model)
            if manifest.model.transformers:
                mark_config(made, next(iter(manifest.tensors.values())).file)
                manifest = manifest.model_copy(update={"model": _rehearse(made, manifest, model)})
            write_report(made, info.report)
            write_shards(made, tensors, manifest.tensors)
            manifest.model_copy(update={"files": describe_files(made)}).write(made)
    except PackageError as e:
        raise PackageError(f"save: {folder}: {e}") from e.__cause__
    except (OSError, SafetensorError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)
        raise PackageError(f"save: {folder}: {why}; what was there is as it was") from e


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    *,
    verify: bool = True,
    attn_implementation: str | None = None,
    lower: bool = True,
) -> nn.Module:
    """Loads what `save` wrote, in any format: the same model, in evaluation mode, with `.qfx`.

    Checkpoints of other tools in those formats are read, too, if what they hold is what qfx computes.

    Args:
        folder: where from.
        model: a float instance of the model's class, with any weights, for classes that are not in transformers. It is
            not changed. Only for format "qfx".
        device: where to put the tensors.
        verify: compare the hash of every file (sizes are always compared).
        attn_implementation: instead of the one that the model had, for models of transformers.
        lower: on a CUDA device, call `qfx.lower` on it.

    Raises:
        PackageError: the folder is not whole, or the model does not fit; in one line.
    """
    path = Path(folder)
    try:
        place = find_device(device)
        fresh, info, names = (_load_foreign if is_checkpoint(path) else _load_own)(
            path, model, place, verify, attn_implementation
        )
    except PackageError as e:
        raise PackageError(f"load: {folder}: {e}") from e.__cause__
    except OSError as e:
        raise PackageError(f"load: {folder}: {one_line(e)}; check that it can be read") from e
    attach(fresh, info, names)
    fresh.eval()
    if lower and place.type == "cuda":
        from . import lowering  # it captures, which few who load need

        lowering.lower(fresh)
    return fresh


def _load_own(
    path: Path, model: nn.Module | None, place: torch.device, verify: bool, attn_implementation: str | None
) -> tuple[nn.Module, Quantized, set[str]]:
    manifest = open_folder(path, verify)
    name, hub = manifest.model.qualname, manifest.model.transformers
    if model is not None:
        fresh = blank_copy(model, manifest.model)
    elif hub is not None:
        fresh = build(path, manifest.model, hub.dtype, attn_implementation)
    else:
        raise PackageError(f"{manifest.model.module}.{name} is not a class of transformers; pass model={name}(...)")
    if attn_implementation and (model is not None or hub is None):
        raise PackageError("attn_implementation is set where the model is built; drop it, or drop model=")
    names = stored_names(fresh)
    info = fill(fresh, path, manifest, place)
    if model is None and GENERATION in manifest.files:
        read_generation(fresh, path)
    return fresh, info, names


def fill(fresh: nn.Module, path: Path, manifest: Manifest, place: torch.device) -> Quantized:
    """Makes a float model, whose parameters may be on the meta device, the saved one.

    Args:
        fresh: of the saved model's class; it is changed.
        path: the folder.
        manifest: its manifest.
        place: where to put the tensors.

    Raises:
        PackageError: the folder does not hold what the manifest says, or the model does not fit.
    """
    report = read_report(path)
    rebuild(fresh, manifest)
    load_shards(fresh, path, manifest, place)
    if differ := restore_derived(fresh, manifest):
        which = ", ".join(differ[:3]) + (" ..." if len(differ) > 3 else "")
        warnings.warn(
            f"load: {path}: buffers that {manifest.model.qualname} makes by itself differ from the saved model's "
            f"({which}); outputs may differ, check versions and settings",
            stacklevel=4,
        )
    fresh.to(place)
    return Quantized(report, _recipe(manifest.recipe), manifest.example)


def format_names() -> list[str]:
    """What `save` takes as its format."""
    from qfx.export.checkpoints.formats import FORMATS

    return [FORMAT_NAME, *FORMATS]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has a quantized model in the format of another tool."""
    from qfx.export.checkpoints.reading import is_checkpoint as found

    return found(path) and not has_mark(path)  # a folder of ours without qfx.json is damaged


def _load_foreign(
    path: Path, model: nn.Module | None, place: torch.device, verify: bool, attn_implementation: str | None
) -> tuple[nn.Module, Quantized, set[str]]:
    from qfx.export.checkpoints.reading import read_checkpoint

    if model is not None:
        raise PackageError("a checkpoint for other engines is built from its config.json; drop model=")
    found = read_checkpoint(path, place, verify=verify, attn_implementation=attn_implementation)
    return found.model, Quantized(found.report, _recipe(found.report.recipe), found.example), found.float_names


def _save_as(
    format: str, model: nn.Module, info: Quantized, folder: Path, tokenizer: Any, overwrite: bool, shard: int | str
) -> None:
    from qfx.export.checkpoints.folder import write_checkpoint
    from qfx.export.checkpoints.formats import FORMATS

    if format not in FORMATS:
        raise PackageError(f"there is no format {format!r}; use {', '.join(format_names())}")
    write_checkpoint(
        model,
        folder,
        FORMATS[format],
        report=info.report,
        example=info.example,
        tokenizer=tokenizer,
        overwrite=overwrite,
        max_shard_size=shard,
    )


def attach(model: nn.Module, info: Quantized, float_names: set[str]) -> None:
    """Hangs `.qfx` on a model; `float_names` are those of the `state_dict` that its class makes.

    If the model has other names now, transformers would save it, and load random weights for what it does not find: its
    `save_pretrained` says so instead.
    """
    model.qfx = info  # type: ignore[assignment]
    if hasattr(model, "save_pretrained") and stored_names(model) != float_names:
        model.save_pretrained = _no_save_pretrained  # type: ignore[assignment]


def _no_save_pretrained(*_: Any, **__: Any) -> NoReturn:
    raise PackageError(
        "save_pretrained: transformers would load this quantized model with random weights; use qfx.save(model, folder)"
    )


def _rehearse(made: Path, manifest: Manifest, model: nn.Module) -> ModelEntry:
    """Builds the model as `load` will, before gigabytes are written that would not; finds the dtype to build in."""
    hub = manifest.model.transformers
    assert hub is not None
    used = {t.dtype for t in manifest.tensors.values()}
    for dtype in (torch.float32, *used & {torch.float16, torch.bfloat16, torch.float64}):
        try:
            fresh = build(made, manifest.model, dtype)
            rebuild(fresh, manifest)
            if other := unlike(model, fresh):
                raise PackageError(other)
        except PackageError as e:
            why = str(e).partition(";")[0]
            raise PackageError(f"it would not load again, {why}; make model.config say what the model is") from e
        if not restore_derived(fresh, manifest):
            return manifest.model.model_copy(update={"transformers": hub.model_copy(update={"dtype": dtype})})
    return manifest.model


def find_device(device: str | int | torch.device) -> torch.device:
    """The device that is meant, with its index; PackageError if this machine has none such."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise PackageError(f"the device {str(device)!r} is not there ({one_line(e)}); choose another") from None


def _recipe(said: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.from_dict(said) if said else None
    except RecipeError:  # a step of the user's own, or of another qfx: no reason not to load the weights
        return None
