"""Checkpoints for other engines, as transformers loads them, beside their models: the tables of docs/checkpoints.md.

    TORCHDYNAMO_DISABLE=1 python benchmarks/checkpoints.py tiny [--only gptq]
    python benchmarks/checkpoints.py models MODEL_DIR ... --text calibration.txt
    python benchmarks/checkpoints.py markdown docs/checkpoints.md

`tiny`: every format and scheme on tiny random models. `models`: some of them on whole models. Each is saved, loaded by
transformers with the format's own packages on the CPU in float32, and run: how far are its logits from those of the
model that was saved? A package that is not there gives a row that says so. The variable saves
GPTQModel's compilations. Results go to benchmarks/results/checkpoints.json. It fails if transformers does not load a
folder whole.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qfx
from qfx.core.errors import PackageError
from qfx.core.spec import parse_scheme
from qfx.data import text_batches
from qfx.modules.linear import QLinear

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.export.checkpoints.models import distance, logits, quantized, wide
from tests.zoo import ZOO

RESULTS = Path("benchmarks/results/checkpoints.json")
TINY = ("llama", "qwen2", "opt")
NEEDS = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "gptq_v2": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
}
"""What transformers loads a format with."""
VERSIONS = ("torch", "transformers", "compressed-tensors", "gptqmodel", "optimum", "bitsandbytes", "accelerate", "qfx")
ORDER = ({"gptq": {"act_order": True}},)


class Case(NamedTuple):
    """A row of a table."""

    format: str
    scheme: str
    steps: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        """As the table has it."""
        return f"{self.format} | {self.scheme}{', GPTQ act_order' if self.steps else ''}"


CASES = (
    *(Case("compressed-tensors", s) for s in ("W2A16_G32", "W4A16_G32", "W4A16_ASYM_G32", "W4A16_CHANNEL", "W8A16")),
    *(Case("compressed-tensors", s) for s in ("W8A16_ASYM_G32", "W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A8", "W4A8_G32")),
    *(Case("compressed-tensors", s) for s in ("FP8", "FP8_DYNAMIC")),
    *(Case("gptq", s) for s in ("W2A16_G32", "W3A16_G32", "W4A16_G32", "W4A16_CHANNEL", "W8A16_G32")),
    Case("gptq", "W4A16_G32", ORDER),
    *(Case("gptq_v2", s) for s in ("W2A16_ASYM_G32", "W4A16_ASYM_G32")),
    *(Case("awq", s) for s in ("W4A16_G32", "W4A16_ASYM_G32", "W4A16_CHANNEL")),
    *(Case("bitsandbytes", s) for s in ("NF4_G32", "NF4_DQ_G32", "FP4_BNB_G32", "W8A8")),
)
WHOLE = (
    *(Case("compressed-tensors", s) for s in ("W4A16", "W8A8_STATIC")),
    *(Case("gptq", "W4A16", steps) for steps in ((), ORDER)),
    Case("awq", "W4A16_ASYM"),
    Case("bitsandbytes", "NF4"),
)


def main() -> None:
    """Runs one of the parts."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("part", choices=("tiny", "models", "markdown"))
    ap.add_argument("paths", nargs="*")
    ap.add_argument("--only", default="", help="formats, with commas")
    ap.add_argument("--text", help="UTF-8 text: of inputs, and of calibration")
    a = ap.parse_args()
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if a.part == "markdown":
        for page in map(Path, a.paths):
            page.write_text(_put(page.read_text(), stored))
        return
    if a.part == "models" and not (a.text and a.paths):
        raise SystemExit("checkpoints: models needs folders and --text")
    rows = stored.get(a.part, {}).get("rows", {})
    for name, model, batches, tokenizer in _models(a):
        for case in CASES if a.part == "tiny" else WHOLE:
            if a.only and case.format not in a.only.split(","):
                continue
            rows[f"{name} | {case.label}"] = row = _row(name, case, model, batches, tokenizer)
            print(f"{name:12} {case.label:42} {row}", flush=True)
            _save(stored, a.part, rows)
    if failed := [name for name, row in rows.items() if "failed" in row]:
        raise SystemExit(f"checkpoints: transformers does not load {', '.join(failed)}")


def _models(a: argparse.Namespace) -> Any:
    """Names, float models, batches for calibration and at last one for the comparison, tokenizers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if a.part == "tiny":
        for name in TINY:
            model, example = ZOO[name].load()
            yield name, model, [example, example], None
        return
    for folder in map(Path, a.paths):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        yield folder.name, model, text_batches(a.text, tokenizer, sequence=256, samples=34, batch_size=2), tokenizer


def _row(name: str, case: Case, model: nn.Module, batches: list[dict[str, Tensor]], tokenizer: Any) -> dict[str, Any]:
    """Differences of logits, all relative, or why there are none."""
    if lacking := [name for name in NEEDS[case.format] if importlib.util.find_spec(name) is None]:
        return {"missing": lacking}
    *calibration, inputs = batches
    x = parse_scheme(case.scheme).input
    if name in TINY and not case.steps and (x is None or x.dynamic):
        ours = quantized(name, case.scheme)  # what quantize gives, without its capture
    else:
        recipe = {"schemes": {"*": case.scheme}, "steps": list(case.steps), "ignore": ["@head"]}
        ours = qfx.quantize(model, recipe, calibration, progress=False)
    with tempfile.TemporaryDirectory() as made:
        try:
            qfx.save(ours, Path(made) / "out", format=case.format, tokenizer=tokenizer)
        except PackageError as e:
            return {"refused": str(e).rpartition(": ")[2]}
        theirs, wrong = _load(case, Path(made) / "out")
        if wrong:
            return {"failed": wrong}
        # some packages work in the folder until the model has run
        got, want = logits(theirs, inputs), logits(ours, inputs)
    return {
        "norm": distance(got, want),
        "max": float((got - want).abs().max() / want.abs().max()),
        "linear": _worst_linear(case, theirs, ours),
        "last_bits": _last_bits(ours, inputs, want),
        "float": distance(logits(model, inputs), want),
    }


def _load(case: Case, folder: Path) -> tuple[Any, str]:
    """The folder's model as transformers builds it, and what it says that is wrong."""
    from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig

    settings: dict[str, Any] = {}
    if case.format == "compressed-tensors" and not parse_scheme(case.scheme).weight.symmetric:
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif case.format in ("gptq", "gptq_v2"):  # these two say with which kernel, and nothing else
        settings["quantization_config"] = GPTQConfig(bits=4, backend="torch")
    elif case.format == "awq":
        settings["quantization_config"] = AwqConfig(backend="torch_awq")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **settings
        )
    except Exception as e:
        return None, f"{type(e).__name__}: {str(e).splitlines()[0]}"
    wrong = {
        k: sorted(map(str, info[k]))[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]
    }
    return model.eval(), str(wrong) if wrong else ""


def _worst_linear(case: Case, theirs: nn.Module, ours: nn.Module) -> float:
    """The largest difference of one linear's outputs, where qfx computes as the reader does on a CPU.

    GPTQModel rounds scales, weights and biases to float16. compressed-tensors has integer inputs down to -128, and
    divides dynamic ones by 127.5. Inputs are in float16, to which AWQ's kernel and LLM.int8 cast them.
    """
    found = []
    for path, module in (wide(ours) if case.format == "compressed-tensors" else ours).named_modules():
        if isinstance(module, QLinear):
            x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0)).half().float()
            with torch.no_grad():
                found.append(distance(theirs.get_submodule(path)(x), _compute(case, module, x)))
    return max(found)


def _compute(case: Case, module: QLinear, x: Tensor) -> Tensor:
    if case.format in ("compressed-tensors", "bitsandbytes"):
        return module(x)  # type: ignore[no-any-return]
    q = module.qtensor()
    weight = replace(q, scale=q.scale.half().float()).dequantize().half().float()
    bias = None if module.bias is None else module.bias.half().float()
    return nn.functional.linear(x, weight, bias)


def _last_bits(model: nn.Module, inputs: dict[str, Tensor], want: Tensor) -> float:
    """How far the logits go if each quantized linear's outputs are off by some 2^-22 of themselves."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return out * (1 + 2**-22 * torch.randn(out.shape, generator=generator))

    hooks = [m.register_forward_hook(disturb) for m in model.modules() if isinstance(m, QLinear)]
    try:
        return distance(logits(model, inputs), want)
    finally:
        for hook in hooks:
            hook.remove()


def _save(stored: dict[str, Any], part: str, rows: dict[str, Any]) -> None:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    hardware = f"CPU with {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    stored[part] = {"hardware": hardware, "versions": versions, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


def _put(page: str, stored: dict[str, Any]) -> str:
    for part, cases in (("tiny", CASES), ("models", WHOLE)):
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise SystemExit(f"checkpoints: the page has no {begin} ... {end}")
        made = stored[part]
        versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        head = f"{made['hardware']}; {versions}; {made['date']}."
        page = before + "\n".join([begin, head, "", *_table(made["rows"], cases), end]) + after
    return page


def _table(rows: dict[str, Any], cases: tuple[Case, ...]) -> list[str]:
    names = list(dict.fromkeys(key.split(" | ")[0] for key in rows))
    head = ["format", "scheme", *names, "one linear", "last bits", "float model"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        found = [rows.get(f"{name} | {case.label}", {}) for name in names]
        near, bits, far = ([row[k] for row in found if k in row] for k in ("linear", "last_bits", "float"))
        ends = (
            (f"{max(near):.1e}" if max(near) else "0", f"{max(bits):.1e}", f"{min(far):.1e}")
            if near
            else ("-", "-", "-")
        )
        lines.append("| " + " | ".join((case.label, *map(_cell, found), *ends)) + " |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"not installed: {', '.join(row['missing'])}"
    if "norm" in row:
        return "0" if row["max"] == 0 else f"{row['norm']:.1e}, {row['max']:.1e}"
    return next((f"{key}: {row[key].partition(';')[0]}" for key in ("refused", "failed") if key in row), "not run")


if __name__ == "__main__":
    main()
