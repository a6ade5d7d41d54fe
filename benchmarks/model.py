"""Prefill and decoding of whole models with random weights: bf16, qfx and torchao side by side, on one GPU.

    python benchmarks/model.py [--models llama-3-8b ...] [--ways bf16 fused:W8A8 torchao:int8 ...] [--layers N]

Every way runs in a process of its own. All of them build, quantize, compile and run every case once, at the same time
(building one after the other, so that one float model more than what stays is in memory); then each has the GPU for
itself while it is timed. Weights are rounded to nearest, since speed does not depend on their values. A decoding step
reads a static cache of 256 positions; a prefill runs without a cache. Both are replayed as CUDA graphs; results also
have what a prefill takes when the host launches it op by op.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import timing, variants  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

MODELS = ["llama-3-8b", "opt-13b"]
WANTED = [
    "bf16", "fused:W8A8", "fused:FP8_DYNAMIC", "fused:W4A16", "fused:W4A8", "torchao:int8", "torchao:fp8",
    "torchao:int4",
]  # fmt: skip
DECODE = [1]
PREFILL = {"default": [(4, 2048)], "opt-30b": [(4, 256)]}
"""Batch x tokens; SmoothQuant's paper gives OPT-30B's latency at batch 4, 256 tokens."""
GIB = 2.0**30
READY, ROW = "@@ ready", "@@ row "


class Worker:
    """One way in a process of its own."""

    def __init__(self, a: argparse.Namespace, model: str, way: str, lock: str) -> None:
        self.way, self.lines = way, queue.Queue[str | None]()
        kept = [x for flag in ("decode", "prefill") if (v := getattr(a, flag)) for x in (f"--{flag}", *map(_text, v))]
        more = [*(["--layers", str(a.layers)] if a.layers else []), *(["--body"] if a.body else [])]
        command = [sys.executable, sys.argv[0], "--worker", way, "--models", model, "--scope", a.scope, *kept, *more]
        self.process = subprocess.Popen(
            [*command, "--lock", lock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def until(self, mark: str, end: float) -> str | None:
        """The line that begins so, or None if the process ends before, or the time does; other lines are shown."""
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if line is None or line.startswith(mark):
                return line
            print(f"[{self.way}] {line}"[:400], flush=True)

    def go(self) -> None:
        """Lets it measure."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()


def work(a: argparse.Namespace) -> None:
    """A worker: prepares all cases of one way, waits for its turn, measures."""
    torch.set_grad_enabled(False)
    name = a.models[0]
    variant = variants.Variant(name, a.worker, a.layers, a.scope, a.device, a.body)
    prepared: list[tuple[str, int, Any]] = []
    failed: dict[str, Any] = {}
    torch.zeros(1, device=a.device)  # before its turn to build, so that the turn is short
    variant.imports()
    with _alone(a.lock):
        variant.build()
    print(f"built in {variant.row['seconds']:.0f} s", flush=True)
    for case, tokens, make in variant.cases(a.decode, a.prefill or PREFILL.get(name, PREFILL["default"])):
        try:
            prepared.append((case, tokens, make()))
            print(f"{case} ready, {variant.row['first'][case]:.0f} s", flush=True)
        except Exception as e:
            traceback.print_exception(e, limit=-3)
            failed[case] = {"failed": f"{type(e).__name__}: {e}"[:400]}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print(READY, flush=True)
    sys.stdin.readline()
    found = {case: variants.measured(made, tokens) for case, tokens, made in prepared}
    print(ROW + json.dumps({**variant.row, **failed, **found}), flush=True)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare(a: argparse.Namespace, name: str, end: float) -> Iterator[dict[str, Any]]:
    """One model in every way."""
    with tempfile.NamedTemporaryFile() as lock:
        workers = [Worker(a, name, way, lock.name) for way in a.ways]
        try:
            ready = [w for w in workers if (w.until(READY, end - 30) or "").startswith(READY)]
            for worker in workers:
                if worker not in ready:
                    worker.stop()  # what compiles would disturb the others
                    print(f"{name} {worker.way}: not ready in time, or failed", flush=True)
                    yield {"model": name, "way": worker.way, "failed": "not ready in time, or failed"}
            if a.ask:
                print("press enter when nothing else uses the GPU", flush=True)
                sys.stdin.readline()
            for worker in ready:
                worker.go()
                line = worker.until(ROW, end)
                if line is None:
                    yield {"model": name, "way": worker.way, "failed": "not measured"}
                else:
                    yield json.loads(line.removeprefix(ROW))
                worker.stop()
        finally:
            for worker in workers:
                worker.stop()


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One model: ms of each case, and the ratio to the first bf16 row."""
    cases = list(dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, dict) and "ms" in v))
    base = next((r for r in rows if r["way"] == "bf16"), {})
    shown = Table(
        "way",
        *cases,
        "weights, GiB",
        "peak, GiB",
        "compiled, s",
        title=f"{name}: ms (ratio to bf16) \\[launched by the host]",
    )
    for row in rows:
        cells = []
        for case in cases:
            found, other = row.get(case, {}), base.get(case, {})
            ratio = f" ({other['ms'] / found['ms']:.2f})" if "ms" in found and "ms" in other else ""
            failed = "failed" in row or "failed" in found
            launched = f" [{found['launched']:.2f}]" if "launched" in found else ""
            cells.append(f"{found['ms']:.2f}{ratio}{launched}" if "ms" in found else "failed" if failed else "-")
        peak = max((row[c]["peak"] for c in cases if "peak" in row.get(c, {})), default=0)
        first = ", ".join(f"{s:.0f}" for s in row.get("first", {}).values())
        shown.add_row(row["way"], *cells, f"{row.get('weights', 0) / GIB:.2f}", f"{peak / GIB:.2f}", first)
    return shown


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Runs the table."""
    ap = argparse.ArgumentParser(
        description=__doc__, epilog=variants.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--models", nargs="*", default=MODELS)
    ap.add_argument("--ways", nargs="*", default=WANTED)
    ap.add_argument("--scope", default="compile", choices=["eager", "compile", "layers"])
    ap.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    ap.add_argument("--body", action="store_true", help="layers alone: no output head, and embeddings are not counted")
    ap.add_argument("--decode", nargs="*", type=int, default=DECODE, help="batch sizes")
    ap.add_argument("--prefill", nargs="*", type=lambda s: tuple(map(int, s.split("x"))), help="batch x tokens ...")
    ap.add_argument("--device", default="cuda")
    ap.add_argument("--out", default="benchmarks/results/model.json")
    ap.add_argument("--resume", action="store_true", help="add to what --out holds")
    ap.add_argument("--budget", type=float, default=540.0, help="seconds for each model")
    ap.add_argument("--ask", action="store_true", help="wait for a line on the terminal before timing")
    ap.add_argument("--worker", help=argparse.SUPPRESS)
    ap.add_argument("--lock", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("model: no CUDA device; nothing to measure")
    if a.worker:
        work(a)
        return
    path = Path(a.out)
    kept = json.loads(path.read_text())["rows"] if a.resume and path.exists() else []
    rows: list[dict[str, Any]] = []
    for name in a.models:
        for row in compare(a, name, time.monotonic() + a.budget):
            rows.append(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**timing.environment(), "rows": kept + rows}, indent=1) + "\n")
        Console(width=150).print(table(name, [r for r in rows if r["model"] == name]))


if __name__ == "__main__":
    main()
