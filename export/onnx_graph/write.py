"""`qfx.export.onnx`: a folder that ONNX Runtime or TensorRT serves, checked before it appears."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx._folder import EXPORTED, describe_files, staged
from qfx._manifest import one_line, versions
from qfx._side_files import write_configs, write_report, write_tokenizer
from qfx.core.errors import PackageError
from qfx.export.onnx_graph.forms import forms_of
from qfx.export.onnx_graph.opaque import quantized_linears

Progress = Callable[[str, int, int], None]
OPSET = 21
"""The default: the first with blocks and 4 bits, and one that TensorRT 10 and ONNX Runtime from 1.18 take."""


@dataclass
class Graph:
    """One exported file.

    Attributes:
        file: its name.
        inputs: names, with the names or sizes of their axes.
        outputs: likewise.
        expected: how many nodes compute quantized linears, by type, after ONNX Runtime's fusions.
        error: relative difference to the model in ONNX Runtime on the CPU, in the 2-norm; None if it was not run.
    """

    file: str
    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]
    expected: dict[str, int]
    error: float | None = None


@dataclass
class OnnxExport:
    """What was written.

    Attributes:
        folder: where.
        target: for what.
        dtype: of the float parts.
        opset: of ai.onnx.
        graphs: the files.
        layers: scheme, first node, and note of each quantized linear.
        session_options: what a session on a CPU should be opened with.
        notes: what was not checked, or has no cache, and why.
        bytes: of the graphs and their weights.
        seconds: taken.
    """

    folder: Path
    target: str
    dtype: str
    opset: int
    graphs: list[Graph] = field(default_factory=list)
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    session_options: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        counts: dict[tuple[str, str], int] = {}
        for layer in self.layers.values():
            key = layer["scheme"], layer["node"]
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{self.folder}: {self.target}, {self.dtype}, opset {self.opset}, {self.bytes:,} bytes"]
        lines += [f"  {count} linears of {scheme} as {node}" for (scheme, node), count in counts.items()]
        for graph in self.graphs:
            error = "not run" if graph.error is None else f"differs from the model by {graph.error:.1e} in ONNX Runtime"
            lines.append(f"  {graph.file}: {', '.join(graph.inputs)[:80]} -> {', '.join(graph.outputs)[:60]}; {error}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def onnx(
    model: nn.Module,
    folder: str | Path,
    *,
    target: str = "ort-cpu",
    example: Mapping[str, Tensor] | None = None,
    cache: bool | None = None,
    dtype: str | None = None,
    opset: int = OPSET,
    accuracy_level: int = 0,
    tokenizer: Any = None,
    overwrite: bool = True,
    check: bool = True,
    progress: Progress | None = None,
) -> OnnxExport:
    """Exports a quantized model to ONNX.

    The folder holds `model.onnx` with its weights in `model.onnx_data` (encoder-decoders: `encoder_model.onnx` and
    `decoder_model.onnx`), the configs and the tokenizer, for decoders with a cache `genai_config.json`, and
    `qfx_quant.json`, which says what was done. It appears when it is whole and checked.

    Args:
        model: what `qfx.quantize` or `qfx.load` gave; it is not changed.
        folder: where to. What is there is replaced if qfx wrote it.
        target: "ort-cpu", "ort-cuda" or "tensorrt".
        example: one batch, inputs by name, for models that do not take `input_ids`.
        cache: whether a decoder takes and gives keys and values; None: if it can, else `notes` says why not.
        dtype: of the float parts, "float32" or "float16"; None: the target's own.
        opset: of ai.onnx, 21 to 25.
        accuracy_level: of weights of 2 to 8 bits with float inputs on a CPU: 0 computes in float, as the model does; 4
            rounds the inputs to int8 in blocks, for speed.
        tokenizer: as `qfx.save` takes it.
        overwrite: False raises if there is an exported or saved model.
        check: validate, lint, and, where onnxruntime is installed, run the files and count what it fuses.
        progress: gets (what, done, total).

    Raises:
        PackageError, CaptureError: the target has no nodes for a scheme (with the nearest that it has), the model does
            not export, a check fails, or the folder cannot be written; nothing is written then.
    """
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    asked = Asked(target, dtype or "", opset, accuracy_level, cache, check)
    try:
        done = _export(model, Path(folder), asked, example, tokenizer, overwrite, progress or _silent)
    except PackageError as e:
        raise PackageError(f"export: {folder}: {e}") from e.__cause__
    except OSError as e:
        raise PackageError(f"export: {folder}: {e.strerror or one_line(e)}; what was there is as it was") from e
    done.seconds = time.perf_counter() - began
    return done


@dataclass(frozen=True)
class Asked:
    """The arguments of `onnx` of those names."""

    target: str
    dtype: str
    opset: int
    accuracy_level: int
    cache: bool | None
    check: bool

    def checked(self) -> Asked:
        """With the target's own dtype if none was given.

        Raises:
            PackageError: one is not among those that there are.
        """
        from qfx.export.onnx_graph.capture import OPSETS
        from qfx.export.onnx_graph.targets import TARGETS

        if self.target not in TARGETS:
            raise PackageError(f"there is no target {self.target!r}; use {', '.join(TARGETS)}")
        if self.opset not in OPSETS:
            raise PackageError(f"opset {self.opset} is not one of {OPSETS[0]} to {OPSETS[-1]}; {OPSET} is the safest")
        known = TARGETS[self.target]
        if self.dtype and self.dtype not in known:
            raise PackageError(f"{self.target} takes no {self.dtype}; use {' or '.join(known)}")
        if self.accuracy_level not in range(5):
            raise PackageError(f"accuracy_level {self.accuracy_level!r} is not one of 0 to 4; 0 is float, 4 is int8")
        return replace(self, dtype=self.dtype or known[0])


def _export(
    model: Any,
    folder: Path,
    asked: Asked,
    example: Mapping[str, Tensor] | None,
    tokenizer: Any,
    overwrite: bool,
    show: Progress,
) -> OnnxExport:
    _needs_packages()
    from qfx.export.onnx_graph import graphs
    from qfx.export.onnx_graph.genai import write_genai
    from qfx.export.onnx_graph.lower import plan

    info = getattr(model, "qfx", None)
    if info is None:
        raise PackageError(f"this {type(model).__name__} has no .qfx; give the model that qfx.quantize returned")
    asked = asked.checked()
    linears = quantized_linears(model)
    if not linears:
        raise PackageError("the model has no quantized linear; export a float model with torch.onnx.export")
    choices = plan(linears, asked.target, asked.dtype, asked.accuracy_level)
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            forms = forms_of(model, example or example_of(model, info.example), asked.cache)
        done = OnnxExport(folder, asked.target, asked.dtype, asked.opset)
        done.layers = {name: choice.describe() for name, choice in choices.items()}
        done.notes = sorted({c.note for c in choices.values() if c.note})
        features = graphs.features(choices)
        done.session_options = graphs.options(features)
        with staged(folder, overwrite) as made:
            write_tokenizer(made, tokenizer)
            write_configs(made, model)
            for i, form in enumerate(forms):
                show("export", i, len(forms))
                graph, exported = graphs.write(made, model, form, choices, done, features, asked.check)
                done.graphs.append(graph)
                if exported.cache:
                    write_genai(made, model, exported)
            show("export", len(forms), len(forms))
            write_report(made, info.report)
            done.bytes = sum(p.stat().st_size for p in made.iterdir() if ".onnx" in p.name)
            _describe(made, done, asked)
    finally:
        model.train(was)
    return done


def _silent(what: str, done: int, total: int) -> None:
    pass


def example_of(model: Any, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Inputs of the shapes that the model was captured with."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("input_ids") and isinstance(vocabulary, int):
            small = [min(shape[0], 2), min(shape[1], 16)]
            made[name] = torch.randint(0, vocabulary, small, generator=generator)
        elif name.endswith("mask"):
            made[name] = torch.ones(min(shape[0], 2), min(shape[1], 16), dtype=torch.int64)
        elif name.endswith("_ids") or not shape:
            raise PackageError(f"what {name} may hold is not known; pass example= with one batch")
        else:
            made[name] = torch.randn(min(shape[0], 2), *shape[1:], generator=generator)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in made.items()}


def _describe(made: Path, done: OnnxExport, asked: Asked) -> None:
    data = {k: v for k, v in asdict(done).items() if k not in ("folder", "bytes", "seconds")}
    data |= {"format": 1, "kind": "onnx", "accuracy_level": asked.accuracy_level, "versions": versions() | _versions()}
    data["files"] = {name: entry.model_dump(mode="json") for name, entry in describe_files(made).items()}
    (made / EXPORTED).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for name in ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _needs_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise PackageError(f'{e.name} is not installed; pip install "qfx[onnx]"') from None
