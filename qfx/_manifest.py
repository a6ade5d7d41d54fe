"""`qfx.json`: what the folder of a saved model holds, as typed plain data, and how it is read with suspicion."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from . import __version__
from .core.errors import PackageError, RecipeError
from .core.spec import Scheme

FORMAT = 1
"""Counts up when an older qfx could not read the folder any more."""
MANIFEST, REPORT, CONFIG, GENERATION = "qfx.json", "report.json", "config.json", "generation_config.json"


def _scheme(value: Any) -> Scheme:
    try:
        return value if isinstance(value, Scheme) else Scheme.from_dict(value)
    except (KeyError, TypeError, AttributeError, RecipeError) as e:
        raise ValueError(f"no scheme ({e!r})") from None


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError("no dtype of torch")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` is "float32"."""
    return str(dtype).removeprefix("torch.")


SchemeField = Annotated[Scheme, PlainValidator(_scheme), PlainSerializer(Scheme.to_dict)]
DType = Annotated[torch.dtype, PlainValidator(_dtype), PlainSerializer(dtype_name)]
Implementation = dict[str, str | None] | None
"""What a Hugging Face config says of its attention or experts: by the path of the sub-config, "" for itself."""


class Entry(BaseModel):
    """A part of the manifest: an unknown key, a missing one, and a value of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class FileEntry(Entry):
    """One other file of the folder."""

    size: int
    sha256: str


class HubEntry(Entry):
    """How to build a model of `transformers` from config.json: what that file does not say."""

    config: str
    dtype: DType
    attn_implementation: Implementation
    experts_implementation: Implementation


class ModelEntry(Entry):
    """The model's class; `transformers` is None if the user must give an instance to load."""

    module: str
    qualname: str
    transformers: HubEntry | None


class LayerEntry(Entry):
    """A quantized linear, and every path at which it stands."""

    paths: list[str]
    scheme: SchemeField
    in_features: int
    out_features: int
    bias: bool
    g_idx: bool
    dtype: DType


class ParameterEntry(Entry):
    """A quantized parameter `owner.name` of the user's own module; `shape` and `layout` are the parameter's."""

    owner: str
    name: str
    scheme: SchemeField
    shape: list[int]
    layout: list[int]
    g_idx: bool
    dtype: DType


class TensorEntry(Entry):
    """A stored tensor: a parameter or a buffer that `state_dict` has, and the file that holds it."""

    kind: Literal["parameter", "buffer"]
    dtype: DType
    shape: list[int]
    file: str


class DerivedEntry(Entry):
    """A buffer that `state_dict` has not: the class makes it anew; here is what it should give."""

    dtype: DType
    sha256: str


class Manifest(Entry):
    """All of it.

    Attributes:
        format: `FORMAT`.
        versions: of the packages that wrote the folder.
        model: the class.
        layers: quantized linears.
        parameters: quantized parameters of other modules.
        shifts: paths of norms that got an additive `shift`.
        online: paths of linears that map their input first.
        tensors: what is stored, by name. A bias that the class does not make is one that a fold added.
        ties: names of one and the same tensor, the first is the stored one. What the class ties, and these do not, was
            untied.
        derived: buffers that are made anew.
        recipe: what was asked for.
        example: shapes of the inputs that the model was captured with.
        files: every other file of the folder.
    """

    format: int
    versions: dict[str, str]
    model: ModelEntry
    layers: list[LayerEntry]
    parameters: list[ParameterEntry]
    shifts: list[str]
    online: list[str]
    tensors: dict[str, TensorEntry]
    ties: list[list[str]]
    derived: dict[str, DerivedEntry]
    recipe: dict[str, Any]
    example: dict[str, list[int]]
    files: dict[str, FileEntry]

    def write(self, folder: Path) -> None:
        """Writes `qfx.json`."""
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; PackageError if there is none, or none that this qfx reads."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(f"not a qfx folder, it has no {MANIFEST}; qfx.save writes one") from None
    except (ValueError, RecursionError) as e:
        raise PackageError(f"{MANIFEST} is not JSON ({one_line(e)}); copy or save the folder again") from None
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise PackageError(f"{MANIFEST} is not a manifest of qfx, it has no format; qfx.save writes one")
    if version > FORMAT:
        raise PackageError(f"{MANIFEST} has format {version}, this qfx reads up to {FORMAT}; upgrade qfx")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise PackageError(f"{MANIFEST} is not valid: {where}: {one_line(said)}; save the model again") from None
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise PackageError(f"{MANIFEST} names the file {name!r}, which is not in the folder; do not trust it")
    needed = {REPORT, *(t.file for t in manifest.tensors.values())} | (
        {CONFIG} if manifest.model.transformers else set()
    )
    if unlisted := sorted(needed - set(manifest.files)):
        raise PackageError(f"{MANIFEST} is not valid: files: {unlisted[0]} is not listed; save the model again")
    return manifest


def versions() -> dict[str, str]:
    """Of the packages that a saved model depends on."""
    found = {"qfx": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if "transformers" in sys.modules:
        found["transformers"] = importlib.metadata.version("transformers")
    return found


def one_line(error: object) -> str:
    """What another library says, fit for a message of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
