"""Every op against cuBLAS in bf16 and against other libraries' kernels, on one GPU.

    python benchmarks/kernels.py [--peers] [--check] [--quick] [--ops NAME ...] [--shapes 8192x8192 ...] [--m 1 16 ...]
    python benchmarks/kernels.py --eager                      # what an eager call costs the host
    python benchmarks/kernels.py --tune --out tables.json     # measure all configurations, keep the best

Each number is the median over replays of a CUDA graph that holds several calls, on random data. Up to 256 tokens
every call in the graph reads another copy of the weight, over 150 MB together, so that weights come from memory.
Ratios are to cuBLAS bf16 and to the fastest peer that does the same, measured in the same run; over 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import ops, peers, precompile, report, row_peers, sweep, timing  # noqa: E402
from bench.cases import LIMIT, Linear, Missing, Rows, linear_error, relative_error  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find this file


class Run:
    """One run: what is left of its time, its results, and what it did not get to."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.budget = a, timing.Budget(a.budget)
        self.results = report.Results(Path(a.out), a.resume)
        self.skipped: dict[str, int] = {}

    def all(self) -> None:
        """Measures everything that was asked for."""
        for n, k in self.a.shapes:
            w = sweep.weight(n, k)
            self.linear("bf16", "bf16", "peer", peers.bf16, w)
            for name, (family, make) in sweep.selected(ops.OPS, self.a):
                self.linear(name, family, "op", make, w)
            for name, peer in sweep.chosen_peers(self.a):
                if peer.shapes is None or (n, k) in peer.shapes:
                    self.linear(name, peer.family, "peer", peer.make, w, peer.tokens)
            del w
            torch.cuda.empty_cache()
        for tokens, channels in self.a.rows:
            for name, (family, make_rows) in sweep.selected(ops.ROW_OPS, self.a):
                self.rows(name, family, "op", make_rows, tokens, channels)
            families = {family for _, (family, _) in sweep.selected(ops.ROW_OPS, self.a)}
            for name, (family, make_rows) in row_peers.ROW_PEERS.items() if self.a.peers else ():
                if family in families and (tokens, channels) in row_peers.SHAPES:
                    self.rows(name, family, "peer", make_rows, tokens, channels)

    def linear(self, name: str, family: str, role: str, make: Any, w: Tensor, tokens: Any = None) -> None:
        """One linear at one shape, for all numbers of tokens."""
        n, k = w.shape
        todo = [m for m in self.a.m if (tokens is None or m in tokens) and (name, m, n, k) not in self.results.rows]
        linear: Linear | None = None
        for m in todo:
            if self.budget.left < 0:
                self.skipped[name] = self.skipped.get(name, 0) + 1
                continue
            row = {"name": name, "family": family, "role": role, "M": m, "N": n, "K": k}
            try:
                linear = linear or make(w)
                if m > linear.largest:
                    continue
                self.results.add(row | self.one(linear, w, m, role))
            except Missing as e:
                self.results.note(f"skipped {name}: {e}")
                return
            except Exception as e:
                self.failed(row, e)
        del linear
        if torch.cuda.memory_reserved() > 60 << 30:
            torch.cuda.empty_cache()

    def one(self, linear: Linear, w: Tensor, m: int, role: str) -> dict[str, Any]:
        """Checks and times one call."""
        (n, k), row = w.shape, {}
        x = sweep.activation(m, k)
        if (self.a.check and role == "op") or (self.a.check and m == 16):
            error = linear_error(linear, x, w)
            row = {"error": error, "wrong": role == "op" and linear.values is not None and not error <= LIMIT}
        inputs = linear.prepare(x)
        if role == "op":
            row["kernels"] = precompile.launches(lambda: linear.call(inputs, linear.weights))
        rotated = timing.copies(linear.weights, m)
        calls: list[timing.Call] = [lambda v=v: linear.call(inputs, v) for v in rotated]
        time = (timing.graph_time if linear.captured else timing.event_time)(calls)
        moved = linear.traffic(inputs, m, n)
        row |= vars(time) | {"copies": len(rotated), "gbps": moved / time.us / 1e3}
        return row | {"tflops": 2e-6 * m * n * k / time.us}

    def rows(self, name: str, family: str, role: str, make: Callable[[], Rows], tokens: int, channels: int) -> None:
        """One op on rows."""
        at = (name, tokens, channels, 0)
        row = {"name": name, "family": family, "role": role, "M": tokens, "N": channels, "K": 0}
        if at in self.results.rows:
            return
        if self.budget.left < 0:
            self.skipped[name] = self.skipped.get(name, 0) + 1
            return
        try:
            case = make()
            size = tokens * channels
            xs = [sweep.activation(tokens, channels) for _ in range(max(1, min(16, timing.ROTATED // (3 * size))))]
            w = torch.randn(channels, device=sweep.DEVICE).bfloat16()
            if self.a.check and case.expected and case.dequantize:
                row["error"] = relative_error(case.dequantize(case.call(xs[0], w)), case.expected(xs[0], w))
            if role == "op":
                row["kernels"] = precompile.launches(lambda: case.call(xs[0], w))
            time = timing.graph_time([lambda x=x: case.call(x, w) for x in xs])
            moved = size * (2 + case.written) + (4 * tokens if case.written <= 1 else 0)
            self.results.add(row | vars(time) | {"gbps": moved / time.us / 1e3})
        except Missing as e:
            self.results.note(f"skipped {name}: {e}")
        except Exception as e:
            self.failed(row, e)

    def failed(self, row: dict[str, Any], error: Exception) -> None:
        """Records a failure; after one that left the GPU unusable, goes on in a fresh process."""
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        self.results.add(row | {"failed": text[:400]})
        self.results.note(f"failed {row['name']}: {text[:240]}")
        if self.a.verbose:
            traceback.print_exception(error)
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            restarts = int(os.environ.get("QFX_BENCH_RESTARTS", "0"))
            if restarts >= 4:
                raise SystemExit("kernels: the GPU failed too often") from error
            os.environ["QFX_BENCH_RESTARTS"] = str(restarts + 1)
            left = ["--resume", "--workers", "0", "--budget", str(max(self.budget.left, 1.0))]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.argv, *left])

    def print(self) -> None:
        """Tables, and what is missing."""
        if self.a.peers:
            print(report.peers_table(self.results))
        for name in dict.fromkeys(k[0] for k, r in self.results.rows.items() if r["role"] == "op"):
            print(report.table(self.results, name))
        for row in self.results.rows.values():
            if row.get("wrong"):
                print(f"WRONG {row['name']} M={row['M']} {row['N']}x{row['K']}: relative error {row['error']:.2e}")
        fallback = {r["name"] for r in self.results.rows.values() if r["role"] == "op" and r.get("kernels") == []}
        if fallback:
            print("without a kernel of ours (the reference, or a library's) somewhere:", ", ".join(sorted(fallback)))
        errors: dict[str, float] = {}
        for row in self.results.rows.values():
            if row["role"] == "op" and "error" in row:
                errors[row["name"]] = max(errors.get(row["name"], 0.0), row["error"])
        if errors:
            print("largest relative errors:", ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        lines = {f"failed {r['name']}: {r['failed'][:240]}": 0 for r in self.results.rows.values() if "failed" in r}
        for line in dict.fromkeys([*(n for n in self.results.notes if n.startswith("skipped")), *lines]):
            print(line)
        if self.skipped:
            print("out of time, not measured:", ", ".join(f"{k} ({v})" for k, v in self.skipped.items()))


def parse() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ops", nargs="*", default=[], help="only ops whose names begin so")
    ap.add_argument("--shapes", nargs="*", help=f"NxK ..., or all of a model: {', '.join(sweep.MODELS)}")
    ap.add_argument("--m", nargs="*", type=int, help="numbers of tokens")
    ap.add_argument("--rows", nargs="*", type=lambda s: tuple(map(int, s.split("x"))), help="MxD ... of ops on rows")
    ap.add_argument("--peers", action="store_true", help="other libraries too, those that are installed")
    ap.add_argument("--check", action="store_true", help="compare with float64 before timing")
    ap.add_argument("--quick", action="store_true", help="one shape, few numbers of tokens")
    ap.add_argument("--tune", action="store_true", help="measure all configurations instead")
    ap.add_argument("--keep", action="store_true", help="tune only what this machine and the shipped table lack")
    ap.add_argument("--eager", action="store_true", help="measure the host's time instead")
    ap.add_argument("--out", default="benchmarks/results/kernels.jsonl")
    ap.add_argument("--budget", type=float, default=420.0, help="seconds, after which nothing more is started")
    ap.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that compile")
    ap.add_argument("--resume", action="store_true", help="keep what --out holds already")
    ap.add_argument("--verbose", action="store_true")
    ap.add_argument("--_compile", default="", help=argparse.SUPPRESS)
    a = ap.parse_args()
    a.shapes = sweep.shapes(a.shapes) if a.shapes else sweep.SHAPES[:1] if a.quick else sweep.SHAPES
    a.m = a.m or ([1, 16, 256] if a.quick else sweep.TUNED if a.tune else sweep.TOKENS)
    a.rows = a.rows if a.rows is not None else (sweep.ROWS[:1] if a.quick else sweep.ROWS)
    return a


def main() -> None:
    """Runs one of the three modes."""
    a = parse()
    if not torch.cuda.is_available():
        raise SystemExit("kernels: no CUDA device; nothing to measure")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if a.tune and not a.keep:  # from scratch: neither an earlier run's table nor the shipped one
        from qfx.kernels.gpu import tune

        if not a._compile:
            os.environ["QFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="qfx-tune-")
        tune._shipped_table = lambda device: {}  # type: ignore[assignment]
    if a._compile:
        index, count = map(int, a._compile.split(":"))
        result = precompile.walk(sweep.steps(a, index), index, count, a.tune)
        if a.peers and not a.tune:
            sweep.compile_peers(a, index, count)
        print(json.dumps(result))
        return
    budget = timing.Budget(a.budget)
    if a.workers > 1 and not a.eager:
        precompile.in_parallel(sys.argv[1:], a.workers, a.budget * 0.7)
    a.budget = max(budget.left, 1.0)
    if a.eager:
        sweep.eager(a)
    elif a.tune:
        sweep.tune_all(a)
    else:
        run = Run(a)
        if not a.resume:
            run.results.add({"environment": timing.environment()})
        run.all()
        run.print()
        if any(r.get("wrong") for r in run.results.rows.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
