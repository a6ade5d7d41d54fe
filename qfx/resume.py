"""Solved layers on disk, so that a long run that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .core.errors import PackageError
from .core.qtensor import QTensor
from .core.spec import QSpec

RUN = "run.json"


class Store:
    """A folder with one file for each solved layer, of one run: same model, recipe, and calibration set.

    Args:
        folder: made if it does not exist.
        run: the fingerprint of the run (see `fingerprint`).

    Raises:
        PackageError: the folder belongs to another run, or is no such folder.
    """

    def __init__(self, folder: str | Path, run: str) -> None:
        self.folder = Path(folder)
        known = self.folder / RUN
        if known.exists():
            if json.loads(known.read_text()).get("run") != run:
                raise PackageError(
                    f"resume: {self.folder} belongs to a run with another model, recipe, or calibration set; "
                    "use another folder, or remove it"
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise PackageError(f"resume: {self.folder} holds other files; use a new folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(known, json.dumps({"run": run}).encode())
        except OSError as e:
            raise PackageError(f"resume: cannot write {self.folder}: {e.strerror}") from None

    def get(self, weight: str) -> tuple[QTensor, dict[str, Any]] | None:
        """A solved layer and what was noted of it, or None; a file that is cut short counts as none."""
        path = self._path(weight)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            note = json.loads(bytes(tensors.pop("note").tolist()))
        except (SafetensorError, KeyError, ValueError, OSError):
            return None
        spec = QSpec.from_dict(note.pop("spec"))
        qtensor = QTensor(tensors["codes"], tensors["scale"], tensors.get("zero"), spec, tensors.get("g_idx"))
        return qtensor, note

    def put(self, weight: str, qtensor: QTensor, note: Mapping[str, Any]) -> None:
        """Keeps a solved layer; the file appears whole or not at all."""
        text = json.dumps({**note, "spec": qtensor.spec.to_dict()}).encode()
        tensors = {"codes": qtensor.codes, "scale": qtensor.scale, "zero": qtensor.zero, "g_idx": qtensor.g_idx}
        kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items() if v is not None}
        kept["note"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        path = self._path(weight)
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        try:
            save_file(kept, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as e:
            temporary.unlink(missing_ok=True)
            raise PackageError(f"resume: cannot write {path}: {e}") from None

    def _path(self, weight: str) -> Path:
        return self.folder / f"{hashlib.sha256(weight.encode()).hexdigest()[:24]}.safetensors"


def fingerprint(model: nn.Module, recipe: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]]) -> str:
    """A hash of all weights, the recipe, and the calibration set."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        digest.update(_raw(p))
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(_raw(value))
    return digest.hexdigest()


def _raw(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
