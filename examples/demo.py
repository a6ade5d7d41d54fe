"""`make demo`: quantizes a small trained model with eight recipes, and prints what each of them costs.

Everything is in the package (`qfx.assets`), so nothing is downloaded. It takes less than two minutes on two CPU cores.
The exit code is not zero if a number is not what it should be.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On a busy machine a thread that spins while it waits takes the core from the one it waits for: 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import qfx
from qfx.assets import demo_calibration, demo_model, demo_text
from qfx.data import text_batches
from qfx.evaluate import Perplexity, perplexity

WINDOW, WINDOWS = 512, 48
CALIBRATION = {"samples": 32, "sequence": 256, "batch_size": 4}
PROMPTS = ("The town is located in the", "In 1998 , the band released")
SAVED = "w4a16 g64, gptq"


def groups_of_64(bits: int, *steps: Any) -> dict[str, Any]:
    """A weight-only recipe; the model has 192 channels, which groups of 128 do not divide."""
    return {"schemes": {"*": f"W{bits}A16_G64"}, "steps": list(steps), "ignore": ["@head"]}


GPTQ = {"gptq": {"act_order": True}}
RECIPES: dict[str, Any] = {
    "w8a8-static": "w8a8-static",
    "w8a8-smoothquant": "w8a8-smoothquant",
    "w8a8-static-osplus": "w8a8-static-osplus",
    "fp8-dynamic": "fp8-dynamic",
    "w4a16 g64, rtn": groups_of_64(4, "rtn"),
    SAVED: groups_of_64(4, GPTQ),
    "w3a16 g64, rtn": groups_of_64(3, "rtn"),
    "w3a16 g64, gptq": groups_of_64(3, GPTQ),
}
MOST = {"w8a8": 1.02, "fp8-": 1.02, "w4a1": 1.10, "w3a1": 1.40}
"""The largest perplexity over the float model's, by a recipe's first letters: above what is measured, below broken."""


def main() -> int:
    """Runs the demo; returns the exit code."""
    began, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 120)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    calibration = text_batches(demo_calibration(), tokenizer, **CALIBRATION)

    def measure(model: nn.Module) -> Perplexity:
        return perplexity(model, demo_text(), tokenizer, window=WINDOW, max_windows=WINDOWS, progress=False)

    quantized, found = {}, {}
    with console.status("measuring the float model") as status:
        base = measure(model)
        for name, recipe in RECIPES.items():
            status.update(f"{name}: quantizing")
            quantized[name] = qfx.quantize(model, recipe, calibration, progress=False)
            status.update(f"{name}: measuring")
            found[name] = measure(quantized[name])
        console.print(table(model, base, quantized, found))
        status.update("generating, saving and loading")
        wrong = problems(base, quantized, found)
        wrong += generate_and_reload(console, quantized[SAVED], model, tokenizer, calibration[0])
    console.print(Text("\nThe report of w8a8-smoothquant, as print(model.qfx.report) gives it:", style="bold"))
    console.print(Text(str(quantized["w8a8-smoothquant"].qfx.report)), soft_wrap=True)
    for problem in wrong:
        console.print(Text(f"error: {problem}", style="red"))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    threads = f"{torch.get_num_threads()} threads on {platform.machine()}"
    console.print(Text(f"\n{threads}, {versions}: {time.perf_counter() - began:.0f} s"), soft_wrap=True)
    return 1 if wrong else 0


def table(model: nn.Module, base: Perplexity, quantized: dict[str, Any], found: dict[str, Perplexity]) -> Table:
    """One row for each recipe."""
    title = f"wiki-demo ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters) on WikiText-2"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.caption = f"Perplexity of {base.tokens:,} tokens in windows of {WINDOW}; MB of all parameters and scales."
    shown.caption_justify = "left"
    for column in ("perplexity", "", "MB", "linears", "weights", "bits", "folds", "worst error", "seconds"):
        if column == "perplexity":
            shown.add_column("recipe", no_wrap=True)
        shown.add_column(column, justify="right", no_wrap=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    shown.add_row("float32", f"{base.value:.3f}", "", f"{size:.2f}", "-", "-", "32", "-", "-", "-")
    for name, result in found.items():
        report = quantized[name].qfx.report
        done = [layer for layer in report.layers if layer.scheme]
        bits = sum(layer.bits * layer.weights for layer in done) / sum(layer.weights for layer in done)
        worst = max((fold.error for fold in report.folds), default=None)
        shown.add_row(
            name,
            f"{result.value:.3f}",
            f"{100 * (result.value / base.value - 1):+.2f} %",
            f"{report.bytes_after / 1e6:.2f}",
            f"{len(done)} of {len(report.layers)}",
            f"{100 * report.share_quantized:.1f} %",
            f"{bits:.2f}",
            str(len(report.folds)) if report.folds else "-",
            "-" if worst is None else f"{worst:.1e}",
            f"{report.seconds:.1f}",
        )
    return shown


def problems(base: Perplexity, quantized: dict[str, Any], found: dict[str, Perplexity]) -> list[str]:
    """What is not as it should be."""
    wrong = []
    for name, result in found.items():
        if not result.value <= MOST[name[:4]] * base.value:
            wrong.append(f"{name}: perplexity {result.value:.3f}, float {base.value:.3f}")
    for bits in (3, 4):
        rtn, gptq = found[f"w{bits}a16 g64, rtn"].value, found[f"w{bits}a16 g64, gptq"].value
        if gptq >= rtn:
            wrong.append(f"{bits} bits: GPTQ ({gptq:.3f}) is not better than round-to-nearest ({rtn:.3f})")
    for name in ("w8a8-smoothquant", "w8a8-static-osplus"):
        if not quantized[name].qfx.report.folds:
            wrong.append(f"{name}: nothing was folded")
    return wrong


@torch.no_grad()
def generate_and_reload(console: Console, model: Any, original: Any, tokenizer: Any, batch: dict) -> list[str]:
    """Shows what the float and the quantized model write, and that the saved model is the same one."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        qfx.save(model, folder, tokenizer=tokenizer)
        loaded: Any = qfx.load(folder)
        stored = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print()
    same = torch.equal(model(**batch).logits, loaded(**batch).logits)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        written = {
            who: m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            for who, m in (("float", original), (SAVED, model), ("loaded", loaded))
        }
        same = same and torch.equal(written[SAVED], written["loaded"])
        for who in ("float", SAVED):
            text = tokenizer.decode(written[who][0], skip_special_tokens=True)
            console.print(Text(f"{who:>{len(SAVED)}}: {' '.join(text.split())}"), soft_wrap=True)
    verdict = "the same logits and the same tokens" if same else "NOT the same"
    console.print(Text(f"\nsaved ({stored:.2f} MB with the tokenizer) and loaded: {verdict}"))
    return [] if same else ["the loaded model is not the one that was saved"]


if __name__ == "__main__":
    sys.exit(main())
