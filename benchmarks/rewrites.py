"""What the backend of torch.compile rewrites: the tables of docs/compile.md.

    python benchmarks/rewrites.py [MODEL_DIR ...] [--only NAME ...] [--json FILE] [--markdown FILE]

Each model of the folders, and a BERT with random weights, is compiled with W8A8, and in W4A16 with the layouts of a
GPU: how often each rewrite applied, and what it left, by reason. Each model of tests/zoo is compiled with and without
rewrites: by how much its output differs from that of `qfx.quantize`, and by how many steps of the grid the codes differ
that go into its linears.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import re
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ROOT, load_zoo, outputs
from torch import Tensor, nn

import qfx
from qfx.core.errors import QfxError
from qfx.core.graph import module_paths

SCHEME, WEIGHT_ONLY = "W8A8", "W4A16"
BLOCK = re.compile(r"\d+$")
BEGIN, END = "<!-- rewrites: begin -->", "<!-- rewrites: end -->"
IDS = torch.arange(2 * 24).reshape(2, 24) % 97


def main() -> None:
    """Measures, saves, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="folders of models; stored tables of others are kept")
    parser.add_argument("--only", nargs="*", help="names of models of tests/zoo; the others keep their stored rows")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/rewrites.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/compile.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    zoo, _ = load_zoo()
    stored: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    tables, rows = stored.get("models", {}), stored.get("zoo", {})
    result = {"command": "python benchmarks/rewrites.py MODEL_DIR ...", "versions": versions(), "models": tables}
    result |= {"date": time.strftime("%Y-%m-%d"), "zoo": rows, "block": stored.get("block", {})}
    if args.models:
        config = transformers.BertConfig(num_hidden_layers=4, num_attention_heads=4, hidden_size=256)
        tables |= both("BERT", transformers.BertForMaskedLM(config).eval())
    for folder in args.models:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tables |= both(folder.name, model)
    for name, entry in zoo.items():
        if args.only is None or name in args.only:
            rows[name] = {"kind": entry.kind, **difference(*entry.load())}
            print(line(name, rows[name]), flush=True)
            save(args.json, result)
    result["block"] = block(*zoo["llama"].load())
    save(args.json, result)
    args.markdown.write_text(page(result, args.markdown.read_text()))


def save(path: Path, result: dict[str, Any]) -> None:
    """Keeps what has been measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def both(name: str, model: nn.Module) -> dict[str, Any]:
    """The tables of one model: of its own weights, and lowered as on a GPU with weights of 4 bits."""
    tables = {name: table(model, SCHEME)}
    recipe = {"schemes": {"*": WEIGHT_ONLY}, "ignore": ["@head"]}
    lowered = qfx.quantize(model, recipe, progress=False)
    qfx.lower(lowered, {"input_ids": IDS}, device="cuda")
    return tables | {f"{name}, {WEIGHT_ONLY}": table(lowered, None)}


def table(model: nn.Module, scheme: str | None) -> dict[str, Any]:
    """How often each rewrite applied to one model, and what it left."""
    torch._dynamo.reset()
    chosen = qfx.backend(scheme, then="eager")
    torch.compile(model, backend=chosen, fullgraph=True)(input_ids=IDS)
    (done,) = chosen.rewrites
    return {
        "linears": len(chosen.layers),
        "rewrites": [[r.name, r.changed, Counter(m.why for m in r.misses)] for r in done],
        "ops": [done[scheme is not None].before, done[-1].after],  # a quantized model has its linears merged
    }


def difference(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """One model of the zoo: compiled with and without rewrites, beside the quantized one."""
    codes = importlib.import_module("tests.zoo.codes")
    recipe = {"schemes": {"*": SCHEME}, "ignore": ["@head", "@router"]}
    try:
        quantized = qfx.quantize(model, recipe, [inputs], progress=False)
        want, exact = outputs(quantized, inputs), outputs(model, inputs)
    except QfxError as e:
        return {"note": f"not captured: {str(e).partition(' in forward: ')[2].partition(' (')[0]}"}
    row: dict[str, Any] = {"error": change(exact, want), "note": ""}
    runs = {}
    for name, fuse in (("plain", False), ("fused", True)):
        torch._dynamo.reset()
        runs[name] = codes.Codes()
        chosen = qfx.backend(recipe, then=runs[name], fuse=fuse)
        try:
            row[name] = change(want, outputs(torch.compile(model, backend=chosen), inputs))
        except Exception as e:  # whatever Dynamo or the model raises
            return {**row, "note": f"{type(e).__name__}: {str(e).splitlines()[0]}"}
    found = codes.compare(runs["plain"], runs["fused"])
    row |= {"graphs": chosen.graphs, "linears": len(chosen.layers), "codes": found.codes, "moved": found.moved}
    row |= {"steps": found.steps, "first": found.first, "floats": chosen.floats}
    row["rewrites"] = dict(sum((Counter({r.name: r.changed for r in done}) for done in chosen.rewrites), Counter()))
    return row


def change(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest change of any output relative to its largest value."""
    pairs = [(a, b) for a, b in zip(want, got, strict=True) if a.numel()]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def block(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, list[str]]:
    """The graph of a model's first block, without and with rewrites."""
    codes = importlib.import_module("tests.zoo.codes")
    found = {}
    for name, fuse in (("before", False), ("after", True)):
        torch._dynamo.reset()
        run = codes.Codes()
        outputs(torch.compile(model, backend=qfx.backend(SCHEME, then=run, fuse=fuse)), inputs)
        nodes = [n for n in run.graphs[0].graph.nodes if n.op == "call_function"]
        path = next(p for n in nodes for p in module_paths(n) if BLOCK.search(p))
        found[name] = [text(n) for n in nodes if path in module_paths(n) and not is_part(n)]
    return found


def is_part(node: Any) -> bool:
    """Whether a node only takes one of the results of another."""
    return getattr(node.target, "__name__", "") == "getitem"


def text(node: Any) -> str:
    """A node as a line of Python, with parts of results inside of what reads them."""

    def read(n: Any) -> str:
        return f"{read(n.args[0])}[{n.args[1]}]" if is_part(n) else str(n.name).replace("_default", "")

    given = torch.fx.map_arg(node.args, lambda n: _Name(read(n)))
    shown = ", ".join(str(a) for a in given if a is not None and a != "")
    return f"{read(node)} = {str(node.target).removesuffix('.default')}({shown})"


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"qfx": qfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "python": platform.python_version()}


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table of models."""
    if "fused" not in row:
        return f"| {name} | – | – | – | – | – | {row['note']} |"
    applied = row["rewrites"]
    kinds = ("merge linears", "share codes", "quantize gated products", "end products", "quantize norms")
    counts = " / ".join(str(applied.get(kind, 0)) for kind in kinds)
    moved = f"{row['moved']} of {row['codes']}"
    if row["moved"]:
        moved += f" by {row['steps']}; first {row['first'][0]} by {row['first'][1]}"
    plain = "" if row["plain"] == 0 else f"without rewrites {row['plain']:.1e}"
    cells = [name, row["graphs"], row["linears"], counts, f"{row['error']:.1e}", f"{row['fused']:.1e}", moved, plain]
    return f"| {' | '.join(map(str, cells))} |"


def page(result: dict[str, Any], before: str) -> str:
    """A page with the tables put between its two markers."""
    start, _, rest = before.partition(BEGIN)
    _, found, end = rest.partition(END)
    if not found:
        raise SystemExit(f"rewrites: the page has no {BEGIN} ... {END}")
    made = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        BEGIN,
        textwrap.fill(
            f"Made on {result['date']} with {made}: `{result['command']}`. Columns that name no scheme are {SCHEME}.",
            120,
        ),
        "",
    ]
    models = result["models"]
    names = [name for name, *_ in next(iter(models.values()))["rewrites"]] if models else []
    lines += ["| rewrite | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for name in names:
        cells = ({row[0]: cell(row) for row in m["rewrites"]}.get(name, "before") for m in models.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    totals = (f"{m['ops'][0]} → {m['ops'][1]}" for m in models.values())
    lines += ["| ops that compute, before → after | " + " | ".join(totals) + " |", ""]
    rows = {n: r for n, r in result["zoo"].items() if "fused" in r}
    worst = max(rows.items(), key=lambda item: item[1]["fused"])
    others = [row for row in rows.values() if row["moved"]]
    exact = sum(row["plain"] == 0 for row in rows.values())
    summary = (
        f"**{len(result['zoo'])} architectures, {len(rows)} compiled. Without rewrites, {exact} give the output of "
        f"`qfx.quantize` bit for bit. With rewrites, no code differs in {len(rows) - len(others)} of them; in others "
        f"a difference begins with {max((r['first'][0] for r in others), default=0)} code at most, by "
        f"{max((r['first'][1] for r in others), default=0)} step, in the input of one linear, and what is behind it "
        f"follows. The largest change of any output is {worst[1]['fused']:.1e} ({worst[0]}).**"
    )
    legend = (
        "The columns: graphs of Dynamo's; quantized linears; how often linears were merged / codes shared / gated "
        "products or activation functions quantized / products ended / norms quantized; the change of the output by "
        "the quantization itself, relative to its largest value; the change of the quantized model's output by the "
        "compilation with rewrites; how many codes of the linears' inputs differ, and by how many steps of the grid at "
        "most, in all and in the first input that differs; the change without rewrites where there is one, for which "
        "[Limits](#limits) has the reasons."
    )
    head = "| model | graphs | linears | rewrites | quantization | change | codes | |"
    lines += [textwrap.fill(summary, 120), "", textwrap.fill(legend, 120), "", head, "|---" * 8 + "|"]
    lines += [line(name, row) for name, row in result["zoo"].items()]
    graphs = result["block"]
    for name, other in (("before", "after"), ("after", "before")):
        lines += ["", f"The first block of `llama` {name}:", "", "```text", *short(graphs[name], graphs[other]), "```"]
    return start + "\n".join(lines) + "\n" + END + end


def short(lines: list[str], others: list[str]) -> list[str]:
    """Lines of a graph, without those that the other one has, too, where there are several in a row."""
    shown: list[str] = []
    for known, run in itertools.groupby(lines, others.__contains__):
        kept = list(run)
        shown += [f"... ({len(kept)} lines that are the same)"] if known and len(kept) > 2 else kept
    return shown


def cell(done: list[Any]) -> str:
    """How often a rewrite applied, and why it did not elsewhere."""
    _, changed, misses = done
    return "; ".join([str(changed), *(f"{n} not: {why}" for why, n in misses.items())])


if __name__ == "__main__":
    main()
