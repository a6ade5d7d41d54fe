"""Perplexity of a causal language model, by the protocol of GPTQ (Frantar et al., 2022)."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.errors import QfxError
from qfx.data import read_text, token_ids

ROWS = 2048
"""Predictions whose logits are cast to float32 at a time: [4, 2048, 128256] are 4.2 GB."""
WINDOW = 512
"""Tokens in a window where nobody says how many."""


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        value: exp of the mean negative log-likelihood of a token.
        tokens: predictions that were counted.
        windows: windows that were fed.
        seconds: wall-clock time.
    """

    value: float
    tokens: int
    windows: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.tokens:,} tokens in {self.windows:,} windows)"


def perplexity(
    model: Callable[..., Any],
    ids_or_text: Tensor | list[int] | str | Path,
    tokenizer: Any = None,
    *,
    window: int = 2048,
    batch_size: int = 4,
    max_windows: int | None = None,
    overlap_one: bool = False,
    progress: bool = True,
) -> Perplexity:
    """Measures `exp(mean NLL)` over windows of a text; what is left after the last is not counted.

    Each window of `window` tokens is fed alone and predicts its own next tokens, which makes
    `window - 1` predictions: the first token of a window is never predicted. With `overlap_one`,
    windows of `window + 1` tokens overlap by one token: `window` of them are fed, and all `window`
    next tokens are predicted, so that every token of the text but the first counts once. Figures of
    different windows, tokenizers, or protocols are not comparable.

    Args:
        model: takes `input_ids` int64 `[batch, window]` and gives logits `[batch, window, vocab]`,
            as an attribute `logits`, first in a tuple, or alone. Run in evaluation mode.
        ids_or_text: token ids `[tokens]` or `[1, tokens]`, a text, or a file of text.
        tokenizer: for a text; special tokens are not added.
        window: tokens that are fed at once.
        batch_size: windows in a forward.
        max_windows: the first windows only.
        overlap_one: see above.
        progress: show a bar on a terminal's stderr.

    Raises:
        QfxError: the text is empty or shorter than a window, the window is longer than the model's
            positions, or the loss is not finite.
    """
    limit = positions(model)
    if limit is not None and window > limit:
        raise QfxError(f"perplexity: window {window}; the model has {limit} positions, use {limit}")
    if batch_size < 1:
        raise QfxError(f"perplexity: batch_size is {batch_size}; use at least 1")
    windows = _windows(_ids(ids_or_text, tokenizer), window, overlap_one, max_windows)
    begin, total, done = time.perf_counter(), 0.0, 0
    console = Console(stderr=True)
    columns = ("perplexity", MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[now]}")
    shown = progress and console.is_terminal
    with (
        torch.inference_mode(),
        _evaluating(model) as (device, options),
        Progress(*columns, console=console, disable=not shown, transient=True) as bar,
    ):
        task = bar.add_task("", total=len(windows), now="")
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            fed = batch[:, :window]
            loss = _loss(_logits(model(input_ids=fed, **options)), batch[:, 1:])
            if not math.isfinite(loss):
                raise QfxError(
                    f"perplexity: the loss of windows {done} to {done + len(batch) - 1} is {loss}; "
                    "the model gives logits that are NaN or infinite"
                )
            total, done = total + loss, done + len(batch)
            tokens = done * (windows.shape[1] - 1)
            bar.update(task, completed=done, now=f"{_exp(total / tokens):.3f}")
    return Perplexity(_exp(total / tokens), tokens, done, time.perf_counter() - begin)


def _ids(ids_or_text: Tensor | list[int] | str | Path, tokenizer: Any) -> Tensor:
    """Token ids int64 `[tokens]`."""
    if isinstance(ids_or_text, str | Path):
        if tokenizer is None:
            raise QfxError("perplexity: a text needs a tokenizer; pass one, or pass token ids")
        return token_ids(read_text(ids_or_text), tokenizer)
    ids = torch.as_tensor(ids_or_text)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise QfxError(f"perplexity: token ids are integers [tokens] or [1, tokens], not {ids.dtype} {list(ids.shape)}")
    return ids.long()


def _windows(ids: Tensor, window: int, overlap_one: bool, most: int | None) -> Tensor:
    """Cuts ids into `[windows, window]`, or `[windows, window + 1]` overlapping by one."""
    if window < 1 + (not overlap_one) or (most is not None and most < 1):
        raise QfxError(f"perplexity: window {window}, max_windows {most}; use at least 2 and 1")
    if not len(ids):
        raise QfxError("perplexity: the text is empty")
    size = window + overlap_one
    if len(ids) < size:
        raise QfxError(f"perplexity: {len(ids)} tokens, a window takes {size}; use a shorter window")
    return ids.unfold(0, size, window)[:most]


def default_window(model: Any) -> int:
    """`WINDOW`, or the number of the model's positions if it has fewer."""
    limit = positions(model)
    return WINDOW if limit is None else min(WINDOW, limit)


def positions(model: Any) -> int | None:
    """How many positions the model has, if its config says so."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def _evaluating(model: Any) -> Iterator[tuple[torch.device, dict[str, bool]]]:
    """Yields the model's device and options; its modules are in evaluation mode meanwhile."""
    forward = model.forward if isinstance(model, nn.Module) else model
    options = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}
    if not isinstance(model, nn.Module):
        yield torch.device("cpu"), options
        return
    # Not model.eval(): exported modules refuse it, and .train() would not restore a frozen part.
    modes = [(module, module.training) for module in model.modules()]
    tensor = next((t for part in (model.parameters(), model.buffers()) for t in part), None)
    try:
        for module, _ in modes:
            module.training = False
        yield torch.device("cpu") if tensor is None else tensor.device, options
    finally:
        for module, training in modes:
            module.training = training


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _loss(logits: Tensor, targets: Tensor) -> float:
    """The summed negative log-likelihood of targets `[batch, n]`; logits past n are not used."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, wanted in zip(logits, targets.to(logits.device), strict=True):
        for row, target in zip(rows[: len(wanted)].split(ROWS), wanted.split(ROWS), strict=True):
            total += F.cross_entropy(row.float(), target, reduction="sum")
    return float(total)


def _exp(loss: float) -> float:
    """A broken model's loss may be over 709."""
    return math.exp(loss) if loss < 709 else math.inf
