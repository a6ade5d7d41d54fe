"""Statistics of an activation, measured in shards that merge: batches, workers and ranks alike.

A statistic sees a value `x [..., channels]` as tokens `[n, channels]` and keeps a bounded summary.
`update` adds a batch, `merge` adds another statistic of the same value, `value` reads the summary.
Whatever the shards, merging them equals one pass, exactly or to float rounding; what depends on the
order of batches says so and takes its shards in that order. Extremes are kept in float32 and sums
in float64 (the Hessian's in float32 unless asked), whatever the dtype of the activation.

This file has the interface; `stats` has the statistics of channels, `ranges` those of one range for
the whole tensor, `samples` those that keep some tokens.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from qfx.core.errors import CalibrationError


class Range(NamedTuple):
    """The lowest and the highest value: float32, 0-dim or `[channels]`."""

    lo: Tensor
    hi: Tensor


class Means(NamedTuple):
    """Averages over tokens, float32 `[channels]`: of x, and of |x|."""

    mean: Tensor
    absolute: Tensor


@dataclass(eq=False)
class Statistic(ABC):
    """A mergeable summary of one value.

    Attributes:
        count: tokens seen so far.
    """

    count: int = field(default=0, init=False)

    def update(self, x: Tensor) -> None:
        """Adds the tokens of one batch; a batch without tokens (an idle expert) changes nothing.

        Args:
            x: `[..., channels]`, of any floating dtype, on any device.

        Raises:
            CalibrationError: x is not floating, has NaN or infinite values, or has another number
                of channels than before.
        """
        name = type(self).__name__
        if not (x.is_floating_point() and x.dim()):
            raise CalibrationError(
                f"{name}: an activation is a float tensor [..., channels], not {x.dtype} {list(x.shape)}"
            )
        if not x.numel():
            return
        # A summary made inside inference_mode could not be merged outside of it.
        with torch.inference_mode(False), torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            finite = rows.isfinite()
            if not finite.all():
                raise CalibrationError(
                    f"{name}: {rows.numel() - int(finite.sum())} of {rows.numel()} calibration "
                    "values are NaN or infinite; check the batches, or run the model in float32"
                )
            self._add(rows)
        self.count += len(rows)

    def merge(self, other: Self) -> None:
        """Adds what another statistic has seen; `other` is unchanged.

        Raises:
            TypeError: `other` is of another class, or has other settings.
        """
        if type(other) is not type(self) or other.settings() != self.settings():
            raise TypeError(f"{self!r} cannot merge {other!r}; both need one class and one setting")
        if other.count and not self.count:
            vars(self).update(copy.deepcopy(vars(other)))
        elif other.count:
            self._merge(other)
            self.count += other.count

    @abstractmethod
    def value(self) -> Any:
        """The summary; CalibrationError if no token was seen."""

    @abstractmethod
    def _add(self, rows: Tensor) -> None:
        """Adds finite tokens `[n, channels]`, n > 0; `count` is raised afterwards."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Adds a statistic of which both have seen tokens; `count` is raised afterwards."""

    def settings(self) -> dict[str, object]:
        """What must agree for a merge."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.compare}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"{type(self).__name__}({given})"

    def _check_seen(self) -> None:
        if not self.count:
            raise CalibrationError(
                f"{type(self).__name__}: no token reached this value in calibration; "
                "give more batches, or leave the layer in float"
            )

    def _check_channels(self, mine: Tensor, theirs: int) -> None:
        if mine.shape[0] != theirs:
            raise CalibrationError(
                f"{type(self).__name__}: {theirs} channels after {mine.shape[0]}; a statistic belongs to one value"
            )
