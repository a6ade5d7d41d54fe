"""Launching a Triton kernel with little Python in between, interpreting it, or only compiling it.

Triton's own `kernel[grid](...)` binds and specializes every argument on each call, 20 µs and more. A `Launcher` binds
once for each combination of argument kinds and then calls the compiled kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` when Triton is imported)."""

Recorder = Callable[["Launcher", tuple[int, ...], tuple[Any, ...]], None]
_recorder: Recorder | None = None


class Launcher:
    """A kernel with its compile-time arguments.

    The kernel's `tl.constexpr` parameters must come last, and `meta` gives all of them, beside `num_warps`,
    `num_stages` and whatever else Triton takes.

    Attributes:
        kernel: the function under `@triton.jit`.
        meta: compile-time arguments and options by name.
    """

    def __init__(self, kernel: Any, **meta: Any) -> None:
        self.kernel, self.meta = kernel, {"enable_fp_fusion": True, **meta}
        settle(kernel)
        names = kernel.arg_names
        self._constants = tuple(meta[n] for n in names if n in meta)
        first = len(names) - len(self._constants)
        if any(n in meta for n in names[:first]):
            raise TypeError(f"{kernel.__name__}: compile-time parameters come last")
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on the current stream of the current device; `grid` has three numbers, none of them 0."""
        if _recorder is not None:
            _recorder(self, grid, args)
            return
        self.launch(grid, args)

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """The same, whoever is `recording`."""
        if INTERPRET:
            self.kernel[grid](*args, **self._interpreted)
            return
        device = torch.cuda.current_device()
        key = (device, *[_kind(a) for a in args])
        compiled = self._compiled.get(key)
        if compiled is None:
            # compiles, and launches
            self._compiled[key] = self.kernel[grid](*args, **self.meta)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        handle, packed = compiled.function, compiled.packed_metadata
        compiled.run(*grid, stream, handle, packed, None, None, None, *args, *self._constants)

    def bind(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Bound:
        """The kernel for arguments of these kinds, on the current stream; it has been launched with such before."""
        if INTERPRET:
            return Bound(functools.partial(self.kernel[grid], **self._interpreted), (), (), False)
        device = torch.cuda.current_device()
        compiled = self._compiled[(device, *[_kind(a) for a in args])]
        stream = torch._C._cuda_getCurrentRawStream(device)
        front = (*grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
        return Bound(compiled.run, front, self._constants, True)

    @property
    def _interpreted(self) -> dict[str, Any]:
        """What Triton's interpreter takes of `meta`."""
        return {k: v for k, v in self.meta.items() if k in self.kernel.arg_names}


class Bound(NamedTuple):
    """A kernel that is called as `run(*front, *args, *back)`.

    Attributes:
        run: launches.
        front: what stands before the kernel's own arguments.
        back: what stands behind them.
        pointers: whether an integer stands for a tensor. A tensor is taken too, and asked for its address.
    """

    run: Callable[..., Any]
    front: tuple[Any, ...]
    back: tuple[Any, ...]
    pointers: bool


def _kind(value: Any) -> Any:
    """All that Triton specializes a kernel on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if value is None or isinstance(value, float):
        return value is None
    return type(value), value.base.dtype, tuple(value.block_shape)  # a TensorDescriptor


_settled: set[int] = set()


def settle(function: Any) -> None:
    """Has Triton hash what a kernel calls before it hashes the kernel.

    Up to 3.6 at least, Triton leaves a callee's constants out of the caller's hash unless the callee was hashed
    before. The hash would then depend on what else the process has compiled so far, and kernels that are in Triton's
    cache on disk would be compiled again.
    """
    if INTERPRET or id(function) in _settled:
        return
    _settled.add(id(function))
    names, seen = function.fn.__code__.co_names, set()
    found = [function.fn.__globals__.get(name) for name in names]
    for value in found:  # grows: names behind dots are in `names` as well
        if isinstance(value, ModuleType) and value not in seen:
            seen.add(value)
            found += [getattr(value, name, None) for name in names]
        elif hasattr(type(value), "cache_key") and hasattr(value, "fn"):  # asked of the value, it would be hashed
            settle(value)
    _ = function.cache_key


def capability(device: torch.device | None = None) -> int:
    """The compute capability that a launch now is for, as in sm_90; 0 in the interpreter."""
    target = getattr(triton.runtime.driver._active, "capability", None)
    if target is not None:
        return target
    if INTERPRET:
        return 0
    return _capability(torch.cuda.current_device() if device is None else device.index or 0)


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it, nothing is launched: each launch is handed to `recorder`."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


class _Target:
    """A driver that knows a GPU by name only, enough for Triton to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled for each device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[Launcher, Any]]]:
    """Within it, every launch is compiled for that compute capability (90 is sm_90) and not run; needs no GPU.

    Yields:
        A list that fills with (launcher, compiled kernel); `compiled.asm["ptx"]` and the like hold the code.
    """
    compiled: list[tuple[Launcher, Any]] = []

    def record(launcher: Launcher, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        compiled.append((launcher, launcher.kernel.warmup(*args, grid=grid, **launcher.meta)))

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Target(capability))
    try:
        with recording(record):
            yield compiled
    finally:
        driver._active = before


interpreted = tl.constexpr(INTERPRET)
"""For kernels: inline PTX has to be spelled out in arithmetic in the interpreter."""
