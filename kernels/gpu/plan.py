"""Launch plans: an eager call of a quantized linear, repeated as the kernel launches that it came down to.

On its way to a kernel an eager call passes the dispatcher, wrappers for gradients, checks, and the choice of a
configuration: 100 µs of the host, for what depends on shapes only. A plan is what is left of a call: the compiled
kernels in their order, with the addresses of input, weight, output and scratch memory to be put in.

A plan is made when a kind of input comes for the second time, and used from the third on. The call is watched while it
is recorded: one that computes with anything but launches has no plan, and none is used before it has given, bit for
bit, what the call gives for another input. Whatever is in doubt has no plan, and is computed as ever.

Nothing here imports Triton before a call is recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Compute = Callable[[Tensor], Tensor]
Weights = Mapping[str, Tensor | None]
Kind = tuple[Any, ...]

KINDS = 32
"""Kinds of input that are remembered at a time."""
_SEEN, _CHOICES = "seen once", ("plan", "choices")
_remembering, _recording = threading.Lock(), threading.Lock()

# looked up once: each costs as much as its call
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _traced = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
_device, _stream = getattr(torch._C, "_cuda_getDevice", None), getattr(torch._C, "_cuda_getCurrentRawStream", None)
_grad_enabled, _empty = torch.is_grad_enabled, torch.empty_strided
_forward_ad = torch.autograd.forward_ad


class Unplannable(Exception):
    """Why a call has no plan."""


class Plans:
    """The plans of one module. They hold addresses: a copy of the module must start without them.

    Attributes:
        kinds: for each kind of input its plan, or why it has none.
    """

    def __init__(self) -> None:
        # one value, so that a thread never sees plans of other weights
        self._state: tuple[tuple[Any, ...], dict[Kind, Plan | str]] = ((), {})

    @property
    def kinds(self) -> dict[Kind, Plan | str]:
        """As above."""
        return self._state[1]

    def __call__(self, compute: Compute, weights: Weights, x: Tensor) -> Tensor | None:
        """`compute(x)` by its plan, or None where there is none: the caller computes.

        Args:
            compute: depends on x, on `weights`, and on nothing else that changes.
            weights: all tensors that it reads beside x. They may be written to or replaced between calls.
            x: of type Tensor, and no tracer's.
        """
        at = place(x)
        if at is None:
            return None
        held, kinds = self._state
        tensors = weights.values()
        if len(held) != len(tensors):
            kinds = self._forget(tensors)
        for (same, address), t in zip(held, tensors, strict=False):
            if same() is not t or (t is not None and t.data_ptr() != address):
                kinds = self._forget(tensors)
                break
        if _grad_enabled():
            for t in (x, *tensors):
                if t is not None and t.requires_grad:
                    return None
        kind = (x.shape, x.stride(), x.dtype, x.data_ptr() & 15, at)
        plan = kinds.get(kind)
        if type(plan) is Plan:
            if plan.holds(weights):
                return plan(x, weights)
            if plan.stale(weights):
                kinds.pop(kind, None)
            return None
        if type(plan) is str and plan is not _SEEN:
            return None
        return self._new(kinds, kind, compute, weights, x)

    def _forget(self, tensors: Iterable[Tensor | None]) -> dict[Kind, Plan | str]:
        """Weights were replaced: no plan holds any more. References are weak, so as to keep no memory alive."""
        held = [(_none, 0) if t is None else (weakref.ref(t), t.data_ptr()) for t in tensors]
        kinds: dict[Kind, Plan | str] = {}
        self._state = tuple(held), kinds
        return kinds

    def _new(
        self, kinds: dict[Kind, Plan | str], kind: Kind, compute: Compute, weights: Weights, x: Tensor
    ) -> Tensor | None:
        """Computes by compute, and makes a plan."""
        if kind not in kinds:  # the first call compiles, and fills what is kept of a weight
            with _remembering:
                if len(kinds) >= KINDS:
                    kinds.pop(next((k for k, v in kinds.items() if type(v) is not Plan), next(iter(kinds))))
                kinds[kind] = _SEEN
            return None
        y = compute(x)
        if not _recording.acquire(blocking=False):  # another thread records
            return y
        try:
            from qfx.kernels.gpu import launch, recorded, tune

            if launch._recorder is not None or tune._autotune or recorded.switched_off():
                return y
            try:
                kinds[kind] = recorded.checked(compute, x, y, weights)
            except Unplannable as e:
                kinds[kind] = str(e)
            except Exception as e:  # it computes, but not under a watch
                kinds[kind] = f"{type(e).__name__}: {e}"
        finally:
            _recording.release()
        return y


def _none() -> None:
    return None


def place(x: Tensor) -> tuple[int, int] | None:
    """Device and stream of a call that may have a plan; None if anybody watches, traces, transforms or captures it."""
    if _modes() or _function_modes() or _transforms() is not None or _traced() or _forward_ad._current_level >= 0:
        return None
    if x.layout is not torch.strided:
        return None
    return _on(x)


def _on(x: Tensor) -> tuple[int, int] | None:
    """Of a CUDA tensor, outside of captures; split for tests."""
    device = x.get_device()
    if _device is None or _stream is None or _capturing is None or device != _device() or _capturing():
        return None
    return device, _stream(device)


class Launch(NamedTuple):
    """One launch of a plan.

    Attributes:
        run: takes what stands in args.
        args: with gaps.
        addresses: for a gap the root, and the distance from it in bytes.
        tensors: for a gap, what makes a tensor or descriptor of all roots.
    """

    run: Callable[..., Any]
    args: list[Any]
    addresses: tuple[tuple[int, int, int], ...]
    tensors: tuple[tuple[int, Callable[[list[Tensor | None]], Any]], ...]


class Plan:
    """The launches of a call, and the memory that they write.

    Arguments name their memory by a root and a distance from it in bytes. Roots are the input, the output, the scratch
    memory, and behind these the weights in their order.
    """

    def __init__(
        self,
        launches: list[Launch],
        out: tuple[tuple[int, ...], torch.dtype],
        scratch: list[int],
        device: torch.device,
        switches: list[set[str]],
        versions: list[int | None] | None,
        kept: list[Tensor],
    ) -> None:
        from qfx.kernels.gpu import launch, tune

        shape, dtype = out
        strides = torch.empty(shape, device="meta").stride()
        self.launches, self.out, self.device = launches, (shape, strides, dtype), device
        self.scratch = [((size,), (1,)) for size in scratch]
        self.switches, self.versions, self.kept = switches, versions, kept
        self.recorders, self.choose = launch, tune
        # `tune` drops what it chose when it measures: then this is gone, and configurations may be others
        self.choices = tune._chosen.setdefault(_CHOICES, object())

    def holds(self, weights: Weights) -> bool:
        """Whether the call would launch the same now."""
        if self.recorders._recorder is not None:
            return False
        for off in self.switches:
            if off:
                return False
        if self.choose._chosen.get(_CHOICES) is not self.choices:
            return False
        return self.versions is None or self.versions == versions(weights)

    def stale(self, weights: Weights) -> bool:
        """Whether it will never do so again: configurations or what is kept of a weight may be others."""
        if self.choose._chosen.get(_CHOICES) is not self.choices:
            return True
        return self.versions is not None and self.versions != versions(weights)

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        """Launches for an input of the plan's kind."""
        device = self.device
        shape, strides, dtype = self.out
        y = _empty(shape, strides, dtype=dtype, device=device)
        roots: list[Tensor | None] = [x, y]
        addresses = [x.data_ptr(), y.data_ptr()]
        for size, one in self.scratch:
            memory = _empty(size, one, dtype=torch.uint8, device=device)
            roots.append(memory)
            addresses.append(memory.data_ptr())
        for run, template, put, make in self.launches:
            args = template.copy()
            for at, root, distance in put:
                args[at] = addresses[root] + distance
            for at, tensor in make:
                args[at] = tensor([*roots, *weights.values()])
            run(*args)
        return y


def versions(weights: Weights) -> list[int | None]:
    """Counts of the writes into each."""
    return [None if t is None else t._version for t in weights.values()]
