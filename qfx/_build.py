"""The float model into which a saved one is put: an instance of its class, without the weights."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._manifest import CONFIG, HubEntry, Implementation, ModelEntry, one_line
from .core.errors import PackageError

METHOD = "qfx"
"""The quant_method of config.json in a folder of ours, by which transformers finds `qfx.hub`."""

_BUILDING = threading.Lock()


def describe_class(model: nn.Module) -> ModelEntry:
    """How to find the model's class again; the dtype to build it with is float32 until someone knows better."""
    cls = type(model)  # lowering may have put subclasses in its place, which keep module and name
    config = getattr(model, "config", None)
    if "transformers" not in sys.modules or config is None:
        return ModelEntry(module=cls.__module__, qualname=cls.__qualname__, transformers=None)
    import transformers

    known = _is_hub(transformers, cls) and _is_hub(transformers, type(config))
    hub = HubEntry(
        config=type(config).__name__,
        dtype=torch.float32,
        attn_implementation=implementation(config, "_attn_implementation"),
        experts_implementation=implementation(config, "_experts_implementation"),
    )
    return ModelEntry(module=cls.__module__, qualname=cls.__qualname__, transformers=hub if known else None)


def _is_hub(transformers: Any, cls: type) -> bool:
    found = getattr(transformers, cls.__name__, None)
    return isinstance(found, type) and issubclass(cls, found) and cls.__module__ == found.__module__


def implementation(config: Any, attribute: str) -> Implementation:
    """What a config and its sub-configs say of themselves; `to_json_file` leaves it out."""
    said: dict[str, str | None] = {"": getattr(config, attribute, None)}
    for key in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, key, None)) is not None:
            nested = implementation(inner, attribute) or {}
            said |= {f"{key}.{path}" if path else key: value for path, value in nested.items()}
    return said if any(said.values()) else None


def set_implementation(config: Any, attribute: str, said: Implementation) -> None:
    """Gives a config what `implementation` read off another."""
    for path, value in (said or {}).items():  # outer configs come first: setting one sets those inside
        inner = config
        for key in path.split(".") if path else ():
            inner = getattr(inner, key, None)
        if inner is not None:
            setattr(inner, attribute, value)


def build(folder: Path, entry: ModelEntry, dtype: torch.dtype, attn_implementation: str | None = None) -> nn.Module:
    """A model of `transformers` from config.json: parameters on the meta device, buffers with their values.

    Args:
        folder: where config.json is.
        entry: the class.
        dtype: torch's default dtype meanwhile; some classes compute buffers in it.
        attn_implementation: instead of the one that the model had.
    """
    import transformers

    hub = entry.transformers
    assert hub is not None
    cls: Any = _class_of(entry.qualname, transformers.PreTrainedModel)
    with failures(entry):
        config = read_config(folder, entry)
        attention: Implementation = {"": attn_implementation} if attn_implementation else hub.attn_implementation
        set_implementation(config, "_attn_implementation", attention)
        set_implementation(config, "_experts_implementation", hub.experts_implementation)
        with building(dtype):
            model: nn.Module = cls(config)
    return model


def read_config(folder: Path, entry: ModelEntry) -> Any:
    """What config.json says, as the model's own config had it: without the mark of `mark_config`."""
    import transformers

    hub = entry.transformers
    assert hub is not None
    found: Any = _class_of(hub.config, transformers.PreTrainedConfig)
    config = found.from_json_file(str(folder / CONFIG))
    if is_marked(vars(config)):
        del config.quantization_config
    return config


def mark_config(folder: Path, weights: str) -> None:
    """Lets config.json say that the folder is ours; transformers then asks `qfx.hub` to load it.

    Args:
        folder: where config.json is.
        weights: the first file of tensors.
    """
    path = folder / CONFIG
    mark = {"quant_method": METHOD, "weights": weights}
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": mark}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_marked(config: Any) -> bool:
    """Whether the contents of a config.json have the mark of `mark_config`."""
    mark = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(mark, dict) and mark.get("quant_method") == METHOD


def has_mark(folder: Path) -> bool:
    """Whether config.json can be read and has the mark."""
    try:
        return is_marked(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def _class_of(name: str, base: type) -> type:
    import transformers

    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise PackageError(
            f"transformers {transformers.__version__} has no class {name}; install the one that qfx.json names, "
            "or pass model="
        )
    return found


@contextlib.contextmanager
def failures(entry: ModelEntry) -> Iterator[None]:
    """Whatever a model's own code raises while it is built is a PackageError."""
    try:
        yield
    except PackageError:
        raise
    except Exception as e:
        raise PackageError(
            f"{entry.qualname} cannot be built from {CONFIG}: {type(e).__name__}: {one_line(e)}; use the versions that "
            "qfx.json names, or attn_implementation='sdpa' if that is what is missing"
        ) from e


@contextlib.contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """A model that is built here has its parameters on the meta device, and its buffers computed in a dtype."""
    with torch.random.fork_rng(devices=[]), _default_dtype(dtype), _parameters_on_meta():
        yield


def blank_copy(model: nn.Module, entry: ModelEntry) -> nn.Module:
    """A copy of the user's instance with its parameters on the meta device; PackageError if it is another class."""
    cls = type(model)
    other = cls.__qualname__ != entry.qualname
    # a script's own class has another module name where it is imported
    other |= cls.__module__ != entry.module and "__main__" not in (cls.__module__, entry.module)
    if other:
        got, want = f"{cls.__module__}.{cls.__qualname__}", f"{entry.module}.{entry.qualname}"
        raise PackageError(f"the saved model is a {want}, not a {got}; pass model={entry.qualname}(...)")
    blank = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    try:
        return copy.deepcopy(model, dict(blank))
    except Exception as e:
        raise PackageError(
            f"the {entry.qualname} given cannot be copied ({one_line(e)}); keep what does not copy out of it"
        ) from e


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers lose their values at once; buffers keep theirs.

    So no memory is filled with weights that are thrown away, and what a class computes for itself (rotary frequencies,
    masks) is there, also in plain attributes, without knowing any class.
    """
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    with _BUILDING:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
