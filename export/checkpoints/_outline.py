"""What of a quantized model a checkpoint holds: its linears, and everything else under the names of the float class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qfx._tree import Named, named_tensors, tree_of
from qfx.core.errors import PackageError
from qfx.core.online import Online
from qfx.core.qtensor import QTensor
from qfx.core.shifted import Shifted
from qfx.core.spec import scheme_label
from qfx.export.checkpoints._format import Format, LinearWeights
from qfx.modules.linear import QLinear
from qfx.modules.parameter import Slot


class Outline(NamedTuple):
    """A model without its values.

    Attributes:
        linears: every quantized linear under every path at which it stands.
        layers: the same as `LinearWeights` on the meta device.
        leaves: names of the tensors that the format makes of each, below its path.
        tensors: all that is stored, by its name in the checkpoint. What the format makes is a blank on the meta device
            and computed when it is asked for; it alone has a `make`.
    """

    linears: dict[str, QLinear]
    layers: dict[str, LinearWeights]
    leaves: dict[str, set[str]]
    tensors: dict[str, Named]


def outline(model: nn.Module, form: Format) -> Outline:
    """Writes every linear once, to know names, shapes and dtypes, and keeps none.

    Raises:
        PackageError: a checkpoint of this format does not hold the model, with what to do.
    """
    _check(model)
    linears = {path: m for path, m in tree_of(model) if isinstance(m, QLinear)}
    if not linears:
        raise PackageError("the model has no quantized linears; use its own save_pretrained")
    layers, leaves, tensors, writer = {}, {}, {}, _Writer(form, linears)
    # no tensor is made while large ones come and go: small blocks between them would keep their memory from the next
    forms = {path: _forms(path, module, form) for path, module in linears.items()}
    for path, (layer, made) in forms.items():
        layers[path] = _blank_layer(path, linears[path], layer)
        leaves[path] = set(made)
        for leaf, like in made.items():
            name = f"{path}.{leaf}"
            tensors[name] = Named(name, "parameter", True, like.blank(), partial(writer.get, path, leaf))
    for found in named_tensors(model):
        if found.stored and found.name.rpartition(".")[0] not in linears:
            if found.tensor.is_meta:
                raise PackageError(f"{found.name} is on the meta device and has no values; load the weights first")
            tensors[found.name] = found
    return Outline(linears, layers, leaves, tensors)


def linear_weights(path: str, module: QLinear) -> LinearWeights:
    """A module's weights as plain tensors, whatever the layout in which it keeps them."""
    return LinearWeights(
        name=path,
        weight=module.qtensor(),
        scheme=module.scheme,
        dtype=module.dtype,
        bias=module.bias,
        input_scale=module.input_scale,
        input_zero=module.input_zero,
    )


class _Writer:
    """Makes the tensors of one linear at a time: they are asked for one after the other."""

    def __init__(self, form: Format, linears: dict[str, QLinear]) -> None:
        self._form, self._linears, self._path = form, linears, ""
        self._held: dict[str, Tensor] = {}

    def get(self, path: str, leaf: str) -> Tensor:
        if self._path != path:
            self._path, self._held = path, self._form.write(linear_weights(path, self._linears[path]))
        return self._held[leaf]


class _Like(NamedTuple):
    """The form of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def blank(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _forms(path: str, module: QLinear, form: Format) -> tuple[dict[str, _Like], dict[str, _Like]]:
    """Of the tensors of a linear, and of those that the format makes of it."""
    if module.device.type == "meta":
        raise PackageError(f"{path} is on the meta device and has no values; load the weights first")
    layer = linear_weights(path, module)
    if reason := form.refuses(layer):
        raise PackageError(f"{path} ({scheme_label(layer.scheme)}): {reason}; or format='qfx'")
    return _like(vars(layer.weight) | vars(layer)), _like(form.write(layer))


def _like(values: Mapping[str, Any]) -> dict[str, _Like]:
    return {k: _Like(v.dtype, tuple(v.shape)) for k, v in values.items() if isinstance(v, Tensor)}


def _blank_layer(path: str, module: QLinear, likes: dict[str, _Like]) -> LinearWeights:
    blank = {name: like.blank() for name, like in likes.items()}
    inner = {key: blank.pop(key, None) for key in ("codes", "scale", "zero", "g_idx")}
    weight = QTensor(**inner, spec=module.scheme.weight)  # type: ignore[arg-type]
    return LinearWeights(path, weight, module.scheme, module.dtype, **blank)


def _check(model: nn.Module) -> None:
    for path, module in tree_of(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PackageError(f"{path or 'the model'} has extra state, which is not saved; keep it in buffers")
        if isinstance(module, Online):
            raise PackageError(f"{path} maps its input first, which transformers would not; {_ADVICE} online maps")
        if isinstance(module, Shifted):
            raise PackageError(f"{path} adds a shift that its class has not; {_ADVICE} shifts of such norms")
        for name in _slots(module):
            where = f"{path}.{name}".lstrip(".")
            raise PackageError(
                f"{where} is a quantized parameter of a {type(module).__name__}, not a linear; "
                "use format='qfx', or keep it in float with the recipe's ignore"
            )


_ADVICE = "use format='qfx', or a recipe without"


def _slots(module: nn.Module) -> Iterator[str]:
    found = vars(module).get("_slots")
    yield from (k for k, v in found.items() if isinstance(v, Slot)) if isinstance(found, dict) else ()


def model_dtype(linears: dict[str, QLinear]) -> torch.dtype:
    """The dtype that most of the linears have."""
    dtypes = [module.dtype for module in linears.values()]
    return max(dict.fromkeys(dtypes), key=dtypes.count)
