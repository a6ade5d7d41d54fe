"""An exported decoder as a callable: token ids to logits, and greedy generation with its cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qfx._folder import EXPORTED
from qfx._manifest import CONFIG, one_line
from qfx.core.errors import PackageError
from qfx.export.onnx_graph.forms import MODEL
from qfx.export.onnx_graph.numerics import open_session


class OnnxModel:
    """A folder that `qfx.export.onnx` wrote, in ONNX Runtime; `qfx.evaluate.perplexity` takes it as a model.

    Attributes:
        session: ONNX Runtime's.
        config: what config.json says, as attributes.

    Args:
        folder: with `model.onnx`.
        providers: ONNX Runtime's execution providers, the first that takes a node runs it.
        options: entries of the session's configuration, beside those that `qfx_quant.json` names.

    Raises:
        PackageError: it is no such folder, the file has no `input_ids` and `logits`, or ONNX Runtime is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        try:
            said = json.loads((self.folder / EXPORTED).read_text(encoding="utf-8"))
            wanted: dict[str, str] = dict(said["session_options"])
            config = self.folder / CONFIG
            self.config = SimpleNamespace(**json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {})
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise PackageError(f"{folder} is not a folder of qfx.export.onnx ({one_line(e)})") from None
        path = self.folder / f"{MODEL}.onnx"
        self.session: Any = open_session(path, {**wanted, **(options or {})}, providers)
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        if "input_ids" not in self._inputs or "logits" not in self._outputs:
            raise PackageError(f"{path} has no input_ids or no logits; it is not a language model")

    @property
    def has_cache(self) -> bool:
        """Whether the file takes and gives keys and values."""
        return any(name.startswith("past_key_values.") for name in self._inputs)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[batch, sequence, vocabulary]`, float32, of ids `[batch, sequence]` without a past.

        Args:
            input_ids: tokens.
            attention_mask: 0 for padding, on the left or right; where the file takes positions, the first token has 0.
        """
        ids = input_ids.cpu().numpy().astype(np.int64)
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        return torch.from_numpy(self._run(ids, mask, self._empty(len(ids)))["logits"].astype(np.float32))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
        """Greedy continuation: ids `[batch, sequence + max_new_tokens]`, with the cache if the file has one.

        Args:
            input_ids: prompts.
            max_new_tokens: how many to add.
            attention_mask: 0 for padding, which is on the left.
        """
        ids = input_ids.cpu().numpy().astype(np.int64)
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        past, feed = self._empty(len(ids)), ids
        for _ in range(max_new_tokens):
            out = self._run(feed, mask, past)
            token = out["logits"][:, -1:].argmax(-1).astype(np.int64)
            ids, mask = np.concatenate([ids, token], 1), np.concatenate([mask, np.ones_like(token)], 1)
            if self.has_cache:
                past = {k.replace("present", "past_key_values", 1): v for k, v in out.items() if k != "logits"}
            feed = token if self.has_cache else ids
        return torch.from_numpy(ids)

    def _run(self, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run; the mask is of the past and the ids."""
        # as transformers' generate: padding does not count
        positions = np.ascontiguousarray(np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :])
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        values = self.session.run(None, {k: v for k, v in feeds.items() if k in self._inputs})
        return dict(zip(self._outputs, values, strict=True))

    def _empty(self, batch: int) -> dict[str, np.ndarray]:
        """A past of no tokens."""
        made = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, size = value.shape
                kind = np.float16 if "float16" in value.type else np.float32
                made[name] = np.zeros((batch, heads, 0, size), kind)
        return made
