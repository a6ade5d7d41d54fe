"""Compiles the Triton kernels of a run in parallel processes first: that takes far longer than measuring.

Every process walks over all calls of the run with launches recorded and not made, and compiles its share of the
distinct kernels: a hash of kernel, options and kinds of arguments says whose a kernel is. They compile for the GPU that
is there, with the arguments that the real call has, so that Triton's key of its cache on disk is the real launch's.
Loading the result builds the C part of the launch as well, and tells a configuration with too much shared memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]


def walk(steps: Iterator[Step], index: int, count: int, candidates: bool) -> dict[str, Any]:
    """Compiles this process's share of what the steps launch; what cannot be compiled is in `failed`."""
    from qfx.kernels.gpu import launch, tune

    seen: set[str] = set()
    failed: dict[str, str] = {}
    done = 0

    def record(launcher: launch.Launcher, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        nonlocal done
        kernel, kinds = launcher.kernel, [launch._kind(a) for a in args]
        key = f"{kernel.__module__}.{kernel.__name__} {sorted(launcher.meta.items())} {kinds}"
        if key in seen:
            return
        seen.add(key)
        if zlib.crc32(key.encode()) % count != index:
            return
        try:
            compiled = kernel.warmup(*args, grid=grid, **launcher.meta)
            compiled.run  # noqa: B018  a property that loads the kernel
            done += 1
        except Exception as e:
            failed[key.split("[", 1)[0] + str(launcher.meta)] = f"{type(e).__name__}: {str(e)[:160]}"

    def every_candidate(
        op: str, key: Any, configs: Sequence[Any], run: Callable[[Any, Tensor], object], w: Tensor
    ) -> None:
        for config in configs:
            try:
                run(config, w)
            except Exception as e:
                failed[f"{op} {config}"] = f"{type(e).__name__}: {str(e)[:160]}"

    before = tune._measure_all
    with launch.recording(record):
        if candidates:
            tune._measure_all = every_candidate  # type: ignore[assignment]
            try:
                with tune.autotune():
                    _run(steps, failed)
            finally:
                tune._measure_all = before
        else:
            _run(steps, failed)
    return {"compiled": done, "distinct": len(seen), "failed": failed}


def launches(step: Step) -> list[str]:
    """The names of the kernels that one call launches."""
    from qfx.kernels.gpu import launch

    names: list[str] = []

    def record(launcher: launch.Launcher, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        names.append(launcher.kernel.__name__)
        launcher.kernel[grid](*args, **launcher.meta)

    with launch.recording(record):
        step()
    return names


def in_parallel(arguments: Sequence[str], workers: int, seconds: float) -> None:
    """Starts this script again in `workers` processes with `--_compile i:n`, and waits."""
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    compiled, failed = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i in range(workers):
            out, err = Path(folder, f"{i}.out"), Path(folder, f"{i}.err")  # a pipe that nobody reads would fill
            command = [sys.executable, sys.argv[0], *arguments, "--_compile", f"{i}:{workers}"]
            with out.open("w") as to, err.open("w") as errors:
                started.append((subprocess.Popen(command, stdout=to, stderr=errors, env=env), out, err))
        for i, (process, out, err) in enumerate(started):
            try:
                process.wait(timeout=max(1.0, seconds - (time.monotonic() - began)))
                result = json.loads(out.read_text().strip().splitlines()[-1])
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                failed[f"process {i}"] = "killed: out of time"
            except (IndexError, ValueError):
                failed[f"process {i}"] = err.read_text().strip()[-400:]
            else:
                compiled += result["compiled"]
                failed.update(result["failed"])
    print(f"compiled {compiled} kernels in {workers} processes, {time.monotonic() - began:.0f} s", flush=True)
    for name, why in list(failed.items())[:12]:
        print(f"  not compiled: {name}: {why}", flush=True)
    if len(failed) > 12:
        print(f"  not compiled: {len(failed) - 12} more")


def _run(steps: Iterator[Step], failed: dict[str, str]) -> None:
    for step in steps:
        try:
            step()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except Exception as e:
            failed[f"call ({type(e).__name__})"] = str(e)[:160]
