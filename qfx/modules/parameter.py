"""Quantized parameters of modules that multiply with them inside their own forward, such as 3-D expert weights.

The parameter becomes buffers, and the module's class a subclass of the same name on which the parameter's name is a
property: it gives the dequantized weight in the parameter's own layout and dtype, computed at each access. If the
input is quantized as well, the property gives a tensor that quantizes whatever it is multiplied with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.core.errors import KernelError
from qfx.core.qtensor import QTensor, fake_quantize, scale_from_range
from qfx.core.spec import QSpec, Scheme
from qfx.kernels.pack import apply_to_bits, dequantize_stored, empty_store, restore, store
from qfx.kernels.quantize_rows import supports_input

_STORED = ("codes", "scale", "zero", "g_idx", "scale_scale")


@dataclass
class Slot:
    """What a module knows of one of its quantized parameters; `dtype` is that of the dequantized weight."""

    scheme: Scheme
    layout: tuple[int, ...]
    columns: int
    dtype: torch.dtype


def quantize_parameter(
    module: nn.Module,
    name: str,
    qtensor: QTensor,
    scheme: Scheme,
    layout: tuple[int, ...],
    *,
    input_scale: Tensor | float | None = None,
    input_zero: Tensor | int | None = None,
) -> None:
    """Replaces a parameter by its codes; `module.<name>` gives the dequantized weight from then on.

    The buffers are `<name>_codes`, `<name>_scale` and, where they exist, `<name>_zero`, `<name>_g_idx`,
    `<name>_scale_scale`, `<name>_input_scale` and `<name>_input_zero`, as in `QLinear`.

    Args:
        module: it keeps its identity, its class gets a subclass of the same name.
        name: of the parameter.
        qtensor: the weight in canonical form, `[..., out, in]`.
        scheme: its `weight` is the qtensor's spec.
        layout: the permutation that takes canonical dims to the parameter's own: (0, 2, 1) for experts `[e, in, out]`.
        input_scale: one value, if the scheme's input is static.
        input_zero: one value, if that is asymmetric as well.

    Raises:
        KernelError: module, qtensor, scheme and layout do not fit together.
    """
    shape = _canonical_shape(module, name, layout)
    if qtensor.spec != scheme.weight or tuple(qtensor.codes.shape) != shape:
        got, want = (qtensor.spec, tuple(qtensor.codes.shape)), (scheme.weight, shape)
        raise KernelError(f"lower: {name!r} got a weight of {got}; scheme, parameter and layout say {want}")
    device = qtensor.codes.device
    values = store(qtensor)
    for key, value, kind in (("input_scale", input_scale, torch.float32), ("input_zero", input_zero, torch.int32)):
        values[key] = None if value is None else torch.as_tensor(value).to(device, kind).reshape(())
    _replace(module, name, shape, values, scheme, layout)


def empty_parameter(
    module: nn.Module, name: str, scheme: Scheme, layout: tuple[int, ...], *, g_idx: bool = False
) -> None:
    """The same with codes 0 and scales 1, on the parameter's device: a saved `state_dict` loads into it."""
    shape, device = _canonical_shape(module, name, layout), module.get_parameter(name).device
    values = empty_store(scheme.weight, shape, g_idx, device)
    x = scheme.input
    if x is not None and not x.dynamic:
        values["input_scale"] = torch.ones((), dtype=torch.float32, device=device)
        if not x.symmetric:
            values["input_zero"] = torch.zeros((), dtype=torch.int32, device=device)
    _replace(module, name, shape, values, scheme, layout)


def parameter_qtensor(module: nn.Module, name: str) -> QTensor:
    """The canonical weight behind a quantized parameter."""
    slot: Slot = module.__dict__["_slots"][name]
    return restore({key: module._buffers.get(f"{name}_{key}") for key in _STORED}, slot.scheme.weight, slot.columns)


def _canonical_shape(module: nn.Module, name: str, layout: tuple[int, ...]) -> tuple[int, ...]:
    parameter = module._parameters.get(name)
    if parameter is None or sorted(layout) != list(range(parameter.dim())):
        has = "none" if parameter is None else f"one of {tuple(parameter.shape)}"
        raise KernelError(f"lower: no parameter {name!r} with layout {layout} in {type(module).__name__}; it has {has}")
    return tuple(parameter.shape[layout.index(i)] for i in range(parameter.dim()))


def _replace(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    values: dict[str, Tensor | None],
    scheme: Scheme,
    layout: tuple[int, ...],
) -> None:
    x = scheme.input
    if x is not None and (reason := supports_input(x)):
        raise KernelError(f"lower: {name!r} has {reason}")
    static = x is not None and not x.dynamic
    if static != (values.get("input_scale") is not None):
        raise KernelError(f"lower: {name!r} needs an input scale if, and only if, its input is static")
    if (static and x is not None and not x.symmetric) != (values.get("input_zero") is not None):
        raise KernelError(f"lower: {name!r} needs an input zero if, and only if, its input is static and asymmetric")
    dtype = module.get_parameter(name).dtype
    del module._parameters[name]
    for key in (*_STORED, "input_scale", "input_zero"):
        if (value := values.get(key)) is not None:
            module.register_buffer(f"{name}_{key}", value.detach())
    slots: dict[str, Slot] = module.__dict__.setdefault("_slots", {})
    slots[name] = Slot(scheme, tuple(layout), shape[-1], dtype)
    kind: Any = type(module)
    module.__class__ = _subclass(kind, name)


class _Quantized:
    """Mixin of modules with quantized parameters: casts change the dtype that they give, not what is stored."""

    _slots: dict[str, Slot]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[attr-defined]
        names = {f"{name}_{key}" for name in self._slots for key in (*_STORED, "input_scale", "input_zero")}
        kept = {id(buffer) for name, buffer in buffers.items() if name in names}
        for name, slot in self._slots.items():
            device = buffers[f"{name}_codes"].device
            slot.dtype = fn(torch.empty(0, dtype=slot.dtype, device=device)).dtype
        return super()._apply(lambda t: apply_to_bits(fn, t) if id(t) in kept else fn(t), recurse)  # type: ignore[misc]


@functools.cache  # one class for all modules of a kind: torch.compile guards on the type
def _subclass(base: Any, name: str) -> type:
    bases = (base,) if issubclass(base, _Quantized) else (_Quantized, base)
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, bases, {**body, name: property(lambda module: _read(module, name))})


def _read(module: Any, name: str) -> Tensor:
    """The dequantized weight in the parameter's layout, and with its input's spec if that is quantized."""
    slot, buffers = module._slots[name], module._buffers
    x = slot.scheme.input
    stored = {key: buffers.get(f"{name}_{key}") for key in _STORED}
    weight = dequantize_stored(stored, slot.scheme.weight, slot.columns)
    weight = weight.to(slot.dtype).permute(slot.layout).contiguous()
    if x is None:
        return weight
    return _tag(weight, (name, x, buffers.get(f"{name}_input_scale"), buffers.get(f"{name}_input_zero")))


Input = tuple[str, QSpec, Tensor | None, Tensor | None]
"""Whose input it is, its spec, and the scale and zero point if that is static."""

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
_GROUPED = (torch._grouped_mm, F.grouped_mm)
_START = {F.linear: 0, torch.addmm: 1, torch.baddbmm: 1} | dict.fromkeys((*_MATMULS, *_GROUPED), 0)
"""The products, and the position of the first of their two operands."""


class QuantizingWeight(torch.Tensor):
    """A dequantized weight whose products quantize their other operand; what moves or casts it gives another one."""

    input: Input

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products give plain tensors; any other op with a float tensor beside the weight raises KernelError."""
        args, kwargs = list(args), kwargs or {}
        flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (tuple, list)) else (a,))]
        of = next(t.input for t in flat if isinstance(t, QuantizingWeight))
        with torch._C.DisableTorchFunctionSubclass():  # what follows sees, and gives, plain tensors
            if func is torch.einsum:
                return torch.einsum(args[0], _quantize_einsum(args, of))
            if (start := _start(func)) is not None:
                args[start : start + 2] = _quantize_operand(args[start : start + 2], func, of)
                return func(*args, **kwargs)
            out = func(*args, **kwargs)
            outs = out if isinstance(out, (tuple, list)) else (out,)
            if func is Tensor.as_subclass or not any(_is_float(t) for t in outs):
                return out
            alike = all(isinstance(t, QuantizingWeight) and _alike(t.input, of) for t in flat if _is_float(t))
            _refuse_if(func is F.embedding or not alike, func, of)
            tagged = [_tag(t, of) if _is_float(t) else t for t in outs]
            return type(out)(tagged) if isinstance(out, (tuple, list)) else tagged[0]


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _alike(a: Input, b: Input) -> bool:
    return a[1] == b[1] and (a[2] is None or a[0] == b[0])


def _tag(weight: Tensor, of: Input) -> Tensor:
    if not isinstance(weight, QuantizingWeight):
        if type(weight) is Tensor or torch.compiler.is_dynamo_compiling():
            weight = weight.as_subclass(QuantizingWeight)
        else:  # the tensor of a tracer (non-strict torch.export) is of a subclass, which no view changes
            weight.__class__ = _traced(type(weight))
    weight.input = of  # type: ignore[attr-defined]
    return weight


@functools.cache
def _traced(base: type) -> type:
    return type(base.__name__, (QuantizingWeight, base), {})


def _start(func: Any) -> int | None:
    # registered when transformers is imported, which may be later than this file
    grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return 0 if grouped is not None and func in (grouped, grouped.default) else _START.get(func)


def _refuse_if(refused: bool, func: Any, of: Input) -> None:
    if refused:
        what = getattr(func, "__name__", func)
        raise KernelError(f"lower: the input of {of[0]!r} cannot be quantized in this {what}; keep that input float")


def _quantize_operand(operands: list[Tensor], func: Any, of: Input) -> list[Tensor]:
    """Quantizes the operand that is not the weight along the contracted dim."""
    ours = [isinstance(t, QuantizingWeight) for t in operands]
    _refuse_if(len(ours) != 2 or sum(ours) != 1, func, of)
    i = ours.index(False)
    x = operands[i]
    contracted = -2 if i == 1 and x.dim() > 1 and func is not F.linear else -1
    operands[i] = _quantize(x, of, (contracted,))
    return operands


def _quantize_einsum(args: list, of: Input) -> list[Tensor]:
    equation = args[0].replace(" ", "")
    operands = list(args[1]) if isinstance(args[1], (tuple, list)) else args[1:]
    subscripts = equation.split("->")[0].split(",")
    ours = [isinstance(t, QuantizingWeight) for t in operands]
    _refuse_if(len(ours) != 2 or sum(ours) != 1 or "->" not in equation or "." in equation, torch.einsum, of)
    i, output = ours.index(False), equation.split("->")[1]
    dims = tuple(k for k, c in enumerate(subscripts[i]) if c in subscripts[1 - i] and c not in output)
    _refuse_if(not dims, torch.einsum, of)
    operands[i] = _quantize(operands[i], of, dims)
    return operands


def _quantize(x: Tensor, of: Input, dims: tuple[int, ...]) -> Tensor:
    """Fake-quantizes with the static scale, or one for what `dims` hold together (for all of x if per tensor)."""
    _, spec, scale, zero = of
    if scale is None:
        if spec.block == (-1, -1):
            dims = tuple(range(x.dim()))
        scale, zero = scale_from_range(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), spec)
    return fake_quantize(x, scale, zero, spec)
