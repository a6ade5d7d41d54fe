"""`QLinear`: the module that stands where a linear stood, and calls one quantized op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qfx.core.errors import KernelError
from qfx.core.qtensor import QTensor
from qfx.core.spec import Scheme, scheme_label
from qfx.kernels._cuda import TRITON
from qfx.kernels.pack import (
    apply_to_bits,
    dequantize_stored,
    empty_store,
    kernel_scale,
    layout,
    restore,
    store,
    store_scale,
)
from qfx.kernels.quantize_rows import grid_name
from qfx.modules.kernels import KERNELS, Stored, choose_op
from qfx.modules.state import BUFFERS, PREPARED, Part, load_weight, save_weight


class ReadWeight(Tensor):
    """What `weight` of a linear that quantizes its input reads as: the values, in a class of their own.

    `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` compute in one op, in evaluation, which reads the weights
    of their linears and leaves their `forward`, and so the input's rounding, out. They call the linears where a weight
    is of a class with a `__torch_function__`. Whatever is computed of it is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes as if it were a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _may_plan(x: Tensor) -> bool:
    return TRITON and x.is_cuda


class QLinear(nn.Module):
    """`x @ W.T + b` with a quantized weight, and a quantized input if the scheme says so.

    The weight is kept as buffers: `weight_codes` (below 8 bits uint8, packed along the input axis; for 8 bits int8,
    uint8 or float8), `weight_scale` float32 `[out or 1, groups]`, `weight_zero` uint8 of that shape or None, `g_idx`
    int32 `[in]` or None. If the scheme quantizes the scales, `weight_scale` holds their codes, and `weight_scale_scale`
    float32 `[blocks]` what those are multiplied with. A static input has `input_scale` (float32 scalar) and, on an
    unsigned grid, `input_zero` (int32 scalar). `bias` is a buffer, too. `.half()`, `.to(dtype)` and the like cast only
    the bias and `dtype`, never codes or scales.

    Lowering for speed may give the weight another layout, or move it into a linear that several share; the
    `state_dict` and `qtensor` stay the same.

    Attributes:
        in_features: columns of W.
        out_features: rows of W.
        scheme: how weight and input are represented.
        dtype: the dtype of `weight` and `bias`. The output has the input's dtype.
        op: the name of the op that computes the linear from the weight as it is stored.
        kernel: the name in `KERNELS` of what computes it from a layout of its own, or "".
        layout: names of the buffers that hold that layout.
        part: its share in a merged linear, or None.
        has_g_idx: whether there is a `g_idx`.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        scheme: how weight and input are represented.
        bias: whether there is a bias.
        g_idx: whether the groups of columns are not consecutive.
        dtype: as above.
        device: where the buffers are made.

    Raises:
        KernelError: no op computes the scheme.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    g_idx: Tensor | None
    weight_scale_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    kernel: str = ""
    part: Part | None = None
    layout: tuple[str, ...] = ()
    _settings: tuple[Any, ...] = ()
    _plans: Any = None
    """Of `qfx.kernels.gpu.plan`, once it was called with a CUDA tensor."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        g_idx: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.dtype, self.has_g_idx = scheme, dtype, g_idx
        self.op = choose_op(scheme, in_features, g_idx)
        stored = empty_store(scheme.weight, (out_features, in_features), g_idx, device)
        buffers = {name: stored[key] for key, name in BUFFERS.items()}
        x = scheme.input
        static, asymmetric = x is not None and not x.dynamic, x is not None and not x.symmetric
        buffers["input_scale"] = torch.ones((), dtype=torch.float32, device=device) if static else None
        buffers["input_zero"] = torch.zeros((), dtype=torch.int32, device=device) if static and asymmetric else None
        buffers["bias"] = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        for name, buffer in buffers.items():
            if buffer is None:  # no buffer: torch.export miscounts those of its root that are None
                setattr(self, name, None)
            else:
                self.register_buffer(name, buffer)
        self._bits, self._signed, self._table, self._scale_block = layout(scheme.weight)
        self._x_grid = grid_name(x.grid) if x else ""
        self._per_tensor = bool(x and x.dynamic and x.block == (-1, -1))

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        g_idx: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> QLinear:
        """A linear of zeros on any device, into which the `state_dict` of one of the same form loads."""
        return cls(in_features, out_features, scheme, bias=bias, g_idx=g_idx, dtype=dtype, device=device)

    @classmethod
    def from_qtensor(
        cls,
        qtensor: QTensor,
        bias: Tensor | None,
        scheme: Scheme,
        *,
        input_scale: Tensor | float | None = None,
        input_zero: Tensor | int | None = None,
        dtype: torch.dtype,
    ) -> QLinear:
        """A linear with this weight.

        Args:
            qtensor: the weight, `[out, in]`.
            bias: `[out]` or None.
            scheme: its `weight` is the qtensor's spec.
            input_scale: one value, if the scheme's input is static.
            input_zero: one value, if that is asymmetric as well.
            dtype: of `weight` and `bias`.

        Raises:
            KernelError: the qtensor is not of the scheme, what a static input needs is missing, or no op computes the
                scheme.
        """
        if qtensor.spec != scheme.weight:
            raise KernelError(f"lower: a weight of {qtensor.spec} for a scheme of {scheme.weight}; use its own spec")
        out, columns = qtensor.codes.shape
        g_idx = qtensor.g_idx is not None
        module = cls.empty(columns, out, scheme, bias=bias is not None, g_idx=g_idx, dtype=dtype, device="meta")
        values = {BUFFERS[key]: value for key, value in store(qtensor).items()}
        device = qtensor.codes.device
        values["bias"] = None if bias is None else bias.to(device, dtype, copy=True)
        for key, value, kind in (("input_scale", input_scale, torch.float32), ("input_zero", input_zero, torch.int32)):
            values[key] = None if value is None else torch.as_tensor(value).to(device, kind).reshape(())
        for key, value in values.items():
            expected = getattr(module, key)
            got, want = (None if t is None else tuple(t.shape) for t in (value, expected))
            if got != want:
                raise KernelError(f"lower: {key} has shape {got}; a linear of {scheme_label(scheme)} takes {want}")
            setattr(module, key, None if value is None else value.detach())
        return module

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]` of x's dtype."""
        if self.part is not None:
            return self.part(x)
        if not torch.compiler.is_compiling() and type(x) is Tensor and _may_plan(x):
            plans = self._plans
            if plans is None:
                from qfx.kernels.gpu.plan import Plans

                plans = self.__dict__["_plans"] = Plans()
            if (y := plans(self._compute, self._buffers, x)) is not None:
                return y
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        """`forward` by the ops."""
        if self.kernel:
            prepared = [self._buffers.get(name) for name in self.layout]
            inputs = self.bias, self.input_scale, self.input_zero
            return KERNELS[self.kernel].call(x, prepared, *inputs, *self._settings)
        codes, scale, bias = self.weight_codes, self.weight_scale, self.bias
        quantized = self._x_grid, self._per_tensor
        if self.op == "int8_linear":
            return torch.ops.qfx.int8_linear(x, codes, scale, bias, self.input_scale, self.input_zero, *quantized)
        if self.op == "fp8_linear":
            return torch.ops.qfx.fp8_linear(x, codes, scale, bias, self.input_scale, *quantized)
        weight = codes, scale, self.weight_zero, self.g_idx, bias
        stored = self._bits, self.in_features, self._signed
        rest = self._table, self.weight_scale_scale, self._scale_block
        if self.op == "wna16_linear":
            return torch.ops.qfx.wna16_linear(x, *weight, *stored, *rest)
        return torch.ops.qfx.wnaq_linear(x, *weight, self.input_scale, self.input_zero, *stored, *quantized, *rest)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]` in `dtype`, for code that reads `weight.dtype`; computed each time."""
        weight = self.dequantize().to(self.dtype)
        if self.scheme.input is None or type(weight) is not Tensor:  # a tensor without values, in a capture
            return weight
        return weight.as_subclass(ReadWeight)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 `[out, in]`."""
        return dequantize_stored(self.stored(), self.scheme.weight, self.in_features)

    def qtensor(self) -> QTensor:
        """The weight as it was given to `from_qtensor`."""
        return restore(self.stored(), self.scheme.weight, self.in_features)

    def stored(self) -> Stored:
        """The weight as `store` gives it, whatever the layout is in which it is kept; to be read only."""
        if self.part is not None:
            return self.part.stored()
        if self.kernel:
            prepared = {name.removeprefix(PREPARED): self._buffers.get(name) for name in self.layout}
            plain = KERNELS[self.kernel].restore(prepared, self.scheme, self.in_features, self.out_features)
            return store_scale(plain, self.scheme.weight)
        return {key: getattr(self, name) for key, name in BUFFERS.items()}

    def stored_names(self) -> dict[str, Tensor]:
        """Names, and meta tensors of the shapes and dtypes, that the weight has as it is stored."""
        empty = empty_store(self.scheme.weight, (self.out_features, self.in_features), self.has_g_idx, "meta")
        return {BUFFERS[key]: t for key, t in empty.items() if t is not None}

    @property
    def as_stored(self) -> bool:
        """Whether the weight is in this module, in the layout in which it is saved."""
        return self.part is None and not self.kernel

    def use_kernel(self, name: str) -> None:
        """Gives the weight the layout of a kernel of `KERNELS`, or with "" its stored one.

        Raises:
            KernelError: the kernel does not take it, or another linear holds the weight.
        """
        if self.part is not None:
            raise KernelError("lower: a merged linear holds this weight; choose the kernel of that one")
        stored, device = self.stored(), self.device
        if name:
            sizes = self.in_features, self.out_features
            if reason := KERNELS[name].supports(self.scheme, *sizes, self.has_g_idx):
                raise KernelError(f"lower: {reason}")
            plain = kernel_scale(stored, self.scheme.weight)
            prepared = KERNELS[name].prepare(plain, self.scheme, self.in_features)
            if (order := stored["g_idx"]) is not None:  # groups of unequal sizes would not come back
                back = KERNELS[name].restore(prepared, self.scheme, *sizes)["g_idx"]
                if back is None or not torch.equal(back, order):
                    raise KernelError(f"lower: {name} takes no groups of unequal sizes")
            self.take_weight()
            for key, tensor in prepared.items():
                if tensor is not None:
                    self.register_buffer(PREPARED + key, tensor.to(device), persistent=False)
            self.kernel, self.layout = name, tuple(PREPARED + key for key in prepared)
            self._settings = KERNELS[name].settings(self.scheme, *sizes)
        elif self.kernel:
            self.take_weight()
            self.put_weight(stored)

    def alone(self) -> QLinear:
        """The same linear with a weight of its own, as it is stored; what is not copied is shared."""
        stored, new = self.stored(), copy.copy(self)
        new.__dict__.pop("forward", None)  # who watches this one does not watch that one
        new._buffers, new._modules = dict(self._buffers), {}
        new._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        new.part = None
        new.take_weight()
        new.put_weight(stored)
        return new

    def take_weight(self) -> None:
        """Leaves the module without its weight, in whatever layout."""
        for name in (*BUFFERS.values(), *self.layout):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self.kernel, self.layout, self._settings = "", (), ()

    def put_weight(self, stored: Stored) -> None:
        """Gives a module without its weight one, as `store` gives it."""
        rest = {name: self._buffers.pop(name) for name in list(self._buffers)}
        for key, name in BUFFERS.items():
            if (value := stored[key]) is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, value)
        self._buffers.update(rest)  # behind the weight, as ever

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        if self.part is not None:
            return self.part.device
        first = self.layout[0] if self.kernel else BUFFERS["codes"]
        return self.get_buffer(first).device

    def extra_repr(self) -> str:
        """The line of `print(model)`."""
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        fast = f", kernel={self.kernel}" if self.kernel else ""
        merged = ", merged" if self.part is not None else ""
        return f"{size}, scheme={scheme_label(self.scheme)}, op={self.op}{fast}{merged}"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "training":  # plans are for what the attributes were
            self.__dict__.pop("_plans", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have memory of their own: without plans."""
        return {name: value for name, value in self.__dict__.items() if name != "_plans"}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.as_stored:
            save_weight(self, destination, prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.__dict__.pop("_plans", None)  # torch may swap tensors, and refuses those that anything refers to
        if self.as_stored:
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        own = {prefix + name for name in BUFFERS.values() if prefix + name in state_dict}
        wanted = {prefix + name for name in self.stored_names()}
        others = {k: v for k, v in state_dict.items() if k not in own & wanted}
        super()._load_from_state_dict(others, prefix, *rest)
        load_weight(self, state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        kept = {id(b) for name, b in self._buffers.items() if name != "bias"}
        # what fn does to the dtype of a float tensor, without a tensor to lose
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(lambda t: apply_to_bits(fn, t) if id(t) in kept else fn(t), recurse)
        return self
