"""Prefill and decoding of whole models with random weights: bf16 against quantized models, on one GPU.

    python benchmarks/model.py [--models llama-3-8b ...] [--schemes W8A8 FP8_DYNAMIC W4A16 W4A8] [--layers N]

The quantized models go the user's way: modules of the Hugging Face model are replaced, then `qfx.lower` rewrites them.
Weights are rounded to nearest, since speed does not depend on their values. A decoding step reads a static cache of 256
positions and is replayed as a CUDA graph; a prefill runs without a cache. Each is measured as the model's own code runs
(eager), through torch.compile as one graph (compile), or each layer by itself (layers).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import models, timing  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

MODELS = ["llama-3-8b", "llama-2-7b", "opt-13b", "opt-30b"]
SCHEMES = ["W8A8", "FP8_DYNAMIC", "W4A16", "W4A8"]
DECODE = [1, 16]
PREFILL = {"default": [(1, 2048), (4, 2048)], "opt-30b": [(4, 256)]}
"""Batch x tokens; SmoothQuant's paper gives OPT-30B's latency at batch 4, 256 tokens."""
GIB = 2.0**30


class Run:
    """What is left of the time, and the rows so far."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.budget, self.path = a, timing.Budget(a.budget), Path(a.out)
        self.result: dict[str, Any] = {**timing.environment(), "rows": []}
        self.skipped: list[str] = []

    def model(self, name: str) -> None:
        """One shape: bf16, then every scheme."""
        for scheme in ["bf16", *self.a.schemes]:
            if self.budget.left < 0:
                self.skipped.append(f"{name} {scheme}")
                continue
            try:
                self.variant(name, scheme)
            except Exception as e:
                self.failed(f"{name} {scheme}", e)
            models.free()

    def variant(self, name: str, scheme: str) -> None:
        """One model in one scheme, eager and compiled."""
        began, row = time.perf_counter(), {"model": name, "scheme": scheme, "layers": self.a.layers}
        model = models.build(name, self.a.layers, self.a.device)
        if scheme != "bf16":
            row["linears"] = models.quantize(model, scheme)
            models.free()
            ids = torch.randint(0, model.config.vocab_size, (1, 32), device=self.a.device)
            row["lowered"] = models.lower(model, ids)
            print(f"{name} {scheme}: {row['lowered'].splitlines()[0]}", flush=True)
            models.free()
        row["weights"] = models.stored_bytes(model)
        row["seconds"] = time.perf_counter() - began
        for mode in self.a.modes:
            cases = dict(self.measure(name, model, mode))
            self.result["rows"].append({**row, "mode": mode, **cases})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def measure(self, name: str, model: nn.Module, mode: str) -> Iterator[tuple[str, Any]]:
        """Every case of one model, each guarded: (its name, what was measured)."""
        forward = models.compiled(model, mode)
        cases: list[tuple[str, int, Callable[[], timing.Timing]]] = []
        for batch in self.a.decode:
            step = lambda b=batch: models.decode_time(models.decode_step(model, forward, b))  # noqa: E731
            cases.append((f"decode {batch}", batch, step))
        for batch, tokens in self.a.prefill or PREFILL.get(name, PREFILL["default"]):
            ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=self.a.device)
            cases.append((f"prefill {batch}x{tokens}", batch * tokens, lambda i=ids: models.prefill_time(forward, i)))
        for case, tokens, call in cases:
            if self.budget.left < 0:
                self.skipped.append(f"{name} {mode} {case}")
                continue
            try:
                torch.cuda.reset_peak_memory_stats()
                time_ = call()
            except Exception as e:
                self.failed(f"{name} {mode} {case}", e)
                yield case, {"failed": f"{type(e).__name__}: {e}"[:400]}
                torch.cuda.empty_cache()
                continue
            peak = torch.cuda.max_memory_allocated()
            rate = tokens / time_.us * 1e6
            print(f"  {mode} {case}: {time_.us / 1e3:.2f} ms, {rate:.0f} tok/s, {peak / GIB:.1f} GiB", flush=True)
            yield case, {"ms": time_.us / 1e3, "low": time_.low / 1e3, "high": time_.high / 1e3, "peak": peak}

    def failed(self, what: str, error: Exception) -> None:
        """A case that raised: the rest goes on, unless the GPU itself is gone."""
        print(f"failed {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if self.a.verbose:
            traceback.print_exception(error)
        torch.cuda.synchronize()

    def print(self) -> None:
        """The table, and what is missing."""
        for name in dict.fromkeys(r["model"] for r in self.result["rows"]):
            Console(width=170).print(table(name, [r for r in self.result["rows"] if r["model"] == name]))
        if self.skipped:
            print("out of time, not measured:", ", ".join(self.skipped))


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One model: ms of each case, and the ratio to bf16 through torch.compile (eager if that is missing)."""
    cases = list(dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, dict)))
    base = {r["mode"]: r for r in rows if r["scheme"] == "bf16"}
    best = base.get("compile", base.get("eager", {}))
    shown = Table("scheme", "mode", *cases, "weights", "peak", title=f"{name}: ms (ratio to bf16)")
    for row in rows:
        cells = []
        for case in cases:
            found, other = row.get(case, {}), best.get(case, {})
            if "ms" not in found:
                cells.append("failed" if "failed" in found else "-")
                continue
            ratio = f" ({other['ms'] / found['ms']:.2f})" if "ms" in other else ""
            cells.append(f"{found['ms']:.2f}{ratio}")
        peak = max((row[c].get("peak", 0) for c in cases if c in row), default=0)
        shown.add_row(row["scheme"], row["mode"], *cells, f"{row['weights'] / GIB:.1f}", f"{peak / GIB:.1f}")
    return shown


def compile_all(a: argparse.Namespace) -> None:
    """Runs one layer of everything in parallel processes, so that the kernels are in Triton's cache on disk."""
    began, env = time.monotonic(), {**os.environ, "OMP_NUM_THREADS": "1"}
    kept = [x for flag in ("decode", "prefill") if (v := getattr(a, flag)) for x in (f"--{flag}", *map(_text, v))]

    def one(job: tuple[str, str]) -> str:
        model, scheme = job
        with tempfile.TemporaryDirectory() as folder:
            only = ["--models", model, "--schemes", scheme, "--modes", "eager", "--layers", "1", "--workers", "0"]
            command = [sys.executable, sys.argv[0], *only, *kept, "--out", f"{folder}/out.json"]
            try:
                done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=a.budget / 3)
            except subprocess.TimeoutExpired:
                return f"{model} {scheme}: not compiled in time"
            return "" if done.returncode == 0 else f"{model} {scheme}: {done.stderr.strip()[-300:]}"

    with ThreadPoolExecutor(a.workers) as pool:
        for line in pool.map(one, [(m, s) for m in a.models for s in a.schemes]):
            if line:
                print(line, flush=True)
    print(f"compiled in {a.workers} processes, {time.monotonic() - began:.0f} s", flush=True)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Runs the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--models", nargs="*", default=MODELS)
    ap.add_argument("--schemes", nargs="*", default=SCHEMES)
    ap.add_argument("--modes", nargs="*", default=["eager", "compile"], choices=["eager", "compile", "layers"])
    ap.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    ap.add_argument("--decode", nargs="*", type=int, default=DECODE, help="batch sizes")
    ap.add_argument("--prefill", nargs="*", type=lambda s: tuple(map(int, s.split("x"))), help="batch x tokens ...")
    ap.add_argument("--device", default="cuda")
    ap.add_argument("--out", default="benchmarks/results/model.json")
    ap.add_argument("--budget", type=float, default=540.0, help="seconds, after which nothing more is started")
    ap.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that compile")
    ap.add_argument("--verbose", action="store_true")
    a = ap.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("model: no CUDA device; nothing to measure")
    torch.set_grad_enabled(False)
    run = Run(a)
    if a.workers > 1 and a.schemes:
        compile_all(a)
    for name in a.models:
        run.model(name)
    run.print()


if __name__ == "__main__":
    main()
