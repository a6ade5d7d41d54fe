"""Quantized ONNX in ONNX Runtime beside the quantized models that it came from: the tables of docs/onnx.md.

    python benchmarks/onnx_export.py matrix [--only llama]
    python benchmarks/onnx_export.py models MODEL_DIR ... --text test.txt --calibration valid.txt [--max-windows N]
    python benchmarks/onnx_export.py markdown docs/onnx.md

`matrix`: every scheme for every target on tiny random models of six architectures, float parts in the target's dtype.
`models`: perplexity of whole models by both, greedy generation with the cache, sizes and fused ops.
Results go to benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench.hardware import cpu

import qfx
import qfx.export
from qfx.core.errors import QfxError
from qfx.data import text_batches
from qfx.evaluate import perplexity
from qfx.export.onnx_graph import graphs
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.forms import forms_of
from qfx.export.onnx_graph.lower import plan
from qfx.export.onnx_graph.opaque import quantized_linears
from qfx.export.onnx_graph.targets import TARGETS as TARGETS_OF

RESULTS = Path("benchmarks/results/onnx.json")
TARGETS = tuple(TARGETS_OF)
TINY = ("llama", "opt", "qwen2", "qwen3", "gpt2", "bert", "vit")
SCHEMES = (
    "W8A8_STATIC",
    "W8A8_STATIC_ASYM",
    "W8A8",
    "W8A16",
    "W8A16_G32",
    "W4A16_G32",
    "W4A16_ASYM_G32",
    "W4A16_CHANNEL",
    "W3A16_G32",
    "W2A16_ASYM_G32",
    "FP8",
    "FP8_DYNAMIC",
    "NF4_G32",
    "NF4_DQ_G32",
    "FP4_G32",
    "W4A8_G32",
)
MIXED = "mixed: W8A8_STATIC, down W4A16_G32"
WHOLE: dict[str, dict[str, Any]] = {
    "W4A16, GPTQ act_order": {"schemes": {"*": "W4A16"}, "steps": [{"gptq": {"act_order": True}}]},
    "W8A8_STATIC, SmoothQuant": {"schemes": {"*": "W8A8_STATIC"}, "steps": ["smoothquant"]},
    "W8A8, SmoothQuant": {"schemes": {"*": "W8A8"}, "steps": ["smoothquant"]},
    "W8A8_STATIC_ASYM, OS+": {"schemes": {"*": "W8A8_STATIC_ASYM"}, "steps": ["outlier_suppression_plus"]},
    "NF4": {"schemes": {"*": "NF4"}},
    "FP8": {"schemes": {"*": "FP8"}},
}
NEW = 24
"""Tokens that are generated."""


def main() -> None:
    """Runs one of the parts."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("part", choices=("matrix", "models", "markdown"))
    ap.add_argument("paths", nargs="*")
    ap.add_argument("--only", default="")
    ap.add_argument("--text")
    ap.add_argument("--calibration")
    ap.add_argument("--max-windows", type=int)
    a = ap.parse_args()
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if a.part == "matrix":
        for name in a.only.split(",") if a.only else TINY:
            _save("matrix", matrix(name))
    elif a.part == "models":
        if not (a.text and a.calibration and a.paths):
            raise SystemExit("onnx_export: models needs folders, --text and --calibration")
        for folder in a.paths:
            for recipe in (name for name in WHOLE if a.only in name):
                windows = f"{a.max_windows} windows" if a.max_windows else "all windows"
                _save("models", {f"{Path(folder).name} | {recipe} | {windows}": whole(folder, recipe, a)})
    else:
        for page in map(Path, a.paths):
            page.write_text(_put(page.read_text(), stored))


def matrix(name: str) -> dict[str, Any]:
    """Relative differences, or refusals, of a tiny model with every scheme and target; it is captured twice only."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.zoo import ZOO

    found: dict[str, Any] = {}
    model, example = ZOO[name].load()
    captured: dict[str, tuple[Any, bytes]] = {}
    for label in (*SCHEMES, MIXED):
        schemes = {"*": "W8A8_STATIC", "*down_proj": "W4A16_G32", "*fc2": "W4A16_G32"} if label == MIXED else None
        wanted = {k: v for k, v in (schemes or {"*": label}).items() if _matches(model, k)}
        if label == MIXED and len(wanted) == 1:
            continue
        q = qfx.quantize(model, {"schemes": wanted, "ignore": ["@head"]}, [example], progress=False)
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as made:
                row = found[f"{name} | {label} | {target}"] = _one(q, example, Path(made), target, captured)
            print(f"{name:8} {label:36} {target:9} {row}", flush=True)
    return found


def _matches(model: torch.nn.Module, pattern: str) -> bool:
    return any(name.endswith(pattern.lstrip("*")) for name, _ in model.named_modules())


def _one(q: Any, example: Any, folder: Path, target: str, captured: dict[str, tuple[Any, bytes]]) -> dict[str, Any]:
    """What `qfx.export.onnx` does, all checks included, with a capture of the float parts that is made once."""
    import onnx
    import onnx_ir as ir

    dtype = TARGETS_OF[target][0]
    linears = quantized_linears(q)
    try:
        choices = plan(linears, target, dtype)
    except QfxError as e:
        return {"refused": str(e).partition(" | ")[0].rpartition(": ")[2]}
    if dtype not in captured:
        with torch.no_grad():
            form = forms_of(q, example, False)[0]
        captured[dtype] = form, ir.to_proto(capture(q, form, getattr(torch, dtype), 21)).SerializeToString()
    form, data = captured[dtype]
    done = qfx.export.OnnxExport(folder, target, dtype, 21)
    names = graphs.features(choices)
    graph = ir.from_proto(onnx.load_from_string(data))
    written = graphs.write_captured(graph, folder, q, form, choices, done, names, True)
    return {"error": written.error, "expected": written.expected, "dtype": dtype, "notes": done.notes}


def whole(folder: str, name: str, a: argparse.Namespace) -> dict[str, Any]:
    """A trained model with one recipe, in ONNX Runtime on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = text_batches(a.calibration, tokenizer, sequence=256, samples=16, batch_size=8)
    settings: dict[str, Any] = {"window": 512, "overlap_one": True, "max_windows": a.max_windows, "batch_size": 4}
    q: Any = qfx.quantize(model, {**WHOLE[name], "ignore": ["@head"]}, batches, progress=False)
    with tempfile.TemporaryDirectory() as made:
        done = qfx.export.onnx(q, Path(made) / "out", tokenizer=tokenizer)
        ort = qfx.export.OnnxModel(done.folder)
        prompt = batches[0]["input_ids"][:1, :16]
        want = q.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
        got = ort.generate(prompt, NEW)
        values, seconds, others = {}, {}, {}
        for target in TARGETS[1:]:
            try:
                others[target] = qfx.export.onnx(q, Path(made) / target, target=target).graphs[0].error
            except QfxError as e:
                others[target] = str(e).partition(" | ")[0].rpartition(": ")[2]
        for who, what in (("qfx", q), ("ort", ort), ("eager", q)):
            if who == "eager":  # the same model with another order of sums: what rounding alone changes
                q.set_attn_implementation("eager")
                other = q.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
            began = time.perf_counter()
            values[who] = perplexity(what, a.text, tokenizer, progress=False, **settings).value
            seconds[who] = time.perf_counter() - began
        row = {
            "perplexity": values,
            "change": values["ort"] / values["qfx"] - 1,
            "change_eager": values["eager"] / values["qfx"] - 1,
            "seconds": seconds,
            "same_tokens": int((want[0, 16:] == got[0, 16:]).sum()),
            "same_tokens_eager": int((want[0, 16:] == other[0, 16:]).sum()),
            "tokens": NEW,
            "others": others,
            "expected": done.graphs[0].expected,
            "linears": len(done.layers),
            "error": done.graphs[0].error,
            "bytes": done.bytes,
            "bytes_qfx": q.qfx.report.bytes_after,
        }
    print(f"{Path(folder).name} {name}: {row}", flush=True)
    return row


def _save(part: str, rows: dict[str, Any]) -> None:
    import onnxruntime
    import transformers

    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    versions |= {"transformers": transformers.__version__, "qfx": qfx.__version__}
    stored[part] = {
        "hardware": f"{cpu()}, {torch.get_num_threads()} threads",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "rows": {**stored.get(part, {}).get("rows", {}), **rows},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


def _put(page: str, stored: dict[str, Any]) -> str:
    for part, table in (("matrix", _matrix_table), ("models", _models_table)):
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise SystemExit(f"onnx_export: the page has no {begin} ... {end}")
        made = stored[part]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        head = f"{made['hardware']}; {versions}; {made['date']}."
        page = before + "\n".join([begin, head, "", *table(made["rows"]), end]) + after
    return page


def _matrix_table(rows: dict[str, Any]) -> list[str]:
    """Schemes by targets: the worst model's difference, or why the target refuses."""
    lines = ["| scheme | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for label in (*SCHEMES, MIXED):
        cells = []
        for target in TARGETS:
            found = [v for k, v in rows.items() if k.endswith(f"| {label} | {target}")]
            errors = [v["error"] for v in found if v.get("error") is not None]
            refused = sorted({v["refused"] for v in found if "refused" in v})
            ops = sorted({op for v in found if "expected" in v for op in v["expected"]})
            text = f"{max(errors):.1e} ({len(errors)})" if errors else ""
            unrun = sum(1 for v in found if "error" in v and v["error"] is None)
            text += f" written, no CPU kernel ({unrun})" if unrun else ""
            text += f" {', '.join(ops)}" if ops else ""
            text += f" refused ({sum('refused' in v for v in found)}): {refused[0]}" if refused else ""
            cells.append(text.strip())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


COLUMNS = (
    *(
        "model",
        "recipe",
        "text",
        "perplexity, qfx",
        "ONNX Runtime",
        "change",
        "eager attention",
        "same tokens",
        "eager's",
    ),
    *("nodes", "bytes / qfx's", "s / qfx's", "ort-cuda", "tensorrt"),
)


def _models_table(rows: dict[str, Any]) -> list[str]:
    lines = [_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for key, v in rows.items():
        values, ops = v["perplexity"], ", ".join(f"{n} {op}" for op, n in v["expected"].items()) or "-"
        cells = [
            *key.split(" | "),
            f"{values['qfx']:.4f}",
            f"{values['ort']:.4f}",
            f"{100 * v['change']:+.3f} %",
            f"{100 * v['change_eager']:+.3f} %",
            f"{v['same_tokens']} of {v['tokens']}",
            f"{v['same_tokens_eager']} of {v['tokens']}",
            f"{ops} of {v['linears']}",
            f"{v['bytes'] / v['bytes_qfx']:.3f}",
            f"{v['seconds']['ort'] / v['seconds']['qfx']:.2f}",
            *("not run" if e is None else e if isinstance(e, str) else f"{e:.1e}" for e in v["others"].values()),
        ]
        lines.append(_row(cells))
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
