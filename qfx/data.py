"""Calibration data: batches as the model's keyword arguments, from whatever holds them.

Everything is looked at before the model runs: what calibration cannot use is an error that says
which batch is at fault, not a wrong scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import CalibrationError

Batch = dict[str, Tensor]


def batches(data: Any, *, max_batches: int | None = None) -> list[Batch]:
    """Lists calibration batches.

    Args:
        data: an iterable (also a DataLoader) of dicts of tensors, taken as they are, or of input
            ids, integer tensors `[batch, sequence]` or `[sequence]`, alone or in a list of one.
            One dict, or one tensor, is one batch.
        max_batches: takes no more than these, and asks the iterable for no more.

    Returns:
        The keyword arguments of each forward, each with at least one tensor.

    Raises:
        CalibrationError: there is no batch; or one is of another type, is empty, or has values
            that are NaN or infinite. The message has its index and the argument's name.
    """
    if max_batches is not None and max_batches < 1:
        raise CalibrationError(f"calibration: max_batches is {max_batches}; use at least 1, or None")
    if isinstance(data, str | bytes | Path):
        raise CalibrationError("calibration: data is text; use text_batches(text, tokenizer)")
    if isinstance(data, Mapping | Tensor):
        data = [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(f"calibration: data is of type {type(data).__name__}; pass an iterable of batches")
    found = [_batch(i, item) for i, item in enumerate(islice(data, max_batches))]
    if not found:
        raise CalibrationError(
            "calibration: no batches; pass some, or a recipe that needs none (weight-only rtn, "
            "dynamic activation scales). An iterator that was read before is empty."
        )
    return found


def _batch(i: int, item: Any) -> Batch:
    """Checks one batch and names its tensors."""
    if isinstance(item, list | tuple) and len(item) == 1:
        item = item[0]  # as a DataLoader of a TensorDataset gives it
    if isinstance(item, Tensor):
        if item.is_floating_point() or item.dim() not in (1, 2):
            raise CalibrationError(
                f"calibration: batch {i} is a tensor {item.dtype} {list(item.shape)} without a "
                "name; only input ids (integers, [batch, sequence]) need none: pass a dict"
            )
        item = {"input_ids": item if item.dim() == 2 else item[None]}
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"calibration: batch {i} is of type {type(item).__name__}; pass a dict of tensors, or a tensor of input ids"
        )
    if not item:
        raise CalibrationError(f"calibration: batch {i} has no tensors; drop it")
    for key, value in item.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CalibrationError(
                f"calibration: batch {i}: {key!r} is of type {type(value).__name__}; a batch maps "
                "names of arguments to tensors (tokenizers need return_tensors='pt')"
            )
        if not value.numel():
            raise CalibrationError(f"calibration: batch {i}: {key!r} is empty, {list(value.shape)}; drop the batch")
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise CalibrationError(
                f"calibration: batch {i}: {bad} of {value.numel()} values of {key!r} are NaN or "
                "infinite; repair or drop the batch"
            )
    return dict(item)


def text_batches(
    text_or_path: str | Path,
    tokenizer: Any,
    *,
    sequence: int = 512,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 1,
) -> list[Batch]:
    """Windows of a text at random places, without special tokens and without padding.

    Args:
        text_or_path: the text, or the name of a UTF-8 file that exists.
        tokenizer: of transformers or of tokenizers.
        sequence: tokens in a window.
        samples: windows; fewer if the text has not that many different ones.
        seed: chooses the places.
        batch_size: windows in a batch; the last batch may have fewer.

    Returns:
        Batches `{"input_ids": int64 [batch_size, sequence]}`.

    Raises:
        CalibrationError: the text is shorter than a window, or a number is not positive.
    """
    for name, value in (("sequence", sequence), ("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"calibration: {name} is {value}; use at least 1")
    ids = token_ids(read_text(text_or_path), tokenizer)
    places = len(ids) - sequence + 1
    if places < 1:
        what = f"{str(text_or_path)[:40]!r} as text" if isinstance(text_or_path, str) else "the file"
        raise CalibrationError(
            f"calibration: {what} has {len(ids)} tokens and a window {sequence}; give more text, or a shorter sequence"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = torch.randperm(places, generator=generator, device="cpu")[:samples]
    windows = ids.unfold(0, sequence, 1)[starts]
    return [{"input_ids": part} for part in windows.split(batch_size)]


def read_text(text_or_path: str | Path) -> str:
    """The text itself, or what a UTF-8 file holds; a string is a name if there is such a file."""
    path = Path(text_or_path)
    if isinstance(text_or_path, str):
        try:
            if "\n" in text_or_path or not path.is_file():
                return text_or_path
        except (OSError, ValueError):  # too long for a name, or has a null character
            return text_or_path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"calibration: cannot read {path} as UTF-8 text: {e}") from None


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """The tokens of a text, int64 `[tokens]`, without special tokens and without truncation."""
    if callable(tokenizer):  # of transformers; verbose would warn that the text is long
        encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        ids = encoded["input_ids"]
    else:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
