"""What is wrong with a graph, and the loop that asks every rule of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        node: its name, or the name of the value, domain or file that is meant.
        wrong: what is so.
        fix: what to do.
        rule: the name of the rule that found it.
    """

    node: str
    wrong: str
    fix: str
    rule: str = ""

    def __str__(self) -> str:
        """One line: who, what, what to do."""
        return f"{self.node}: {self.wrong}; {self.fix}"


Rule = Callable[[ir.Model], Iterator[Finding]]
"""Its docstring says what must hold; it yields what does not."""


def findings(model: ir.Model, rules: Iterable[Rule]) -> list[Finding]:
    """What the rules find, in their order, each signed with its rule's name."""
    return [replace(found, rule=rule.__name__) for rule in rules for found in rule(model)]
