"""The `state_dict` of a linear whose weight is kept in another layout, or by another module: as if it were not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels.pack import kernel_scale
from qfx.modules import kernels
from qfx.modules.kernels import Stored

if TYPE_CHECKING:
    from qfx.modules.linear import QLinear

BUFFERS = {
    "codes": "weight_codes",
    "scale": "weight_scale",
    "zero": "weight_zero",
    "g_idx": "g_idx",
    "scale_scale": "weight_scale_scale",
}
"""Of what `store` gives."""
PREPARED = "kernel_"
"""In front of the names of the tensors of a kernel's layout."""


class Part(Protocol):
    """The share that a linear has in a merged one, which holds its weight and computes its output."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        ...

    def stored(self) -> Stored:
        """The linear's own weight, as `store` gives it."""
        ...

    def load(self, stored: Stored, error_msgs: list[str]) -> None:
        """Takes over the weight, and the linear's bias and input scale, which have just been loaded."""
        ...


def save_weight(module: QLinear, destination: dict[str, Tensor], prefix: str) -> None:
    """Writes the weight of a linear that keeps it in another layout into a state dict, as it is stored."""
    stored = module.stored()
    destination.update({prefix + name: t for key, name in BUFFERS.items() if (t := stored[key]) is not None})


def load_weight(
    module: QLinear,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Takes a stored weight from a state dict, in place; the arguments are those of `_load_from_state_dict`."""
    stored = dict(module.stored())
    keys = {name: key for key, name in BUFFERS.items()}
    for name, want in module.stored_names().items():
        value = state_dict.get(prefix + name)
        if value is None:
            missing_keys += [prefix + name] if strict else []
        elif value.shape != want.shape:
            has, need = tuple(value.shape), tuple(want.shape)
            error_msgs.append(f"size mismatch for {prefix}{name}: {has} in the state dict, {need} here")
        else:
            stored[keys[name]] = value.to(module.device, want.dtype)
    try:
        plain = kernel_scale(stored, module.scheme.weight)
    except KernelError as e:
        error_msgs.append(f"{prefix}{BUFFERS['scale']}: {e}")
        return None
    if module.part is not None:
        return module.part.load(stored, error_msgs)
    prepared = kernels.KERNELS[module.kernel].prepare(plain, module.scheme, module.in_features)
    for key, tensor in prepared.items():  # in place: a captured CUDA graph reads the same memory
        if tensor is not None:
            module.get_buffer(PREPARED + key).copy_(tensor)
