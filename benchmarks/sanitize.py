"""Every GPU kernel under compute-sanitizer, on small and odd shapes: a table of errors for each kernel and tool.

    python benchmarks/sanitize.py [--tools memcheck racecheck initcheck] [--only TEXT] [--processes 4]

Kernels are compiled first, without the sanitizer. Then each tool runs them in a few processes; what a tool reports
between the lines that a process prints around a kernel is that kernel's. Exits with 1 if there is any error.

Races that are in Triton's start of warps of another kind alone are counted apart. A warp reads there what the first
warps wrote to shared memory to tell it where to begin, with a barrier of all warps in between; where some warps have
barriers of their own besides, racecheck does not see that. `control: warps of two kinds` has nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qfx.kernels

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import timing  # noqa: E402
from bench.sanitized import CASES  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
BEGIN, END = "@@ begin ", "@@ end "
RECORD = re.compile(
    r"^========= (Invalid|Error|Warning|Race|Uninitialized|Barrier|Divergent|Missing|Malloc|Unused|Potential)"
)
PLACE = re.compile(r" in (?:\S*/)?(\w+\.py):(\d+)")
SOURCES = (HERE / "bench", Path(qfx.kernels.__file__).parent / "gpu")
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+)")


def find(name: str) -> str:
    """The sanitizer's path."""
    found = shutil.which(name) or next((f"{p}/{name}" for p in PLACES if Path(p, name).exists()), None)
    if found is None:
        raise SystemExit(f"sanitize: no {name}; it comes with the CUDA toolkit (looked in PATH, {', '.join(PLACES)})")
    return found


def work(names: list[str]) -> None:
    """Runs kernels, with lines around each that tell their reports apart."""
    for name in names:
        print(BEGIN + name, flush=True)
        try:
            CASES[name]()
            torch.cuda.synchronize()
        except Exception as e:
            print(f"@@ failed {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", flush=True)
        time.sleep(0.1)  # the tool writes to the same pipe from another process
        print(END + name, flush=True)


def run(prefix: list[str], names: list[str], limit: float) -> str:
    """The output of one process; what there is of it if it does not end in time."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if prefix:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else an access past a tensor may fall into another one
    command = [*prefix, sys.executable, str(Path(__file__).resolve()), "--worker", *names]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, **pipe) as process:  # type: ignore[call-overload]
        try:
            return str(process.communicate(timeout=limit)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            return str(process.communicate()[0]) + f"\n@@ failed not done in {limit:.0f} s\n"


def of_the_start(record: list[str]) -> bool:
    """Whether all accesses of a report are in the first line of a kernel, or where it starts warps of another kind."""
    places = [match.groups() for line in record for match in PLACE.finditer(line)]
    return bool(places) and all(_starts(name, int(number)) for name, number in places)


def _starts(name: str, number: int) -> bool:
    lines = next(((f / name).read_text().splitlines() for f in SOURCES if (f / name).exists()), [])
    line = lines[number - 1].lstrip() if number <= len(lines) else ""
    return line.startswith(("def _", "gl.warp_specialize("))


def read(output: str, names: list[str]) -> dict[str, Any]:
    """Reports of each kernel: `errors`, the first lines of them, and `failed` if it did not run to its end."""
    found: dict[str, Any] = {n: {"errors": 0, "start": 0, "reports": [], "failed": "not reached"} for n in names}
    records: dict[str, list[list[str]]] = {n: [] for n in names}
    now, other, total = None, 0, None
    for line in output.splitlines():
        if line.startswith(BEGIN):
            name = line.removeprefix(BEGIN)
            now = found[name]
            now["failed"] = "began, did not end"
        elif line.startswith(END) and now is not None:
            now["failed"] = now.pop("raised", None)
            now = None
        elif line.startswith("@@ failed") and now is not None:
            now["raised"] = now["failed"] = line.removeprefix("@@ failed ")
        elif match := SUMMARY.match(line):
            total = max(total or 0, int(match[1]))
        elif RECORD.match(line):
            if now is None:
                other += 1
            else:
                records[name].append([line])
        elif now is not None and line.startswith("=========") and records[name]:
            records[name][-1].append(line)
        if now is not None and line.startswith("=========") and len(now["reports"]) < 12:
            now["reports"].append(line.removeprefix("========= ").strip())
    for name, reports in records.items():
        found[name]["start"] = sum(of_the_start(r) for r in reports)
        found[name]["errors"] = len(reports) - found[name]["start"]
    counted = sum(len(reports) for reports in records.values())
    rest = max(other, (total or 0) - counted)
    found["(between kernels)"] = {"errors": rest, "start": 0, "reports": [], "failed": None}
    if total is None and output:
        found["(between kernels)"]["failed"] = "no summary: " + " | ".join(output.strip().splitlines()[-3:])[:300]
    return found


def show(result: dict[str, Any], tools: list[str]) -> None:
    """The table on the terminal, and what was reported."""
    table = Table("kernel", *tools, title="compute-sanitizer: errors")
    for name, row in result.items():
        cells = [row.get(tool, {"errors": "-", "failed": None}) for tool in tools]
        table.add_row(name, *(_cell(c) for c in cells))
    Console(width=150).print(table)
    for name, row in result.items():
        for tool, cell in row.items():
            if cell["errors"] and cell["reports"]:
                print(f"{name}, {tool}:\n  " + "\n  ".join(cell["reports"]))


def _cell(cell: dict[str, Any]) -> str:
    start = f" (+{cell['start']} at the start of warps)" if cell.get("start") else ""
    return f"{cell['errors']}{start}" + (f" ({cell['failed']})" if cell["failed"] else "")


def main() -> None:
    """Runs the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tools", nargs="*", default=["memcheck", "racecheck"])
    ap.add_argument("--only", default="", help="kernels whose name holds this text")
    ap.add_argument("--processes", type=int, default=6, help="for each tool")
    ap.add_argument("--limit", type=float, default=100.0, help="seconds for each process")
    ap.add_argument("--out", default="benchmarks/results/sanitize.json")
    ap.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sanitize: no CUDA device; nothing to check")
    if a.worker is not None:
        work(a.worker)
        return
    path, began = find("compute-sanitizer"), time.monotonic()
    names = [name for name in CASES if a.only in name]
    shares = [share for i in range(a.processes) if (share := names[i :: a.processes])]
    with ThreadPoolExecutor(len(shares) * len(a.tools)) as pool:
        for output in pool.map(lambda share: run([], share, a.limit), shares):
            if "@@ failed" in output or output.count(END) == 0:
                print(output[-2000:])
        print(f"compiled, {time.monotonic() - began:.0f} s", flush=True)
        jobs = [(tool, share) for tool in a.tools for share in shares]

        def one(job: tuple[str, list[str]]) -> dict[str, Any]:
            options = ["--target-processes", "application-only", "--print-limit", "50"]
            if job[0] == "memcheck":
                options += ["--report-api-errors", "no"]
            return read(run([path, "--tool", job[0], *options], job[1], a.limit), job[1])

        result: dict[str, Any] = {name: {} for name in names}
        for (tool, _), found in zip(jobs, pool.map(one, jobs), strict=True):
            for name, cell in found.items():
                row = result.setdefault(name, {})
                if tool in row:  # what lies between kernels, of another process
                    row[tool]["errors"] += cell["errors"]
                    row[tool]["failed"] = row[tool]["failed"] or cell["failed"]
                else:
                    row[tool] = cell
    show(result, a.tools)
    out = Path(a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**timing.environment(), "kernels": result}, indent=1) + "\n")
    bad = [n for n, row in result.items() if any(c["errors"] or c["failed"] for c in row.values())]
    print(f"{len(names)} kernels, {time.monotonic() - began:.0f} s; with errors: {', '.join(bad) or 'none'}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
