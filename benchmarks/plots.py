"""Figures and Markdown tables of what kernels.py and model.py measured.

    python benchmarks/plots.py [--kernels FILE ...] [--model FILE] [--shape 8192x8192] [--out FOLDER] [--markdown PAGE]

Figures need matplotlib: speed against cuBLAS bf16 over the number of tokens, one panel for each kind of op, and the
time of whole models. Tables go between the page's two markers, or to the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import report  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

Row = dict[str, Any]
KERNELS = [Path("benchmarks/results/kernels.jsonl")]


def read(path: Path) -> tuple[Row, report.Results]:
    """The environment, and the rows of kernels.py."""
    results = report.Results(path, resume=True)
    first = json.loads(path.read_text().splitlines()[0])
    return first.get("environment", {}), results


def conditions(environment: Row) -> str:
    """What it was measured on, in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in environment.get("versions", {}).items() if v)
    return f"Hardware: {environment.get('hardware')}; {versions}; {environment.get('date')}."


def op_tables(results: report.Results) -> list[str]:
    """For each op: µs, and in brackets the ratio to cuBLAS bf16 and to the best peer."""
    lines: list[str] = []
    for name in dict.fromkeys(k[0] for k, r in results.rows.items() if r["role"] == "op"):
        rows = {k[1:]: r for k, r in results.rows.items() if k[0] == name and "us" in r}
        if not rows:
            continue
        if all(k == 0 for _, _, k in rows):
            lines += ["", f"**{name}**", "", "| tokens x channels | µs | GB/s | best peer |", "|---|---|---|---|"]
            lines += [
                f"| {m}x{n} | {_us(r)} | {r['gbps']:.0f} | {_peer(results, r)} |" for (m, n, _), r in rows.items()
            ]
            continue
        tokens = sorted({m for m, _, _ in rows})
        lines += ["", f"**{name}**: µs (ratio to bf16; ratio to the best peer)", ""]
        lines += ["| N x K | " + " | ".join(f"M = {m}" for m in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
        for n, k in dict.fromkeys((n, k) for _, n, k in rows):
            cells = [_cell(results, rows.get((m, n, k))) for m in tokens]
            lines.append(f"| {n}x{k} | " + " | ".join(cells) + " |")
    return lines


def by_model(result: Row) -> dict[str, list[Row]]:
    """The rows of each model, each number of its layers, and each run."""
    found: dict[str, list[Row]] = {}
    for r in result["rows"]:
        count = r.get("layers")
        layers = f", {count} layer{'s' * (count > 1)}" if count else ""
        run = f" ({r['run']})" if r.get("run") else ""
        found.setdefault(r["model"] + layers + run, []).append(r)
    return found


def model_tables(result: Row) -> list[str]:
    """For each model: ms of every case."""
    lines: list[str] = []
    for name, rows in by_model(result).items():
        cases = list(dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, dict) and "ms" in v))
        base = next((r for r in rows if r["way"] == "bf16"), {})
        title = f"**{name}**: ms (times as fast as bf16), GiB (share of bf16's)"
        lines += ["", title, "", "| way | " + " | ".join([*cases, "weights", "peak"]) + " |"]
        lines.append("|---" * (len(cases) + 3) + "|")
        for r in rows:
            cells = [_ms(r.get(c), base.get(c)) for c in cases]
            peaks = [max((x[c]["peak"] for c in cases if "ms" in x.get(c, {})), default=0) for x in (r, base)]
            sizes = [(r.get("weights"), base.get("weights")), (peaks[0], peaks[1])]
            cells += [f"{a / 2**30:.2f} ({a / b:.2f})" if a and b else "-" for a, b in sizes]
            note = f" ({r['note']})" if "note" in r else ""
            lines.append(f"| {r['way']}{note} | " + " | ".join(cells) + " |")
    return lines


def _ms(case: Row | None, base: Row | None) -> str:
    if not case or "ms" not in case:
        return "fails" if case else "-"
    return f"{case['ms']:.2f}" + (f" ({base['ms'] / case['ms']:.2f})" if base and "ms" in base else "")


def _us(row: Row) -> str:
    return f"{row['us']:.1f}" if row["us"] < 1000 else f"{row['us']:.0f}"


def _peer(results: report.Results, row: Row) -> str:
    peer = results.best_peer(row)
    return "-" if peer is None else f"{_us(peer)} ({peer['name']})"


def _cell(results: report.Results, row: Row | None) -> str:
    if row is None:
        return "-"
    base, peer = results.us("bf16", row["M"], row["N"], row["K"]), results.best_peer(row)
    ratios = [f"{other / row['us']:.2f}" for other in (base, peer and peer["us"]) if other]
    return _us(row) + (f" ({'; '.join(ratios)})" if ratios else "")


def draw_kernels(results: report.Results, shape: tuple[int, int], path: Path) -> None:
    """One panel a family: ratio to bf16 over the number of tokens."""
    plt = _matplotlib()
    at = [r for r in results.rows.values() if (r["N"], r["K"]) == shape and "us" in r]
    families = list(dict.fromkeys(r["family"] for r in at if r["role"] == "op"))
    if not families:
        raise SystemExit(f"plots: nothing was measured at {shape[0]}x{shape[1]}")
    columns = min(3, len(families))
    size = (4.6 * columns, 3.4 * -(-len(families) // columns))
    figure, axes = plt.subplots(-(-len(families) // columns), columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(families) :]:
        axis.set_axis_off()
    for axis, family in zip(axes.flat, families, strict=False):
        for name in dict.fromkeys(r["name"] for r in at if r["family"] == family):
            own = sorted((r for r in at if r["name"] == name), key=lambda r: r["M"])
            pairs = [(r["M"], b / r["us"]) for r in own if (b := results.us("bf16", r["M"], *shape))]
            style = {"linewidth": 2.2} if own[0]["role"] == "op" else {"linewidth": 1.0, "linestyle": "--"}
            axis.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=name, **style)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(family, fontsize=10)
        axis.set_xlabel("tokens")
        axis.legend(fontsize=7)
    figure.suptitle(f"speed against cuBLAS bf16, {shape[0]} x {shape[1]}", fontsize=11)
    _save(figure, path)


def draw_models(result: Row, path: Path) -> None:
    """Bars: times as fast as bf16 in every case, for each model."""
    plt = _matplotlib()
    models = by_model(result)
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 2.8 * len(models)), squeeze=False)
    for axis, (name, rows) in zip(axes.flat, models.items(), strict=True):
        cases = list(dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, dict) and "ms" in v))
        base = next(r for r in rows if r["way"] == "bf16")
        width = 0.8 / len(rows)
        for i, r in enumerate(rows):
            places = [j + i * width for j in range(len(cases))]
            heights = [base[c]["ms"] / r[c]["ms"] if "ms" in r.get(c, {}) else 0.0 for c in cases]
            axis.bar(places, heights, width, label=r["way"])
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xticks([j + 0.4 - width / 2 for j in range(len(cases))], cases)
        axis.set_ylabel("times as fast as bf16")
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("plots: figures need matplotlib; pip install matplotlib, or leave --out away") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    print(path)


def put(page: str, what: str, lines: list[str]) -> str:
    """The page with these lines between its markers."""
    begin, end = f"<!-- {what}: begin -->", f"<!-- {what}: end -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"plots: the page has no {begin} ... {end}")
    return before + "\n".join([begin, *lines]).rstrip("\n") + "\n" + end + after


def main() -> None:
    """Draws, and writes tables."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument(
        "--kernels", type=Path, nargs="*", default=KERNELS, help="one file for each run; figures are of the first"
    )
    ap.add_argument("--model", type=Path, default=Path("benchmarks/results/model.json"))
    ap.add_argument("--shape", type=lambda s: tuple(map(int, s.split("x"))), default=(8192, 8192))
    ap.add_argument("--out", type=Path, help="folder of the figures")
    ap.add_argument("--markdown", type=Path, help="write the tables into this page")
    a = ap.parse_args()
    parts: dict[str, list[str]] = {}
    for path in filter(Path.exists, a.kernels):
        environment, results = read(path)
        parts.setdefault("kernels", []).extend([conditions(environment), *op_tables(results), ""])
        if a.out and path == a.kernels[0]:
            draw_kernels(results, a.shape, a.out / f"{path.stem}.svg")
    if a.model.exists():
        result = json.loads(a.model.read_text())
        parts["models"] = [conditions(result), *model_tables(result)]
        if a.out:
            draw_models(result, a.out / "models.svg")
    for what, lines in parts.items():
        if a.markdown:
            a.markdown.write_text(put(a.markdown.read_text(), what, lines))
        else:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
