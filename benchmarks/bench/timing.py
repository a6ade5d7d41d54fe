"""Timing on a GPU: CUDA-graph replays over rotated weights, host time of eager calls, and what it was measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROTATED = 160_000_000
"""Bytes of weight copies that take turns, well above the 60 MB of an H200's second-level cache."""
DECODE = 256
"""Up to so many tokens the weights dominate the traffic, and take turns."""
PACKAGES = ("torch", "triton", "qfx", "torchao", "mslk-cuda", "gemlite", "bitsandbytes", "liger-kernel", "transformers")

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the 20th and 80th percentile, over replays."""

    us: float
    low: float
    high: float
    calls: int


class Budget:
    """Seconds that are left of a run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def copies(weights: Sequence[Tensor], tokens: int) -> list[tuple[Tensor, ...]]:
    """The weights, and as many copies of them as it takes for each call to read its own from memory."""
    size = sum(w.numel() * w.element_size() for w in weights)
    count = 1 if tokens > DECODE else max(2, min(32, math.ceil(ROTATED / max(size, 1))))
    return [tuple(weights), *(tuple(w.clone() for w in weights) for _ in range(count - 1))]


def graph_time(calls: Sequence[Call], *, target_us: float = 1500.0, most: int = 96, replays: int = 7) -> Timing:
    """Time of one call, of calls that take turns in one CUDA graph (about `target_us` of work in it)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        calls[-1]()
        stream.synchronize()
        estimate = _elapsed(lambda: [c() for c in calls[:4]], stream) / len(calls[:4])
    torch.cuda.current_stream().wait_stream(stream)
    n = min(most, max(len(calls), math.ceil(target_us / max(estimate, 1.0))))
    n = len(calls) * math.ceil(n / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            calls[i % len(calls)]()
    graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return summary([s.elapsed_time(e) * 1e3 / n for s, e in pairs], n)


def event_time(calls: Sequence[Call], repeats: int = 20) -> Timing:
    """Time of one eager call, launch gaps and host waits included: for what no graph can hold."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    return summary([_elapsed(calls[i % len(calls)], stream) for i in range(repeats)], 1)


def host_time(call: Call, loops: int = 1000) -> float:
    """Microseconds of one eager call as the host sees it: wall time of a loop without waiting for the GPU."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):  # below the depth of the launch queue, so that the GPU does not hold the host up
        began = time.perf_counter()
        for _ in range(loops // 5):
            call()
        times.append((time.perf_counter() - began) / (loops // 5) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """Hardware, driver, versions, date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["cuda"] = torch.version.cuda
    hardware, driver = "no GPU", None
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired, IndexError):
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    return {"hardware": hardware, "driver": driver, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def _elapsed(call: Call, stream: torch.cuda.Stream) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def summary(times: list[float], calls: int) -> Timing:
    """Median and percentiles of times in microseconds."""
    times = sorted(times)
    return Timing(statistics.median(times), times[len(times) // 5], times[4 * len(times) // 5], calls)
