"""What folds on which architecture, and why not: the table of docs/architectures.md.

    python benchmarks/architectures.py [--only NAME ...] [--json FILE] [--markdown FILE]

Every model of tests/zoo (small, random weights, no unit gains, no zero biases) goes through SmoothQuant and through
Outlier Suppression+, each from a fresh copy, with all kinds of sites on and nothing quantized: the output must stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qfx
from qfx.core.report import Report

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python benchmarks/architectures.py"
RECIPES: dict[str, Any] = {
    "SmoothQuant": {"smoothquant": {"alpha": 0.5, "smooth_o": True, "smooth_down": True}},
    "OS+": {"outlier_suppression_plus": {"steps": 8, "value": True, "inner": True}},
}
REASONS = {
    r"is also used by": "tied or used more than once",
    r"its value is an output": "value is an output of the model",
    r"'add' at": "an add takes the value",
    r"'linear' at": "a product that is left takes the value",
    r"'(\w+)' at": "behind {}",
    r"no norm or linear writes": "nothing writes its input",
    r"does not run it": "not run",
    r"no view covers": "only parts of it are used",
    r"undone": "undone",
}
"""Reasons in short: the first pattern that is found."""
KINDS = {
    "decoder": "Decoders",
    "moe": "Mixtures of experts",
    "encoder": "Encoders",
    "vision": "Vision",
    "encoder-decoder": "Encoder-decoders",
    "user": "A person's own modules",
}


def main() -> None:
    """Measures, saves, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models; the others keep their stored rows")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/architectures.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/architectures.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    zoo, layers = load_zoo()
    stored = json.loads(args.json.read_text())["models"] if args.only and args.json.exists() else {}
    rows = {}
    for name, entry in zoo.items():
        if not args.only or name in args.only:
            rows[name] = measure(entry, layers)
            print(line(name, rows[name]), flush=True)
        elif name in stored:
            rows[name] = stored[name]
    result = {"command": COMMAND, "versions": versions(), "date": time.strftime("%Y-%m-%d"), "models": rows}
    for path, text in ((args.json, json.dumps(result, indent=1)), (args.markdown, page(result))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n")


def load_zoo() -> tuple[dict[str, Any], Any]:
    """`tests.zoo`, without the root on sys.path, where transformers would take our folder `kernels` for a package."""
    where = {"submodule_search_locations": [str(ROOT / "tests")]}
    spec = importlib.util.spec_from_file_location("tests", ROOT / "tests/__init__.py", **where)
    assert spec is not None and spec.loader is not None
    sys.modules["tests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tests"])
    return importlib.import_module("tests.zoo").ZOO, importlib.import_module("tests.zoo.layers").layers


def measure(entry: Any, layers: Any) -> dict[str, Any]:
    """One row: what each recipe folded, left, and changed."""
    model, inputs = entry.load()
    row: dict[str, Any] = {"kind": entry.kind, "layers": len(layers(model))}
    began = time.perf_counter()
    for name, step in RECIPES.items():
        recipe = {"schemes": {}, "steps": [step]}
        try:
            folded = qfx.quantize(model, recipe, calibration=[inputs], progress=False)
        except qfx.core.errors.CaptureError as e:
            return {**row, "not_captured": str(e), "seconds": time.perf_counter() - began}
        report: Report = folded.qfx.report
        said = {n for fold in report.folds for n in fold.readers} | {m.where for m in report.misses}
        row[name] = {
            "change": change(outputs(model, inputs), outputs(folded, inputs)),
            "folds": [[f.site, f.kind, f.map, f.readers, f.error] for f in report.folds],
            "misses": [[m.where, m.why] for m in report.misses],
            "share": report.share_folded,
            "unnamed": [sorted(names) for names in layers(model) if not names & said],
        }
    return {**row, "seconds": time.perf_counter() - began}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the module itself returns."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def change(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest change of any output relative to its largest value."""
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(want, got, strict=True))


def short(why: str) -> str:
    """A reason in a few words."""
    for pattern, text in REASONS.items():
        if match := re.search(pattern, why):
            return text.format(*match.groups())
    return why


def sites(row: dict[str, Any]) -> int:
    """How many sites were found; what was undone counts."""
    first = row["SmoothQuant"]
    return len(first["folds"]) + sum("undone" in why for _, why in first["misses"])


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    if "not_captured" in row:
        why = row["not_captured"].partition(" in forward: ")[2].partition(" (")[0]
        return f"| {name} | {row['layers']} | – | – | – | 0 % | not captured: {why} | – | {row['seconds']:.1f} |"
    smooth, osplus = row["SmoothQuant"], row["OS+"]
    shifts = sum("Shift" in f[2] for f in osplus["folds"])
    missed = Counter(short(why) for _, why in dict(map(tuple, smooth["misses"])).items())
    reasons = "; ".join(f"{n} {why}" for why, n in missed.most_common())
    cells = [name, row["layers"], sites(row), len(smooth["folds"]), f"{len(osplus['folds'])} ({shifts})"]
    cells += [f"{100 * smooth['share']:.0f} %", reasons or "none"]
    cells += [f"{max(smooth['change'], osplus['change']):.1e}", f"{row['seconds']:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"qfx": qfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "python": platform.python_version()}


def page(result: dict[str, Any]) -> str:
    """docs/architectures.md."""
    rows: dict[str, Any] = result["models"]
    captured = {n: r for n, r in rows.items() if "not_captured" not in r}
    worst = max((r[k]["change"], n, k) for n, r in captured.items() for k in RECIPES)
    folds = [len(r[k]["folds"]) for k in RECIPES for r in captured.values()]
    undone = sum("undone" in why for r in captured.values() for k in RECIPES for _, why in r[k]["misses"])
    unnamed = sum(len(r[k]["unnamed"]) for r in captured.values() for k in RECIPES)
    full = sum(r["SmoothQuant"]["share"] == 1 for r in captured.values())
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    summary = (
        f"**{len(rows)} architectures, {len(captured)} captured; {sum(folds)} folds, {undone} undone; the largest "
        f"change of any output is {worst[0]:.1e} ({worst[2]} on {worst[1]}); {full} models are covered whole; linears "
        f"that are neither folded nor named with a reason: {unnamed}.**"
    )
    legend = (
        f"Made on {result['date']} with {made}, in float32, on one thread. The columns: parameters that some product "
        "reads, found by walking the modules and not the graph; sites; folds of SmoothQuant; folds of Outlier "
        "Suppression+, and how many of them shift; the share of the linears' weights that read a folded site; linears "
        "that are left as they are, by reason; the largest change of the model's output, relative to its largest "
        "value; seconds for both recipes, captures included. Every site and reason by name is in "
        "[architectures.json](../benchmarks/results/architectures.json)."
    )
    about = __doc__.partition("FILE]\n\n")[2].strip()
    text = ["# Architectures: what folds, and why not", "", textwrap.fill(summary, 120), "", about, ""]
    text += [f"    {result['command']}", "", textwrap.fill(legend, 120)]
    head = "| model | linears | sites | SmoothQuant | OS+ (shifts) | weights | left, and why | change | s |"
    for kind, title in KINDS.items():
        of_kind = [line(name, row) for name, row in rows.items() if row["kind"] == kind]
        text += ["", f"## {title}", "", head, "|---" * 9 + "|", *of_kind] if of_kind else []
    return "\n".join(text)


if __name__ == "__main__":
    main()
