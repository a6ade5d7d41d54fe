"""Perplexity of quantized models: the table of docs/results.md.

    python benchmarks/results.py MODEL_DIR [MODEL_DIR ...] --text test.txt --calibration valid.txt [--device cuda]

Every model is measured in float32, then with each recipe. Perplexity: windows of `--window` tokens that overlap by one,
each token after the first predicted once. Results are added to `--json` files, and `--markdown` writes the table from
all that they hold.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qfx
from qfx.data import text_batches
from qfx.evaluate import perplexity

HEAD = ["@head", "@router"]


def recipe(scheme: str, *steps: Any) -> dict[str, Any]:
    """A recipe that quantizes all linears but the output head."""
    return {"schemes": {"*": scheme}, "ignore": HEAD, "steps": list(steps)}


def smooth(**settings: Any) -> dict[str, Any]:
    """A SmoothQuant step."""
    return {"smoothquant": {"alpha": 0.5, **settings}}


OSP = "outlier_suppression_plus"
ALL = {"smooth_o": True, "smooth_down": True}
GPTQ_ORDER = {"gptq": {"act_order": True}}
RECIPES: dict[str, dict[str, Any]] = {
    "W8A8 per-token, RTN": recipe("W8A8", "rtn"),
    "W8A8 per-token, SmoothQuant": recipe("W8A8", smooth(), "rtn"),
    "W8A8 static per-tensor, RTN": recipe("W8A8_STATIC", "rtn"),
    "W8A8 static, per-tensor weights too, RTN": recipe("W8A8_TENSOR_STATIC", "rtn"),
    "W8A8 static, SmoothQuant 0.5": recipe("W8A8_STATIC", smooth(), "rtn"),
    "W8A8 static, SmoothQuant 0.5, all sites": recipe("W8A8_STATIC", smooth(**ALL), "rtn"),
    "W8A8 static, SmoothQuant searched": recipe("W8A8_STATIC", smooth(alpha="search"), "rtn"),
    "W8A8 static, SmoothQuant O3 (per-tensor weights)": recipe("W8A8_TENSOR_STATIC", smooth(), "rtn"),
    "W8A8 static asymmetric, Outlier Suppression": recipe("W8A8_STATIC_ASYM", "outlier_suppression", "rtn"),
    "W8A8 static, Outlier Suppression+": recipe("W8A8_STATIC", OSP, "rtn"),
    "W8A8 static, Outlier Suppression+ with RMSNorm shift": recipe(
        "W8A8_STATIC", {OSP: {"shift_rmsnorm": True}}, "rtn"
    ),
    "W8A8 static, per-tensor weights, Outlier Suppression+": recipe("W8A8_TENSOR_STATIC", OSP, "rtn"),
    "W6A6 static channel, SmoothQuant 0.5": recipe("W6A6_CHANNEL_STATIC", smooth(), "rtn"),
    "W6A6 static channel, Outlier Suppression+": recipe("W6A6_CHANNEL_STATIC", OSP, "rtn"),
    "FP8 static, RTN": recipe("FP8", "rtn"),
    "FP8_DYNAMIC, RTN": recipe("FP8_DYNAMIC", "rtn"),
    "W8A16, RTN": recipe("W8A16", "rtn"),
    "W4A16 g128, RTN": recipe("W4A16", "rtn"),
    "W4A16 g128, RTN with MSE clipping": recipe("W4A16", {"rtn": {"clip": "mse"}}),
    "W4A16 g128, GPTQ": recipe("W4A16", "gptq"),
    "W4A16 g128, GPTQ act_order": recipe("W4A16", GPTQ_ORDER),
    "W4A16 g128, SmoothQuant 0.5 then RTN": recipe("W4A16", smooth(), "rtn"),
    "W4A16 g128, SmoothQuant 0.5 then GPTQ": recipe("W4A16", smooth(), "gptq"),
    "W4A16_ASYM g128, RTN": recipe("W4A16_ASYM", "rtn"),
    "W4A16_ASYM g128, GPTQ": recipe("W4A16_ASYM", "gptq"),
    "W4A16 channel, RTN": recipe("W4A16_CHANNEL", "rtn"),
    "W4A16 channel, GPTQ": recipe("W4A16_CHANNEL", "gptq"),
    "W3A16 g128, RTN": recipe("W3A16", "rtn"),
    "W3A16 g128, GPTQ": recipe("W3A16", "gptq"),
    "W3A16 g128, GPTQ act_order": recipe("W3A16", GPTQ_ORDER),
    "W2A16_ASYM g64, RTN": recipe("W2A16_ASYM_G64", "rtn"),
    "W2A16_ASYM g64, GPTQ act_order": recipe("W2A16_ASYM_G64", GPTQ_ORDER),
    "W4A8 g128, RTN": recipe("W4A8", "rtn"),
    "W4A8 g128, GPTQ": recipe("W4A8", "gptq"),
    "W4A8 g128, SmoothQuant 0.5 then GPTQ": recipe("W4A8", smooth(), "gptq"),
    "W4A8_DQ g128, RTN": recipe("W4A8_DQ", "rtn"),
    "W4A8_DQ g128, GPTQ": recipe("W4A8_DQ", "gptq"),
    "W4A8_DQ g128, SmoothQuant 0.5 then GPTQ": recipe("W4A8_DQ", smooth(), "gptq"),
}


def main() -> None:
    """Runs the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="*")
    ap.add_argument("--text")
    ap.add_argument("--calibration")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--max-windows", type=int)
    ap.add_argument("--samples", type=int, default=128)
    ap.add_argument("--only", default="", help="recipes whose name holds this text")
    ap.add_argument("--json", default="benchmarks/results/perplexity.json")
    ap.add_argument("--markdown", help="write the table of everything in --json here")
    a = ap.parse_args()
    path = Path(a.json)
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if a.models and not (a.text and a.calibration):
        raise SystemExit("results: --text and --calibration are needed to measure a model")
    for folder in a.models:

        def save(result: dict[str, Any], name: str = Path(folder).name) -> None:
            stored[name] = result
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stored, indent=1) + "\n")

        measure(folder, a, save)
    show(stored)
    if a.markdown:
        page = Path(a.markdown)
        page.write_text(markdown(stored, page.read_text()))


def measure(folder: str, a: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Perplexity of one model in float32 and with every recipe, saved after each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(a.device).eval()
    batches = text_batches(a.calibration, tokenizer, sequence=min(a.window, 512), samples=a.samples, batch_size=8)
    batches = [{k: v.to(a.device) for k, v in b.items()} for b in batches]

    def ppl(m: torch.nn.Module) -> float:
        settings = {"window": a.window, "overlap_one": True, "max_windows": a.max_windows, "batch_size": 8}
        return perplexity(m, a.text, tokenizer, progress=False, **settings).value

    gpu = torch.cuda.get_device_name() if a.device.startswith("cuda") else platform.processor() or platform.machine()
    result: dict[str, Any] = {
        "hardware": gpu,
        "versions": {"torch": torch.__version__, "qfx": qfx.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "window": a.window,
        "windows": a.max_windows or "all",
        "samples": a.samples,
        "float": ppl(model),
        "recipes": {},
    }
    print(f"{Path(folder).name}: float {result['float']:.4f}", flush=True)
    for name, spec in RECIPES.items():
        if a.only not in name:
            continue
        began = time.perf_counter()
        try:
            q = qfx.quantize(model, spec, batches, progress=False)
        except qfx.core.errors.QfxError as e:
            result["recipes"][name] = {"error": str(e)}
            print(f"  {name}: {e}", flush=True)
            continue
        seconds = time.perf_counter() - began
        report = q.qfx.report
        worst = max((f.error for f in report.folds), default=None)
        result["recipes"][name] = {
            "perplexity": ppl(q),
            "seconds": seconds,
            "quantized": report.share_quantized,
            "folds": len(report.folds),
            "worst_fold": worst,
            "bytes": report.bytes_after,
            "bytes_float": report.bytes_before,
            "notes": [n for s in report.steps for n in s.notes],
            "warnings": report.warnings,
        }
        print(f"  {name}: {result['recipes'][name]['perplexity']:.4f}  ({seconds:.1f} s)", flush=True)
        save(result)


def _cell(model: dict[str, Any], name: str) -> str:
    found = model["recipes"].get(name)
    if found is None:
        return ""
    if "error" in found:
        return "refused"
    value = found["perplexity"]
    change = 100 * (value / model["float"] - 1)
    text = f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    return f"{text} ({change:+.2f} %)" if math.isfinite(change) and abs(change) < 1000 else text


def show(stored: dict[str, Any]) -> None:
    """The table on the terminal."""
    table = Table("recipe", *stored, title="perplexity (change against float32)")
    table.add_row("float32", *(f"{m['float']:.3f}" for m in stored.values()))
    for name in RECIPES:
        table.add_row(name, *(_cell(m, name) for m in stored.values()))
    Console(width=60 + 26 * len(stored)).print(table)


BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def markdown(stored: dict[str, Any], page: str) -> str:
    """A page with the table, and what it was measured on, put between its two markers."""
    first = next(iter(stored.values()))
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    lines = [
        BEGIN,
        f"Hardware: {first['hardware']}; {versions}; {first['date']}. Windows of {first['window']} tokens "
        f"({first['windows']}), {first['samples']} calibration windows.",
        "",
        "| recipe | " + " | ".join(stored) + " |",
        "|---|" + "---|" * len(stored),
        "| float32 | " + " | ".join(f"{m['float']:.3f}" for m in stored.values()) + " |",
        *(f"| {name} | " + " | ".join(_cell(m, name) for m in stored.values()) + " |" for name in RECIPES),
        "",
    ]
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"results: the page has no {BEGIN} ... {END}")
    return before + "\n".join(lines) + END + after


if __name__ == "__main__":
    main()
