"""The safetensors files of a Hugging Face folder, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qfx._manifest import one_line
from qfx.core.errors import PackageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored:
    """Names and tensors of a folder; a context that closes its files.

    Attributes:
        names: of every tensor, with the file that holds it.

    Args:
        folder: with model.safetensors, or shards and their index.

    Raises:
        PackageError: there are none, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        for file in self._listed():
            held = self._open(file).keys()
            self.names |= dict.fromkeys(held, file)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor:
        """A tensor; it may be a view of the file's own memory."""
        file = self.names[name]
        try:
            tensor: Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise PackageError(f"{file} cannot be read ({one_line(e)}); copy the folder again") from None
        return tensor

    def under(self, path: str, leaves: Sequence[str]) -> dict[str, Tensor]:
        """Those of the leaves that a module has."""
        return {leaf: self.get(f"{path}.{leaf}") for leaf in leaves if f"{path}.{leaf}" in self.names}

    def in_order(self, modules: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Modules and their leaves in the order of the files that hold them, so that a file is read once."""

        def first(item: tuple[str, tuple[str, ...]]) -> str:
            path, leaves = item
            return min((self.names[n] for leaf in leaves if (n := f"{path}.{leaf}") in self.names), default="")

        yield from sorted(modules.items(), key=first)

    def _listed(self) -> list[str]:
        if (self._folder / INDEX).is_file():
            try:
                files = sorted(
                    set(json.loads((self._folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise PackageError(f"{INDEX} is no index ({one_line(e)}); copy the folder again") from None
            for file in files:
                if len(PurePosixPath(file).parts) != 1 or "\\" in file or file == "..":
                    raise PackageError(f"{INDEX} names the file {file!r}, which is not in the folder; do not trust it")
            return files
        if (self._folder / SINGLE).is_file():
            return [SINGLE]
        raise PackageError(f"there is no {SINGLE} and no {INDEX}; copy the folder again, or convert the weights")

    def _open(self, file: str) -> Any:
        try:
            self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        except (SafetensorError, OSError) as e:
            raise PackageError(f"{file} cannot be read ({one_line(e)}); copy the folder again") from None
        return self._files[file]
