"""Tensors in safetensors files: planned, written, checked and put into a model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._manifest import Manifest, TensorEntry, dtype_name, one_line
from ._tree import Named, owner_of
from .core.errors import PackageError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan_shards(tensors: Mapping[str, Named], max_shard_size: int | str) -> dict[str, TensorEntry]:
    """Says which file holds which tensor: files are filled in order, a tensor above the limit gets its own.

    Args:
        tensors: what is stored, by name.
        max_shard_size: bytes, or a number with a unit, "4GB".
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(max_shard_size).strip().upper())
    limit = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if limit < 1:
        raise PackageError(f"max_shard_size {max_shard_size!r} is no size; use bytes or a text such as '4GB'")
    index, filled, shard_of = 1, 0, {}
    for name, found in tensors.items():
        size = found.tensor.numel() * found.tensor.element_size()
        if filled and filled + size > limit:
            index, filled = index + 1, 0
        shard_of[name], filled = index, filled + size
    return {
        name: TensorEntry(
            kind=found.kind,  # type: ignore[arg-type]
            dtype=found.tensor.dtype,
            shape=list(found.tensor.shape),
            file=f"model-{shard_of[name]:05d}-of-{index:05d}.safetensors",
        )
        for name, found in tensors.items()
    }


def write_shards(folder: Path, tensors: Mapping[str, Named], plan: Mapping[str, TensorEntry]) -> None:
    """Writes the files, one shard's copy in memory at a time."""
    for file in dict.fromkeys(entry.file for entry in plan.values()):
        # clones: safetensors refuses views into one memory, and a slice must not take its whole storage along
        shard = {n: tensors[n].value().detach().cpu().contiguous() for n, entry in plan.items() if entry.file == file}
        storages = Counter(t.untyped_storage().data_ptr() for t in shard.values())
        for name, t in shard.items():
            storage = t.untyped_storage()
            if storage.nbytes() != t.nbytes or storages[storage.data_ptr()] > 1:
                shard[name] = t.clone()
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())  # safetensors lets only the owner read


def load_shards(model: nn.Module, folder: Path, manifest: Manifest, device: torch.device) -> None:
    """Puts every stored tensor into the model, under all of its names.

    Raises:
        PackageError: the files do not hold what the manifest says.
    """
    others = {group[0]: group[1:] for group in manifest.ties}
    for file in dict.fromkeys(entry.file for entry in manifest.tensors.values()):
        expected = {name: entry for name, entry in manifest.tensors.items() if entry.file == file}
        for name, tensor in _read(folder / file, expected):
            value = tensor.to(device, copy=True)  # what was read may still be the file's own memory
            put_tensor(model, (name, *others.get(name, ())), value, expected[name].kind)


def put_tensor(model: nn.Module, names: Sequence[str], value: Tensor, kind: str) -> None:
    """Makes a tensor the parameter or buffer of all of these names."""
    if kind == "parameter":
        value = _parameter(model, names[0], value)
    for name in names:
        module, leaf = owner_of(model, name)
        setattr(module, leaf, value)


def _read(path: Path, expected: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for names, what in ((expected.keys() - held, "lacks"), (held - expected.keys(), "has the unknown")):
                if names:
                    some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
                    raise PackageError(f"{path.name} {what} tensors {some}; copy or save the folder again")
            for name, entry in expected.items():
                tensor = file.get_tensor(name)
                got, want = (f"{dtype_name(t.dtype)} {list(t.shape)}" for t in (tensor, entry))
                if got != want:
                    raise PackageError(f"{path.name} has {name} as {got}, not {want}; copy or save the folder again")
                yield name, tensor
    except (SafetensorError, OSError) as e:
        raise PackageError(f"{path.name} cannot be read ({one_line(e)}); copy or save the folder again") from None


def _parameter(model: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    module, leaf = owner_of(model, name)
    old = module._parameters[leaf]
    wants = old is not None and old.requires_grad and value.is_floating_point()
    return nn.Parameter(value, requires_grad=wants)


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
