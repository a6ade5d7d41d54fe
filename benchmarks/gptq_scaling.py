"""Time of GPTQ and of plain OBQ against the size of a layer `[rows, columns]`, on one core.

GPTQ shares one inverse among all rows: max(rows * columns^2, columns^3). OBQ has one for each row:
rows * columns^3. Both run the library's functions on the same weights, four bits, a scale for each row;
OBQ computes in float64, GPTQ in float32.

    python benchmarks/gptq_scaling.py [--out benchmarks/results/gptq_scaling.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qfx.core.grid import Int
from qfx.core.spec import QSpec
from qfx.passes.solve._obs import prepare
from qfx.passes.solve.gptq import gptq
from qfx.passes.solve.obq import obq
from qfx.passes.solve.rtn import rtn

SPEC = QSpec(Int(4, signed=False), symmetric=False)
ROWS = 10_000
SWEEPS = {
    f"columns, {ROWS} rows": ([(ROWS, n) for n in (100, 200, 400, 800, 1600, 3200)], 1, "columns^2 at most"),
    "rows, 512 columns": ([(m, 512) for m in (1000, 2000, 4000, 8000, 16000)], 0, "rows^1"),
    "columns, 16 rows": ([(16, n) for n in (768, 1536, 3072, 6144)], 1, "columns^3 at most"),
}
OBQ_SIZES = {50: 640, 100: ROWS, 200: 320, 400: 64, 800: 32}
"""Rows measured for each number of columns; times are scaled to ROWS rows, which are independent of each other."""


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian weight, and a Hessian of a few strong directions on an uneven diagonal."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(columns, 64, generator=generator)
    diagonal = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), strong @ strong.T + torch.diag(diagonal)


def time_gptq(rows: int, columns: int) -> dict[str, float]:
    """The best of up to five runs; the factor is part of the time, the loss that RTN is compared by too."""
    w, h = layer(rows, columns)
    best, started = math.inf, time.perf_counter()
    for _ in range(5):
        _, report = gptq(w, SPEC, h)
        if not report.loss < report.loss_rtn:
            raise SystemExit(f"GPTQ is not better than RTN at {rows} x {columns}: no time is worth reporting")
        best = min(best, report.seconds)
        if time.perf_counter() - started > 4:
            break
    work = max(rows * columns**2, columns**3)
    return {
        "rows": rows,
        "columns": columns,
        "seconds": best,
        "picoseconds_per_operation": best / work * 1e12,
        "loss_over_rtn": report.loss / report.loss_rtn,
    }


def time_obq(columns: int, measured: int) -> dict[str, float | bool]:
    """OBQ on `measured` rows, scaled to ROWS, beside GPTQ on all ROWS."""
    w, h = layer(ROWS, columns)
    start = time.perf_counter()
    q = obq(w[:measured], SPEC, h)
    seconds = time.perf_counter() - start
    factor = prepare(h, dtype=torch.float64)
    sample = w[:measured]
    nearest = factor.loss(sample - rtn(sample, SPEC).dequantize())
    fast = gptq(sample, SPEC, h)[0]
    return {
        "rows": ROWS,
        "columns": columns,
        "measured_rows": measured,
        "measured_seconds": seconds,
        "extrapolated": measured != ROWS,
        "obq_seconds": seconds * ROWS / measured,
        "gptq_seconds": time_gptq(ROWS, columns)["seconds"],
        "obq_loss_over_rtn": factor.loss(sample - q.dequantize()) / nearest,
        "gptq_loss_over_rtn": factor.loss(sample - fast.dequantize()) / nearest,
    }


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log(seconds) over log(size), by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def model(points: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of each term that the time is a sum of, by least squares of relative errors.

    Each column costs some calls, and inside a block one pass over its rows; those two are why exponents of
    layers of this size lie below the ones of large layers.
    """
    terms = {
        "columns": lambda r, c: c,
        "rows*columns": lambda r, c: r * c,
        "rows*columns^2": lambda r, c: r * c**2,
        "columns^3": lambda r, c: c**3,
    }
    rows = [[f(p["rows"], p["columns"]) / p["seconds"] for f in terms.values()] for p in points]
    a = torch.tensor(rows, dtype=torch.float64)
    norms = a.norm(dim=0)
    x = torch.linalg.lstsq(a / norms, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0] / norms
    fitted = dict(zip(terms, x.tolist(), strict=True))
    return {**fitted, "largest_relative_error": float((a @ x - 1).abs().max())}


def hardware() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "load_average_at_start": os.getloadavg()[0],  # this process alone adds 1
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gptq_scaling.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    console = Console()
    result: dict[str, object] = {"hardware": hardware(), "spec": SPEC.to_dict()}
    time_gptq(64, 64)  # the first call of each library function loads it

    sweeps = {}
    for name, (sizes, axis, expected) in SWEEPS.items():
        table = Table(title=f"GPTQ over {name}")
        for head in ("rows", "columns", "seconds", "ps / max(rc², c³)", "loss / RTN"):
            table.add_column(head, justify="right")
        points = [time_gptq(*size) for size in sizes]
        for p in points:
            table.add_row(
                f"{p['rows']}",
                f"{p['columns']}",
                f"{p['seconds']:.3f}",
                f"{p['picoseconds_per_operation']:.1f}",
                f"{p['loss_over_rtn']:.3f}",
            )
        swept, seconds = [float(size[axis]) for size in sizes], [p["seconds"] for p in points]
        overall, last = exponent(swept, seconds), exponent(swept[-3:], seconds[-3:])
        table.caption = f"exponent {overall:.2f}, of the last three {last:.2f}; {expected}"
        console.print(table)
        sweeps[name] = {"points": points, "exponent": overall, "exponent_of_last_three": last, "expected": expected}
    fitted = model([p for sweep in sweeps.values() for p in sweep["points"]])
    error = fitted["largest_relative_error"]
    sums = " + ".join(f"{value:.1e} {term}" for term, value in fitted.items() if term != "largest_relative_error")
    console.print(f"GPTQ seconds = {sums}\n(within {error:.0%} of every row above)\n")
    result["gptq"] = {"sweeps": sweeps, "model": fitted}

    table = Table(title=f"OBQ and GPTQ, {ROWS} rows")
    for head in ("columns", "OBQ s", "measured", "GPTQ s", "ratio", "OBQ loss/RTN", "GPTQ loss/RTN"):
        table.add_column(head, justify="right")
    points = [time_obq(*size) for size in OBQ_SIZES.items()]
    for p in points:
        table.add_row(
            f"{p['columns']}",
            f"{'~' if p['extrapolated'] else ''}{p['obq_seconds']:.1f}",
            f"{p['measured_rows']} rows",
            f"{p['gptq_seconds']:.3f}",
            f"{p['obq_seconds'] / p['gptq_seconds']:.0f}x",
            f"{p['obq_loss_over_rtn']:.3f}",
            f"{p['gptq_loss_over_rtn']:.3f}",
        )
    slow = exponent([p["columns"] for p in points[-3:]], [p["obq_seconds"] for p in points[-3:]])
    table.caption = f"~ extrapolated from the measured rows. OBQ: exponent of the last three {slow:.2f}; columns^3"
    console.print(table)
    result["obq"] = {"points": points, "exponent_of_last_three": slow, "expected": "columns^3"}

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
