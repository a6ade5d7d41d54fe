"""Finds linears that can be computed as one: those that a captured graph calls with the same value, every time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from qfx.core.graph import Graph
from qfx.core.report import Miss
from qfx.modules.linear import QLinear
from qfx.modules.merged import unlike
from qfx.modules.state import BUFFERS

_WEIGHT = "." + BUFFERS["codes"]
_BETWEEN = "reads what {} reads, but others are called between them"


@dataclass
class Calls:
    """A quantized linear's calls in a graph.

    Attributes:
        name: path of its module.
        module: it.
        nodes: the ops, in execution order.
        positions: of each op among the calls of all quantized linears.
    """

    name: str
    module: QLinear
    nodes: list[fx.Node] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What each call reads."""
        return tuple(node.all_input_nodes[0] for node in self.nodes)


def find_calls(graph: Graph) -> dict[str, Calls]:
    """Every quantized linear that the graph calls, by path, in the order of the first calls."""
    found: dict[str, Calls] = {}
    by_module: dict[QLinear, Calls] = {}
    position = 0
    for node in graph.nodes:
        weight = str(node.args[1].target) if len(node.args) > 1 and _is_constant(node.args[1]) else ""  # type: ignore[union-attr]
        name = weight.removesuffix(_WEIGHT)
        if name == weight or node.op != "call_function":
            continue
        module = graph.module.get_submodule(name)
        if isinstance(module, QLinear):
            calls = by_module.setdefault(module, Calls(name, module))
            found.setdefault(calls.name, calls)
            calls.nodes.append(node)
            calls.positions.append(position)
            position += 1
    return found


def find_groups(graph: Graph) -> tuple[list[list[str]], list[Miss]]:
    """Groups of linears to merge, by path, and linears that read what others read and stay alone.

    A group's members have the same form, read the same value in each of their calls, and no other quantized linear is
    called between them: its outputs would be kept meanwhile.
    """
    readers: dict[tuple[fx.Node, ...], list[Calls]] = {}
    for calls in find_calls(graph).values():
        readers.setdefault(calls.inputs, []).append(calls)
    groups: list[list[str]] = []
    misses: list[Miss] = []
    for together in readers.values():
        runs = _runs(together)
        for before, after in itertools.pairwise(runs):
            misses += [_miss(c, _BETWEEN.format(before[0].name)) for c in after]
        for run in runs:
            kinds: list[list[Calls]] = []
            for calls in run:
                alike = (k for k in kinds if unlike([k[0].module, calls.module]) is None)
                if (kind := next(alike, None)) is not None:
                    kind.append(calls)
                else:
                    kinds.append([calls])
            groups += [[calls.name for calls in kind] for kind in kinds if len(kind) > 1]
            for kind in kinds[1:]:
                why = unlike([kinds[0][0].module, kind[0].module])
                misses += [_miss(c, f"reads what {kinds[0][0].name} reads, but has {why}") for c in kind]
    return groups, misses


def _runs(together: Sequence[Calls]) -> list[list[Calls]]:
    """Cuts linears that read one value where another is called between two of them."""
    runs = [[together[0]]]
    for before, after in itertools.pairwise(together):
        pairs = zip(before.positions, after.positions, strict=True)
        if all(b == a + 1 for a, b in pairs):
            runs[-1].append(after)
        else:
            runs.append([after])
    return runs


def _miss(calls: Calls, why: str) -> Miss:
    return Miss(calls.name, why, "merge", calls.module.in_features * calls.module.out_features)


def _is_constant(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"
