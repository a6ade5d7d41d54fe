"""A model in which every quantized linear is one opaque op that knows nothing but the linear's name.

So the weights do not travel through the export: a lowering looks the linear up by its name and writes what its target
reads, one weight at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qfx.core.errors import KernelError, PackageError
from qfx.modules.kernels import Stored
from qfx.modules.linear import QLinear
from qfx.modules.merged import Whole


@torch.library.custom_op("qfx::opaque_linear", mutates_args=())
def opaque_linear(x: Tensor, layer: str, out_features: int) -> Tensor:
    """Stands for a quantized linear in a graph that is exported: `[..., in]` to `[..., out_features]`.

    Args:
        x: the linear's input.
        layer: the linear's path in the model.
        out_features: columns of the output.

    Raises:
        KernelError: it is run; it computes nothing.
    """
    raise KernelError(f"export: {layer} stands for a linear in a graph; run the quantized model instead")


@opaque_linear.register_fake
def _(x: Tensor, layer: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class Opaque:
    """The `Part` of a `QLinear` that is exported."""

    def __init__(self, name: str, original: QLinear) -> None:
        self.name, self.original = name, original

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.qfx.opaque_linear(x, self.name, self.original.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Opaque:
        return self

    @property
    def device(self) -> torch.device:
        """Where the original's weight is."""
        return self.original.device

    def stored(self) -> Stored:
        """The original's weight, for code that reads `linear.weight`."""
        return self.original.stored()

    def load(self, stored: Stored, error_msgs: list[str]) -> None:
        """Loading into what is exported is an error of the caller."""
        error_msgs.append(f"{self.name} is being exported and takes no weight")


def quantized_linears(model: nn.Module) -> dict[str, QLinear]:
    """The quantized linears by their first names.

    Raises:
        PackageError: the model has other quantized weights, which no opaque op stands for.
    """
    for path, module in model.named_modules():
        if slots := module.__dict__.get("_slots"):
            names = ", ".join(f"{path}.{leaf}".lstrip(".") for leaf in slots)
            raise PackageError(
                f"{names}: weights that a module multiplies with in its own forward (experts, raw parameters) are not "
                "exported; keep them in float, by `ignore` or a pattern with the scheme null"
            )
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear) and not isinstance(m, Whole)}


def opaque_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype with an opaque op for each quantized linear; what it can it shares with the model.

    Args:
        model: a quantized model, lowered or not; it is not changed.
        dtype: of its float parameters and buffers.
    """
    names = {id(m): n for n, m in quantized_linears(model).items()}
    originals = dict(model.named_modules(remove_duplicate=False))
    twin = copy_in(model, dtype)
    for path, module in twin.named_modules():
        if isinstance(module, QLinear) and not isinstance(module, Whole):
            original = originals[path]
            assert isinstance(original, QLinear)
            module.take_weight()
            module._buffers.pop("bias", None)
            module.bias = None
            module.part = Opaque(names[id(original)], original)
    for _, module in list(twin.named_modules()):
        for leaf, child in list(module._modules.items()):
            if isinstance(child, Whole):
                del module._modules[leaf]
    return twin.eval()


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose float parameters and biases have a dtype; it shares memory with the model where nothing is cast.

    Buffers that a class computes for itself (those that `state_dict` leaves out) keep theirs, as they do where
    transformers loads a model in a dtype: rotary frequencies in float16 would turn far positions by a radian.
    """
    made: dict[int, Any] = {id(p): nn.Parameter(_cast(p.detach(), dtype), False) for p in model.parameters()}
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in made:
                kept = leaf in module._non_persistent_buffers_set or (isinstance(module, QLinear) and leaf != "bias")
                made[id(buffer)] = buffer.detach() if kept else _cast(buffer.detach(), dtype)
    twin = copy.deepcopy(model, made)
    for module in twin.modules():
        if isinstance(module, QLinear):
            module.dtype = dtype
    return twin.eval()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
