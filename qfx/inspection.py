"""What `qfx inspect` and `qfx recipes` print."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ._folder import EXPORTED, open_folder
from ._inspect_exported import files_table, inspect_exported, inspect_foreign
from ._manifest import CONFIG, MANIFEST, REPORT, Manifest, dtype_name
from .core.errors import PackageError
from .core.report import Report
from .core.spec import scheme_label
from .recipes import PRESETS, Recipe, settings
from .report import add_row, new_table, render


def inspect(folder: Path, verbose: bool = False) -> Group:
    """The report and the manifest of a saved model, or what an export or another tool wrote; no weights are read.

    Raises:
        PackageError: it is no folder of a quantized model, or a file is missing or has another size than it was saved
            with.
    """
    from .export.checkpoints.reading import is_checkpoint

    try:
        if not (folder / MANIFEST).is_file() and (folder / EXPORTED).is_file():
            return inspect_exported(folder, verbose)
        if (folder / CONFIG).is_file() and is_checkpoint(folder):
            return inspect_foreign(folder, verbose)
        manifest = open_folder(folder, verify=False)
        report = Report.from_json((folder / REPORT).read_text(encoding="utf-8"))
    except PackageError as e:
        raise PackageError(f"inspect: {folder}: {e}") from None
    except (OSError, ValueError) as e:
        raise PackageError(f"inspect: {folder}: {REPORT} cannot be read ({e}); save the model again") from None
    parts: list[Any] = [
        render(report, verbose),
        Text(),
        _contents(folder, manifest),
        Text(),
        files_table(manifest.files),
    ]
    if verbose:
        parts += [Text(), _tensors(manifest)]
    return Group(*parts)


def list_recipes() -> Group:
    """Every preset in a table."""
    table = new_table("Presets", "preset", "scheme", "steps", "data", "stays float")
    for name, make in PRESETS.items():
        recipe = make()
        data = "yes" if recipe.needs_data else "no"
        add_row(table, name, _schemes(recipe), _steps(recipe), data, ", ".join(recipe.ignore) or "-")
    hint = "A YAML file with the keys schemes, steps and ignore is a recipe, too."
    return Group(table, Text(), Text(hint))


def _schemes(recipe: Recipe) -> str:
    labels = {pattern: scheme_label(s) if s else "float" for pattern, s in recipe.schemes.items()}
    return labels["*"] if set(labels) == {"*"} else ", ".join(f"{p}: {label}" for p, label in labels.items())


def _steps(recipe: Recipe) -> str:
    shown = []
    for step in recipe.steps:
        given = ", ".join(f"{key}={value}" for key, value in settings(step).items())
        shown.append(f"{step.name}({given})" if given else step.name)
    return ", ".join(shown)


def _contents(folder: Path, manifest: Manifest) -> Table:
    table = new_table(f"Manifest of {folder}", "what", "is")
    home = "transformers" if manifest.model.transformers else manifest.model.module
    add_row(table, "class", f"{manifest.model.qualname} of {home}")
    labels = [scheme_label(entry.scheme) for entry in manifest.layers]
    schemes = Counter(labels + [scheme_label(entry.scheme) for entry in manifest.parameters])
    quantized = ", ".join(f"{count} × {label}" for label, count in schemes.items())
    add_row(table, "quantized", quantized or "nothing")
    dtypes = Counter(dtype_name(entry.dtype) for entry in manifest.tensors.values())
    add_row(table, "tensors", ", ".join(f"{count} × {name}" for name, count in dtypes.items()))
    if manifest.shifts:
        add_row(table, "norms with an added bias", ", ".join(manifest.shifts))
    add_row(table, "captured with", ", ".join(f"{name} {shape}" for name, shape in manifest.example.items()))
    add_row(table, "written by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    return table


def _tensors(manifest: Manifest) -> Table:
    table = new_table("Tensors", "tensor", "kind", "dtype", "shape", "file")
    for name, entry in manifest.tensors.items():
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        add_row(table, name, entry.kind, dtype_name(entry.dtype), shape, entry.file)
    return table
