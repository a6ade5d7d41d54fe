"""The command `qfx`: quantize, eval, export, explain, inspect, recipes.

torch and transformers are imported inside the commands, so that `qfx --help` comes at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .core.errors import CalibrationError, PackageError, QfxError

if TYPE_CHECKING:
    from torch import nn

    from .recipes import Recipe

app = typer.Typer(
    name="qfx",
    help="Quantizes transformers: folds that are proved on the model's own graph, and a report of what was not done.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelDir = Annotated[Path, typer.Argument(help="Folder of a Hugging Face model.", show_default=False)]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A preset (see `qfx recipes`) or a YAML file.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16. auto: the checkpoint's, but no float16 on a CPU.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every layer, fold and miss.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Quantizes transformers: folds that are proved on the model's own graph, and a report of what was not done."""
    if version:
        typer.echo(f"qfx {__version__}")
        raise typer.Exit()


GroupSize = Annotated[
    int | None,
    typer.Option(help="Weights that share a scale, where the recipe has groups.", show_default="the recipe's"),
]


@app.command()
def quantize(
    model_dir: ModelDir,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="UTF-8 text, for recipes that measure activations.")
    ] = None,
    group_size: GroupSize = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 64,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default="512, or what the model takes")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a saved model in the output folder.")] = False,
    format: Annotated[
        str, typer.Option(help="qfx, or for other engines: compressed-tensors, gptq, gptq_v2, awq or bitsandbytes.")
    ] = "qfx",
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder for solved layers: the same command goes on there after an interruption."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Quantize a model, print the report, and save the model."""
    with _errors():
        loaded = _recipe(recipe, group_size)
        _check_output(output, overwrite)
        _check_format(format)
        if calibration is None and loaded.needs_data:
            raise CalibrationError(
                f"calibration: the recipe {recipe} measures activations; give --calibration text.txt"
            )
        if calibration is not None and not calibration.is_file():
            raise CalibrationError(f"calibration: there is no file {calibration}")
        from . import checkpoints
        from .package import save
        from .quantize import quantize as run
        from .report import render

        model = _float_model(model_dir, dtype, device)
        with contextlib.suppress(QfxError) if calibration is None else contextlib.nullcontext():
            tokenizer = None
            tokenizer = checkpoints.load_tokenizer(model_dir)
        batches = _batches(model, calibration, tokenizer, sequence, samples, seed, batch_size) if calibration else None
        quantized = run(model, loaded, batches, resume=resume)
        _out().print(render(quantized.qfx.report, verbose))  # type: ignore[union-attr,arg-type]
        save(quantized, output, format=format, tokenizer=tokenizer, overwrite=overwrite)
        _out().print(Text(f"\nsaved to {output}", style="bold"))


@app.command(name="eval")
def evaluate(
    model_dir: Annotated[
        Path, typer.Argument(help="A Hugging Face model, quantized or not, or an exported one.", show_default=False)
    ],
    text: Annotated[Path, typer.Option("--text", "-t", help="UTF-8 text to measure on.", show_default=False)],
    window: Annotated[
        int | None, typer.Option(help="Tokens fed at once.", show_default="512, or what the model takes")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward.")] = 4,
    max_windows: Annotated[int | None, typer.Option(help="The first windows only.", show_default="all")] = None,
    overlap_one: Annotated[bool, typer.Option("--overlap-one", help="Count each token but the first once.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Measure the perplexity of a causal language model on a text."""
    with _errors():
        if not text.is_file():
            raise QfxError(f"perplexity: there is no file {text}")
        from . import checkpoints
        from .evaluate import default_window, perplexity

        model = _any_model(model_dir, dtype, device)
        tokenizer = checkpoints.load_tokenizer(model_dir)
        size = window or default_window(model)
        found = perplexity(
            model, text, tokenizer, window=size, batch_size=batch_size, max_windows=max_windows, overlap_one=overlap_one
        )
        protocol = "overlapping by one token" if overlap_one else "each predicting its own tokens but the first"
        _out().print(Text(f"perplexity {found.value:.4f}", style="bold"))
        _out().print(
            f"{found.tokens:,} tokens in {found.windows:,} windows of {size}, {protocol}; {found.seconds:.1f} s"
        )


@app.command()
def export(
    model_dir: Annotated[Path, typer.Argument(help="A folder that `qfx quantize` wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    target: Annotated[str, typer.Option("--target", "-t", help="ort-cpu, ort-cuda or tensorrt.")] = "ort-cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float16, of the float parts.", show_default="the target's own")
    ] = None,
    opset: Annotated[int, typer.Option(help="Of ai.onnx, 21 to 25.")] = 21,
    accuracy_level: Annotated[
        int, typer.Option(help="Of weight-only linears on a CPU: 0 computes in float, 4 in int8.")
    ] = 0,
    cache: Annotated[
        bool | None, typer.Option("--cache/--no-cache", help="Keys and values.", show_default="if it has them")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what qfx wrote there.")] = False,
) -> None:
    """Export a quantized model to ONNX, checked in ONNX Runtime."""
    with _errors():
        _check_output(output, overwrite)
        from . import checkpoints
        from .export import onnx
        from .package import is_checkpoint, load

        if not (checkpoints.is_quantized(model_dir) or is_checkpoint(model_dir)):
            raise QfxError(f"export: {model_dir} is not a quantized model; `qfx quantize` writes one")
        tokenizer = None
        with contextlib.suppress(QfxError):
            tokenizer = checkpoints.load_tokenizer(model_dir)
        done = onnx(
            load(model_dir, lower=False),
            output,
            target=target,
            dtype=dtype,
            opset=opset,
            accuracy_level=accuracy_level,
            cache=cache,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )
        _out().print(Text(str(done)), soft_wrap=True)


@app.command()
def explain(
    model_dir: ModelDir,
    recipe: RecipeOption,
    group_size: GroupSize = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Print what a recipe would do to a model. Measures and solves nothing, and needs no calibration text."""
    with _errors():
        loaded = _recipe(recipe, group_size)
        from .explanation import explain as run

        _out().print(run(_float_model(model_dir, dtype, device), loaded).render(verbose))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of a quantized model.", show_default=False)],
    verbose: Verbose = False,
) -> None:
    """Print the report and the contents of a saved or exported model, without loading its weights."""
    with _errors():
        from .inspection import inspect as run

        _out().print(run(folder, verbose))


@app.command()
def recipes() -> None:
    """List the presets: their schemes, steps, and what they keep in float."""
    with _errors():
        from .inspection import list_recipes

        _out().print(list_recipes())


def _recipe(name: str, group_size: int | None) -> Recipe:
    from .recipes import Recipe

    recipe = Recipe.load(name)
    return recipe if group_size is None else recipe.with_group(group_size)


def _float_model(folder: Path, dtype: str, device: str) -> nn.Module:
    from . import checkpoints

    if checkpoints.is_quantized(folder):
        raise QfxError(f"model: {folder} is quantized already (see `qfx inspect {folder}`); give the float model")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn about is an error, or a remark of ours
    model, notes = checkpoints.load_model(folder, dtype, device)
    for note in notes:
        _err().print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    return model


def _any_model(folder: Path, dtype: str, device: str) -> Any:
    """A causal language model: float, quantized, or exported to ONNX."""
    from . import checkpoints
    from .package import is_checkpoint, load

    if (folder / "model.onnx").is_file():
        from .export import OnnxModel

        return OnnxModel(folder)
    saved = checkpoints.is_quantized(folder) or is_checkpoint(folder)
    model: Any = load(folder, device=device) if saved else _float_model(folder, dtype, device)
    if not getattr(model, "can_generate", bool)() or model.config.is_encoder_decoder:
        raise QfxError(f"perplexity: {type(model).__name__} is not a causal language model")
    return model


def _batches(  # the arguments are the command's own
    model: nn.Module, text: Path, tokenizer: Any, sequence: int | None, samples: int, seed: int, batch_size: int
) -> list[Any]:
    from .data import text_batches
    from .evaluate import default_window, positions

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise CalibrationError(
            f"calibration: {type(model).__name__} takes {model.main_input_name}, not text; use qfx.quantize in Python"
        )
    size, limit = sequence or default_window(model), positions(model)
    if limit is not None and size > limit:
        raise CalibrationError(f"calibration: sequence {size}; the model has {limit} positions, use {limit} or fewer")
    return text_batches(text, tokenizer, sequence=size, samples=samples, seed=seed, batch_size=batch_size)


def _check_output(folder: Path, overwrite: bool) -> None:
    """Before the work: `save` would refuse after it."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not overwrite:
        raise PackageError(f"save: {folder} exists; choose another --output, or --overwrite to replace a saved model")


def _check_format(name: str) -> None:
    """Before the work, too."""
    from .package import format_names

    if name not in (names := format_names()):
        raise PackageError(f"save: there is no format {name!r}; use {', '.join(names)}")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """An error of qfx is one red line and exit code 1; an interrupt is exit code 130."""
    try:
        yield
    except QfxError as e:
        _err().print(Text(f"error: {e}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _err().print(Text("interrupted: nothing was saved", style="red"))
        raise typer.Exit(130) from None


def _out() -> Console:
    return Console(width=None if _terminal() else 120)


def _err() -> Console:
    return Console(stderr=True)


def _terminal() -> bool:
    return Console().is_terminal or "COLUMNS" in os.environ
