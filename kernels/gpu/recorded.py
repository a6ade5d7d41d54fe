"""Recording a launch plan: what a call launched, whose memory each argument is, and whether that is all of the call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qfx.kernels.gpu import launch, parts
from qfx.kernels.gpu.plan import Compute, Launch, Plan, Unplannable, Weights, versions

LARGEST = 1 << 24
"""Bytes of an output: those above take longer than the host, and checking them would take memory."""
NAMESPACE = "qfx"
"""Of the ops that are looked into; any other computes."""
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ALIGN = 256


def checked(compute: Compute, x: Tensor, y: Tensor, weights: Weights) -> Plan:
    """A plan that gives what `compute` gives.

    Args:
        compute: has computed such an input before.
        x: the input.
        y: `compute(x)`.
        weights: all other tensors that it reads.

    Raises:
        Unplannable: there is none, and why.
    """
    if y.nbytes > LARGEST:
        raise Unplannable(f"the output has {y.nbytes} bytes")
    with torch.no_grad():
        plan = record(compute, x, weights)
        other = _another(x)
        got = plan(other, weights)  # first: memory that `compute` has left holds the right codes
        want = compute(other)
        same = got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
        if not same or not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
            raise Unplannable("the launches alone do not give the output")
    return plan


def _another(x: Tensor) -> Tensor:
    """Random values in memory of x's kind, without a use of torch's own random numbers."""
    shift = (x.data_ptr() & 15) // x.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.empty(span + shift, dtype=x.dtype, device=x.device)
    memory.normal_(generator=torch.Generator(x.device).manual_seed(0))
    other = memory.as_strided(x.shape, x.stride(), shift)
    if (other.data_ptr() ^ x.data_ptr()) & 15:
        raise Unplannable("no memory is aligned as the input is")
    return other


class _Watch(TorchDispatchMode):
    """Sees every operator of a call, also within qfx's ops, and keeps what it allocates alive."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
        self.backend = torch._C.DispatchKeySet(key)
        self.paused = False
        self.allocated: list[Tensor] = []
        self.ops: set[str] = set()
        self.computes = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            self.ops.add(func._schema.name)
            with self:  # a mode does not see what an operator calls, unless it is entered again
                return func.redispatch(self.backend, *args, **kwargs)
        y = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATES and not func._schema.is_mutable:
            self.allocated.append(y)
        elif func._schema.is_mutable or not func._schema._is_view_op():
            self.computes = self.computes or func._schema.name
        return y


def record(compute: Compute, x: Tensor, weights: Weights) -> Plan:
    """The launches of `compute(x)`; arguments as for `checked`."""
    made: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    watch, thread = _Watch(x.device), threading.get_ident()

    def recorder(launcher: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread:
            launcher.launch(grid, args)
            return
        watch.paused = True  # the interpreter copies its arguments
        try:
            launcher.launch(grid, args)
        finally:
            watch.paused = False
        made.append((launcher, grid, args))

    with launch.recording(recorder), watch:
        y = compute(x)
    switches = [_switch(name) for name in watch.ops]
    if watch.computes:
        raise Unplannable(f"it computes with {watch.computes}")
    if not made:
        raise Unplannable("nothing is launched")
    return _Recorded(x, y, weights, watch.allocated).plan(made, switches)


def switched_off() -> bool:
    """Whether any of qfx's ops computes by its PyTorch body now, as in `reference_bodies`."""
    ops = torch._library.custom_ops.OPDEFS
    ours = (op for name, op in list(ops.items()) if name.startswith(f"{NAMESPACE}::"))
    return any(getattr(op, "_disabled_kernel", ()) for op in ours)


def _switch(name: str) -> set[str]:
    """The devices for which an op's kernel is turned off; torch changes the set in place."""
    found = getattr(torch._library.custom_ops.OPDEFS.get(name), "_disabled_kernel", None)
    if found is None:
        raise Unplannable(f"{name} does not tell whether its kernel is on")
    return found


class _Recorded:
    """Finds the roots of what was launched, and lays out scratch memory."""

    def __init__(self, x: Tensor, y: Tensor, weights: Weights, allocated: list[Tensor]) -> None:
        self.x, self.weights = x, list(weights.values())
        memory = {_memory(t): t for t in allocated if t.nbytes}
        if type(y) is not Tensor or _memory(y) not in memory:
            raise Unplannable("the output is not a tensor that the call has made")
        whole = memory.pop(_memory(y))
        if not y.is_contiguous() or y.nbytes != whole.nbytes or y.data_ptr() != whole.data_ptr() or not y.numel():
            raise Unplannable("the output is part of a tensor")
        self.y, self.scratch = y, memory
        self.versions: list[int | None] | None = None
        self.kept: list[Tensor] = []
        self.sizes: list[int] = []
        self.places: dict[int, tuple[int, int]] = {}

    def plan(self, made: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]], switches: list[set[str]]) -> Plan:
        """The plan; of no use any more if it raises Unplannable."""
        bases = [a.base for _, _, args in made for a in args if _is_descriptor(a)]
        apart = {_memory(b) for b in bases} & set(self.scratch)
        self.sizes = [self.scratch[at].nbytes for at in apart]  # a descriptor takes a tensor of its own
        self.places = {at: (i, 0) for i, at in enumerate(apart)}
        together = 0
        for at, t in self.scratch.items():
            if at not in apart:
                self.places[at] = len(apart), together
                together += -(-t.nbytes // _ALIGN) * _ALIGN
        self.sizes += [together] if together else []
        launches = [self._launch(*one) for one in made]
        out = tuple(self.y.shape), self.y.dtype
        return Plan(launches, out, self.sizes, self.x.device, switches, self.versions, self.kept)

    def _launch(self, launcher: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> Launch:
        bound = launcher.bind(grid, args)
        template = [*bound.front, *args, *bound.back]
        put, make = [], []
        for at, a in enumerate(args, len(bound.front)):
            if isinstance(a, Tensor):
                if (found := self._root(a)) is None:
                    if bound.pointers:
                        template[at] = a.data_ptr()
                        self.kept.append(a)
                    continue
                root, distance = found
                weight = root - 2 - len(self.sizes)
                if not bound.pointers:
                    make.append((at, _view_of(root, distance, a)))
                    template[at] = None
                elif weight >= 0:
                    template[at] = a.data_ptr()  # `Plans` sees to it that it stays
                else:
                    put.append((at, root, distance))
                    template[at] = 0
            elif _is_descriptor(a):
                if (found := self._root(a.base)) is None or found[1]:
                    raise Unplannable("a descriptor does not begin with a tensor's memory")
                make.append((at, _descriptor_of(found[0], a, bound.pointers)))
                template[at] = None
            elif a is not None and not isinstance(a, (int, float)):
                raise Unplannable(f"an argument is a {type(a).__name__}")
        return Launch(bound.run, template, tuple(put), tuple(make))

    def _root(self, t: Tensor) -> tuple[int, int] | None:
        """Root and distance; None for a tensor that is neither the call's nor the weights': kept of earlier calls."""
        if not t.nbytes:
            raise Unplannable("an argument has no elements")
        at, first = _memory(t), 2 + len(self.sizes)
        for i, w in enumerate(self.weights):
            if w is not None and _memory(w) == at and 0 <= t.data_ptr() - w.data_ptr() < w.nbytes:
                if at == _memory(self.x):
                    raise Unplannable("the input is a part of the weights")
                return first + i, t.data_ptr() - w.data_ptr()
        if at == _memory(self.x):
            return 0, t.data_ptr() - self.x.data_ptr()
        if at == _memory(self.y):
            return 1, t.data_ptr() - self.y.data_ptr()
        if at in self.scratch:
            root, start = self.places[at]
            return 2 + root, start + t.data_ptr() - t.untyped_storage().data_ptr()
        if isinstance(t, nn.Parameter):
            raise Unplannable("it reads a parameter that is not among its weights")
        if not any(_memory(pool) == at for pool in parts._pools.values()):
            # a table, or something computed of a weight: that is done anew when somebody writes to it
            if any(w is not None and w.is_inference() for w in self.weights):
                raise Unplannable("it keeps values of a weight that does not tell who writes to it")
            self.versions = versions(dict(enumerate(self.weights)))  # type: ignore[arg-type]
        return None


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _is_descriptor(a: Any) -> bool:
    return hasattr(a, "base") and hasattr(a, "block_shape")


def _view_of(root: int, distance: int, like: Tensor) -> Callable[[list[Tensor | None]], Tensor]:
    """For the interpreter: memory of a root as a tensor."""
    dtype, size, stride = like.dtype, like.shape, like.stride()

    def view(roots: list[Tensor | None]) -> Tensor:
        whole = roots[root]
        assert whole is not None
        start = whole.storage_offset() * whole.element_size() + distance
        empty = torch.empty(0, dtype=dtype, device=whole.device)
        return empty.set_(whole.untyped_storage(), start // dtype.itemsize, size, stride)  # type: ignore[arg-type]

    return view


def _descriptor_of(root: int, like: Any, pointers: bool) -> Callable[[list[Tensor | None]], Any]:
    """The same descriptor over other memory; a compiled kernel asks its base for the address only."""
    fields = {k: v for k, v in vars(like).items() if k != "base"}
    kind = type(like)
    base = None if pointers else _view_of(root, 0, like.base)

    def descriptor(roots: list[Tensor | None]) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(fields)
        made.base = roots[root] if base is None else base(roots)
        return made

    return descriptor
