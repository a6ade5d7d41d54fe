"""What `qfx inspect` prints of a folder for another runtime: one that qfx wrote, or another tool."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from ._folder import EXPORTED, check_files, exported_files
from ._manifest import CONFIG, REPORT, FileEntry, one_line
from .core.errors import PackageError
from .core.report import Report
from .report import add_row, human_size, new_table, render

_SHOWN = 12
"""Names of a kind that are printed without `verbose`."""


def inspect_exported(folder: Path, verbose: bool) -> Group:
    """Report and contents of what `qfx.export.onnx` or `qfx.save(format=...)` wrote; no weight is read.

    Raises:
        PackageError: a file is missing, or has another size than it was written with.
    """
    files = exported_files(folder)
    check_files(folder, files, verify=False)
    data = _json(folder / EXPORTED)
    parts: list[Any] = []
    if (folder / REPORT).is_file():
        parts += [render(Report.from_json((folder / REPORT).read_text(encoding="utf-8")), verbose), Text()]
    onnx = data.get("kind") == "onnx"
    table = new_table(f"{'ONNX' if onnx else data.get('format', 'export')} in {folder}", "what", "is")
    for key, value in data.items():
        if key not in ("files", "kind", "format", "model") and value not in (None, "", [], {}):
            add_row(table, key.replace("_", " "), _said(value, verbose))
    return Group(*parts, table, Text(), files_table(files))


def inspect_foreign(folder: Path, verbose: bool) -> Group:
    """The settings of another tool's folder, and its tensors by dtype; their values are not read.

    Raises:
        PackageError: config.json or a file of tensors cannot be read.
    """
    config = _json(folder / CONFIG)
    settings = dict(config["quantization_config"])
    table = new_table(f"{settings.get('quant_method', 'quantized')} in {folder}", "what", "is")
    add_row(table, "class", ", ".join(config.get("architectures") or ["not named"]))
    for key, value in settings.items():
        if value is not None and (said := _said(value, verbose)):
            add_row(table, key, said)
    return Group(table, Text(), *_tensors(folder, verbose))


def _said(value: Any, verbose: bool) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_said(v, verbose)}" for k, v in value.items() if v not in (None, "", [], {}))
    if isinstance(value, list):
        shown = value if verbose else value[:_SHOWN]
        more = f" and {len(value) - len(shown)} more" if len(shown) < len(value) else ""
        return ", ".join(_said(v, verbose) for v in shown) + more
    return str(value)


def files_table(files: Mapping[str, FileEntry]) -> Table:
    """Size and hash of each file."""
    table = new_table("Files", "file", ">size", "sha256")
    for name, entry in files.items():
        add_row(table, name, human_size(entry.size), f"{entry.sha256[:16]}…")
    return table


def _tensors(folder: Path, verbose: bool) -> list[Any]:
    """How many tensors of each dtype there are, and how large they are; with `verbose`, each of them."""
    count: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    each = new_table("Tensors", "tensor", "dtype", "shape", "file")
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, "pt") as stored:
                for name in sorted(stored.keys()):
                    part = stored.get_slice(name)
                    dtype, shape = part.get_dtype(), part.get_shape()
                    count[dtype] += 1
                    elements[dtype] += math.prod(shape)
                    add_row(each, name, dtype, " × ".join(map(str, shape)) or "scalar", path.name)
        except Exception as e:  # safetensors has an error class of its own
            raise PackageError(f"{path.name} cannot be read ({one_line(e)}); copy or save the folder again") from None
    table = new_table("Files", "file", ">size")
    for path in files:
        add_row(table, path.name, human_size(path.stat().st_size))
    kinds = new_table("Tensors by dtype", "dtype", ">tensors", ">elements")
    for dtype, number in count.most_common():
        add_row(kinds, dtype, str(number), f"{elements[dtype]:,}")
    return [kinds, Text(), table, *([Text(), each] if verbose else [])]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise PackageError(f"{path.name} cannot be read ({one_line(e)})") from None
    if not isinstance(data, dict):
        raise PackageError(f"{path.name} holds no settings")
    return data
