"""Clock and power of a GPU while one product repeats: whether power, and not a kernel, sets its speed.

    python benchmarks/clocks.py [--shape 28672x8192] [--m 256 2048] [--ops w4a16_linear ...]

Each product is replayed from a CUDA graph for about a second and a half, on one weight; clock and power are medians of
what nvidia-smi reads meanwhile. Times are those of a GPU that is kept busy, longer than those of `kernels.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import ops, peers, sweep, timing  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

OPS = ("w4a16_linear", "nf4_linear", "int8_gemm", "fp8_gemm", "w4a8_dq_gemm")
READ = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
CALLS = 20
"""In one graph."""


def busy(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a call that repeats, MHz and watts."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    read: list[tuple[float, float]] = []

    def watch() -> None:
        time.sleep(0.6)
        for _ in range(4):
            mhz, watts = subprocess.run(READ, capture_output=True, text=True, check=True).stdout.split(",")[:2]
            read.append((float(mhz), float(watts)))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    watcher.start()
    start.record()
    replays = 0
    while watcher.is_alive():
        graph.replay()
        replays += 1
        if replays % 10 == 0:  # not far ahead of the GPU
            torch.cuda.synchronize()
    end.record()
    end.synchronize()
    mhz, watts = (statistics.median(values) for values in zip(*read, strict=True))
    return {"us": start.elapsed_time(end) * 1e3 / (CALLS * replays), "mhz": mhz, "watts": watts}


def main() -> None:
    """Prints a line for each product, and writes all of them."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", default="28672x8192", help="output x input channels")
    ap.add_argument("--m", nargs="*", type=int, default=[256, 2048], help="numbers of tokens")
    ap.add_argument("--ops", nargs="*", default=OPS, choices=[*ops.OPS], help="beside bf16")
    ap.add_argument("--out", type=Path, default=Path("benchmarks/results/clocks.json"))
    a = ap.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("clocks: no CUDA device; nothing to measure")
    torch.set_grad_enabled(False)
    ((n, k),) = sweep.shapes([a.shape])
    w, rows = sweep.weight(n, k), []
    makes: dict[str, Any] = {"bf16": peers.bf16, **{name: ops.OPS[name][1] for name in a.ops}}
    print("tokens product               us  TFLOP/s   MHz    W")
    for m in a.m:
        x = sweep.activation(m, k)
        for name, make in makes.items():
            linear = make(w)
            inputs = linear.prepare(x)
            linear.call(inputs, linear.weights)
            row = {"name": name, "M": m, "N": n, "K": k, **busy(lambda x=inputs, v=linear: v.call(x, v.weights))}
            row["tflops"] = 2e-6 * m * n * k / row["us"]
            rows.append(row)
            print(f"{m:6d} {name:16s} {row['us']:9.1f} {row['tflops']:8.0f} {row['mhz']:5.0f} {row['watts']:4.0f}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({**timing.environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
