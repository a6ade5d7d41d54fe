"""What hangs on a quantized model as `.qfx`, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass

from .core.report import Report
from .recipes import Recipe


@dataclass
class Quantized:
    """What was done to a model.

    Attributes:
        report: every fold, miss, layer and step.
        recipe: what was asked for.
        example: shapes of the inputs that it was captured with, by name.
    """

    report: Report
    recipe: Recipe
    example: dict[str, list[int]]
