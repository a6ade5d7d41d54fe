"""What a user hands to `quantize`: checks of the model, and the calibration set as inputs by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qfx.passes.discover.capture import input_names

from . import data as _data
from .core.errors import CalibrationError, RecipeError
from .package import Quantized
from .recipes import Recipe


def check_model(model: nn.Module) -> None:
    """Raises with advice if the weights cannot be worked on."""
    if not isinstance(model, nn.Module):
        raise RecipeError(f"quantize: model is a {type(model).__name__}, not a torch.nn.Module")
    done = getattr(model, "qfx", None)
    if isinstance(done, Quantized) and done.report.share_quantized:
        raise RecipeError("quantize: the model is quantized already; start from the float model")
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.device.type == "meta":
            raise RecipeError(f"quantize: {name} is on the meta device and has no values; load the weights first")
        if p.dtype == torch.float16 and p.device.type == "cpu":
            raise RecipeError(
                f"quantize: {name} is float16 on the CPU, where it is slow and overflows; use model.float() or "
                "model.bfloat16(), or move the model to a GPU"
            )
        # a buffer may be infinite: masks are
        broken = not bool(p.isfinite().all()) if isinstance(p, nn.Parameter) else bool(p.isnan().any())
        if broken:
            raise RecipeError(f"quantize: {name} has NaN or infinite values; the checkpoint is damaged")


def feeds_of(model: nn.Module, calibration: Any, recipe: Recipe) -> list[dict[str, Tensor]]:
    """The calibration set as inputs by name; tensors go to the model's first input."""
    if calibration is None:
        if recipe.needs_data:
            who = ", ".join(s.name for s in recipe.steps if s.needs_data) or "static inputs"
            raise CalibrationError(f"calibration: the recipe measures activations ({who}); pass calibration=batches")
        calibration = [_dummy(model)]
    names = input_names(model)
    batches = _data.batches(calibration)
    main = getattr(model, "main_input_name", None)
    first = main if isinstance(main, str) and main in names else (names[0] if names else "input")
    feeds = []
    for i, batch in enumerate(batches):
        if set(batch) == {"input_ids"} and "input_ids" not in names:
            batch = {first: batch["input_ids"]}
        if unknown := sorted(set(batch) - set(names)):
            if "labels" in unknown:
                unknown.remove("labels")
            if unknown:
                raise CalibrationError(
                    f"calibration: batch {i} has {', '.join(unknown)}, which "
                    f"{type(model).__name__}.forward does not take"
                )
        feeds.append({k: v.to(device_of(model)) for k, v in batch.items() if k != "labels"})
    return feeds


def _dummy(model: nn.Module) -> dict[str, Tensor]:
    """Token ids for a language model, where no data are needed but the graph is."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if "input_ids" not in input_names(model) or not isinstance(vocabulary, int):
        raise CalibrationError("calibration: pass one batch, so that the model's inputs are known")
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
