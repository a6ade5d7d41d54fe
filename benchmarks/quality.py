"""Perplexity with the ops' PyTorch bodies and with their GPU kernels: the kernels must not change what a model says.

    python benchmarks/quality.py MODEL_DIR [MODEL_DIR ...] --text test.txt [--device cuda]

Every model is quantized in bf16 by each scheme, rounded to nearest without data. One measurement takes the model
restored from lowering, with every op computed by its PyTorch body on the same GPU; the other takes it lowered. Exits
with 1 if two perplexities differ by more than `--most` percent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qfx
from qfx.evaluate import perplexity
from qfx.kernels.reference import reference_bodies
from qfx.lowering import lower, restore

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from bench import timing  # noqa: E402

del sys.path[0]  # other libraries look for a package `kernels`, and would find kernels.py

SCHEMES = ["W8A8", "FP8_DYNAMIC", "W4A16", "W4A16_ASYM", "W4A8", "W4AFP8"]


def measure(folder: str, a: argparse.Namespace) -> dict[str, Any]:
    """Both perplexities of one model in every scheme."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(a.device).eval()

    def ppl(m: nn.Module) -> float:
        settings = {"window": a.window, "overlap_one": True, "max_windows": a.max_windows, "batch_size": 8}
        return perplexity(m, a.text, tokenizer, progress=False, **settings).value

    result: dict[str, Any] = {"bf16": ppl(model), "schemes": {}}
    print(f"{Path(folder).name}: bf16 {result['bf16']:.5f}", flush=True)
    for scheme in a.schemes:
        began = time.perf_counter()
        recipe = {"schemes": {"*": scheme}, "ignore": ["@head", "@router"], "steps": ["rtn"]}
        quantized = qfx.quantize(model, recipe, progress=False)
        restore(quantized)
        with reference_bodies():
            reference = ppl(quantized)
        report = lower(quantized)
        kernels = ppl(quantized)
        row = {
            "reference": reference,
            "kernels": kernels,
            "percent": 100 * (kernels / reference - 1),
            "layers": report.kernels(),
            "merged": len(report.groups),
            "without_kernel": [m.name for m in report.layers if not m.reason.startswith("a GPU kernel")],
            "notes": report.notes,
            "seconds": time.perf_counter() - began,
        }
        result["schemes"][scheme] = row
        values = f"{reference:.5f} and {kernels:.5f}, {row['percent']:+.5f} %"
        print(f"  {scheme}: {values}; {report.headline()}", flush=True)
        del quantized
    return result


def show(stored: dict[str, Any], most: float) -> None:
    """The table on the terminal."""
    table = Table("model", "scheme", "reference", "kernels", "difference", "layers", title="perplexity")
    for name, model in stored.items():
        table.add_row(name, "bf16", f"{model['bf16']:.4f}", "", "", "")
        for scheme, row in model["schemes"].items():
            layers = ", ".join(f"{count} × {kernel}" for kernel, count in row["layers"].items())
            change = f"{row['percent']:+.4f} %" + ("" if abs(row["percent"]) <= most else " !")
            table.add_row(name, scheme, f"{row['reference']:.4f}", f"{row['kernels']:.4f}", change, layers)
    Console(width=120).print(table)


def main() -> None:
    """Runs the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="+")
    ap.add_argument("--text", required=True)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--schemes", nargs="*", default=SCHEMES)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--max-windows", type=int)
    ap.add_argument("--most", type=float, default=0.05, help="percent by which two perplexities may differ")
    ap.add_argument("--out", default="benchmarks/results/quality.json")
    a = ap.parse_args()
    stored: dict[str, Any] = {}
    path, about = Path(a.out), timing.environment()
    about |= {"device": a.device, "window": a.window, "windows": a.max_windows or "all"}
    for folder in a.models:
        stored[Path(folder).name] = measure(folder, a)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "models": stored}, indent=1) + "\n")
    show(stored, a.most)
    without = [
        f"{name} {scheme}: {layer}"
        for name, model in stored.items()
        for scheme, row in model["schemes"].items()
        for layer in row["without_kernel"]
    ]
    if without and a.device.startswith("cuda"):  # there would be nothing to compare
        raise SystemExit(f"quality: layers without a GPU kernel: {'; '.join(without)}")
    over = [
        f"{name} {scheme}: {row['percent']:+.4f} %"
        for name, model in stored.items()
        for scheme, row in model["schemes"].items()
        if not abs(row["percent"]) <= a.most
    ]
    if over:
        raise SystemExit(f"quality: more than {a.most} %: {'; '.join(over)}")


if __name__ == "__main__":
    main()
