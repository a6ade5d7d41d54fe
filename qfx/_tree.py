"""What distinguishes a quantized module tree from the one its class builds: read off, and put into a fresh one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qfx.modules.linear import QLinear
from qfx.modules.merged import Whole
from qfx.modules.parameter import Slot, empty_parameter
from qfx.modules.state import BUFFERS

from ._manifest import DerivedEntry, LayerEntry, Manifest, ParameterEntry, TensorEntry
from .core.errors import KernelError, PackageError
from .core.online import GAIN, OFFSET, Online, make_online
from .core.shifted import NAME, Shifted, make_shifted


class Named(NamedTuple):
    """A tensor under one of its names.

    Attributes:
        name: as in a `state_dict`.
        kind: "parameter" or "buffer".
        stored: whether `state_dict` has it.
        tensor: it; of a weight in another layout than the stored one, a blank of its shape that has no memory.
        make: computes it anew in that case.
    """

    name: str
    kind: str
    stored: bool
    tensor: Tensor
    make: Callable[[], Tensor] | None = None

    def value(self) -> Tensor:
        """The tensor with its values."""
        return self.tensor if self.make is None else self.make()


def tree_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names, but those that lowering has added."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Whole):
            yield path, module


def named_tensors(model: nn.Module) -> Iterator[Named]:
    """All parameters and buffers, each under all of its names; those of a lowered linear as they are stored."""
    blanks: dict[nn.Module, dict[str, Tensor]] = {}
    for path, module in tree_of(model):
        if isinstance(module, QLinear) and not module.as_stored:
            for leaf, blank in blanks.setdefault(module, _blanks(module)).items():
                make = functools.partial(_stored_weight, module, leaf)
                yield Named(f"{path}.{leaf}".lstrip("."), "buffer", True, blank, make)
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            for leaf, tensor in table.items():
                if tensor is not None and not (isinstance(module, QLinear) and leaf in module.layout):
                    stored = kind == "parameter" or leaf not in module._non_persistent_buffers_set
                    yield Named(f"{path}.{leaf}".lstrip("."), kind, stored, tensor)


def _blanks(module: QLinear) -> dict[str, Tensor]:
    """Tensors like those of the stored weight, of which each has its own address and no two elements."""
    like = module.stored_names().items()
    return {leaf: torch.empty(1, dtype=t.dtype, device=module.device).expand(t.shape) for leaf, t in like}


def _stored_weight(module: QLinear, leaf: str) -> Tensor:
    value = module.stored()[next(key for key, name in BUFFERS.items() if name == leaf)]
    assert value is not None
    return value


def stored_names(model: nn.Module) -> set[str]:
    """The names of the model's `state_dict`."""
    return {found.name for found in named_tensors(model) if found.stored}


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor or a module, and the last part of its name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def describe(model: nn.Module) -> dict[str, Any]:
    """The manifest's `layers`, `parameters`, `shifts`, `online`, `ties`, `derived`, and what is stored as `tensors`."""
    layers: dict[QLinear, list[str]] = {}
    for path, module in tree_of(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PackageError(f"{path or 'the model'} has extra state, which is not saved; keep it in buffers")
        if isinstance(module, QLinear):
            layers.setdefault(module, []).append(path)
    groups: dict[Any, list[Named]] = {}
    derived = {}
    for found in named_tensors(model):
        if found.tensor.is_meta:
            raise PackageError(f"{found.name} is on the meta device and has no values; load the weights first")
        if found.stored:
            groups.setdefault(_identity(found), []).append(found)
        else:
            derived[found.name] = DerivedEntry(dtype=found.tensor.dtype, sha256=digest(found.tensor))
    return {
        "layers": [_layer(module, paths) for module, paths in layers.items()],
        "parameters": [
            _parameter(path, module, name, slot)
            for path, module in model.named_modules()
            for name, slot in slots_of(module).items()
        ],
        "shifts": [path for path, module in model.named_modules() if isinstance(module, Shifted)],
        "online": [path for path, module in model.named_modules() if isinstance(module, Online)],
        "tensors": {group[0].name: group[0] for group in groups.values()},
        "ties": [[found.name for found in group] for group in groups.values() if len(group) > 1],
        "derived": derived,
    }


def _identity(found: Named) -> Any:
    """Equal for two names of one tensor, also where two objects view the same memory in the same way."""
    t = found.tensor
    return (found.kind, t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else id(t)


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The quantized parameters of a module that is no linear, by name."""
    found = vars(module).get("_slots")
    return {k: v for k, v in found.items() if isinstance(v, Slot)} if isinstance(found, dict) else {}


def _layer(module: QLinear, paths: list[str]) -> LayerEntry:
    return LayerEntry(
        paths=paths,
        scheme=module.scheme,
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.bias is not None,
        g_idx=module.has_g_idx,
        dtype=module.dtype,
    )


def _parameter(path: str, module: nn.Module, name: str, slot: Slot) -> ParameterEntry:
    canonical = [*module.get_buffer(f"{name}_codes").shape[:-1], slot.columns]
    return ParameterEntry(
        owner=path,
        name=name,
        scheme=slot.scheme,
        shape=[canonical[i] for i in slot.layout],
        layout=list(slot.layout),
        g_idx=f"{name}_g_idx" in module._buffers,
        dtype=slot.dtype,
    )


def rebuild(model: nn.Module, manifest: Manifest) -> None:
    """Gives a fresh float model the saved one's tree; what is stored is on the meta device then.

    Raises:
        PackageError: the model is not of the form that the saved one had before it was quantized.
    """
    if any(isinstance(m, QLinear | Shifted | Online) or slots_of(m) for m in model.modules()):
        raise PackageError("the model given is quantized already; pass a fresh float one")
    wanted = {
        n: t for group in manifest.ties for n in group if (t := manifest.tensors.get(group[0]))
    } | manifest.tensors
    try:  # in the order in which they came about: each may put a class of its own over that of the module
        for layer in manifest.layers:
            _put_layer(model, layer)
        for path in manifest.shifts:
            make_shifted(_module(model, path), _blank(f"{path}.{NAME}", wanted))
        for path in manifest.online:
            make_online(_module(model, path), *(_blank(f"{path}.{leaf}", wanted) for leaf in (GAIN, OFFSET)))
        for parameter in manifest.parameters:
            _put_parameter(model, parameter)
    except KernelError as e:
        raise PackageError(f"{e}; use the qfx that wrote the folder") from None
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        module = _module(model, path)
        if leaf == "bias" and isinstance(module, nn.Linear) and module.bias is None:  # a fold added it
            module.bias = _blank(name, wanted)
    has = {f.name: (f.kind, list(f.tensor.shape)) for f in named_tensors(model) if f.stored}
    cls = type(model).__qualname__
    for names, what in (
        (wanted.keys() - has.keys(), f"this {cls} lacks tensors of the saved model"),
        (has.keys() - wanted.keys(), f"the saved model lacks tensors of this {cls}"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise PackageError(f"{what} ({some}); {_ADVICE}")
    for name, entry in wanted.items():
        if has[name] != (entry.kind, entry.shape):
            kind, shape = has[name]
            raise PackageError(
                f"{name} was saved as a {entry.kind} of shape {entry.shape}, here it is a {kind} of {shape}; {_ADVICE}"
            )


_ADVICE = "build the model with the settings that it was saved with"


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PackageError(f"this {type(model).__qualname__} has no module {path}; {_ADVICE}") from None


def _blank(name: str, wanted: dict[str, TensorEntry]) -> nn.Parameter:
    if name not in wanted:
        raise PackageError(f"qfx.json is not valid: it has no tensor {name}; save the model again")
    return nn.Parameter(torch.empty(wanted[name].shape, device="meta"), requires_grad=False)


def _put_layer(model: nn.Module, layer: LayerEntry) -> None:
    sizes = layer.out_features, layer.in_features
    form = {"bias": layer.bias, "g_idx": layer.g_idx, "dtype": layer.dtype}
    module = QLinear.empty(layer.in_features, layer.out_features, layer.scheme, **form, device="meta")  # type: ignore[arg-type]
    for path in layer.paths:
        weight = _module(model, path)._parameters.get("weight")
        shape = None if weight is None else tuple(weight.shape)
        if shape not in (sizes, sizes[::-1]):  # some keep [in, out]
            raise PackageError(
                f"{path} was a linear of [out, in] = {list(sizes)}, here its weight is {shape}; {_ADVICE}"
            )
    for path in layer.paths:
        parent, leaf = owner_of(model, path)
        parent._modules[leaf] = module


def _put_parameter(model: nn.Module, entry: ParameterEntry) -> None:
    module = _module(model, entry.owner)
    old = module._parameters.get(entry.name)
    if old is None or list(old.shape) != entry.shape:
        where, shape = f"{entry.owner}.{entry.name}".lstrip("."), None if old is None else list(old.shape)
        raise PackageError(f"{where} was a parameter of shape {entry.shape}, here it is {shape}; {_ADVICE}")
    empty_parameter(module, entry.name, entry.scheme, tuple(entry.layout), g_idx=entry.g_idx)
    slots_of(module)[entry.name].dtype = entry.dtype


def unlike(model: nn.Module, fresh: nn.Module) -> str | None:
    """Says which module of a rebuilt model is of another class than the saved one's; both have the same tensors."""
    for (path, a), (_, b) in zip(tree_of(model), tree_of(fresh), strict=True):
        was, now = ([f"{c.__module__}.{c.__qualname__}" for c in type(m).__mro__] for m in (a, b))
        if was != now:
            return f"{path} is a {was[0]}, not a {now[0]}" if was[0] != now[0] else f"{path} has a class of {was}"
    return None


def restore_derived(model: nn.Module, manifest: Manifest) -> list[str]:
    """Casts the buffers that the class made to the dtypes they had; returns the names of those with other values."""
    differ = []
    for name, entry in manifest.derived.items():
        try:
            module, leaf = owner_of(model, name)
            buffer = module.get_buffer(leaf)
        except AttributeError:  # made at the first forward
            continue
        if buffer.is_meta:
            raise PackageError(f"the buffer {name} of the model given is on the meta device; build it on the CPU")
        if buffer.dtype != entry.dtype:
            buffer = buffer.to(entry.dtype)
            setattr(module, leaf, buffer)
        if digest(buffer) != entry.sha256:
            differ.append(name)
    return differ


def digest(tensor: Tensor) -> str:
    """A hash of values, dtype and shape."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {list(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
