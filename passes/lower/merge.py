"""Finds linears that can be computed as one: those that a captured graph calls with the same value, every time."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.report import Miss
from qfx.modules.linear import QLinear
from qfx.modules.merged import unlike
from qfx.modules.state import BUFFERS
from qfx.passes.lower._rewrite import Rewritten, is_written, mark_writes

_WEIGHT = "." + BUFFERS["codes"]
_BETWEEN = "reads what {} reads, but others are called between them"


@dataclass
class Calls:
    """A quantized linear's calls in a graph.

    Attributes:
        name: path of its module.
        module: it.
        biased: whether each call adds a bias.
        nodes: the ops, in execution order.
        inputs: what each op reads.
        positions: of each op among the calls of all quantized linears.
    """

    name: str
    module: QLinear
    biased: bool
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, node: fx.Node, x: fx.Node, position: int) -> None:
        """One more call."""
        self.nodes.append(node)
        self.inputs.append(x)
        self.positions.append(position)

    def unlike(self, other: Calls) -> str | None:
        """Why these cannot be one linear, but for what they read."""
        why = unlike([self.module, other.module])
        return why if why or self.biased == other.biased else "another form: only one has a bias"


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
            calls = by_module.setdefault(module, Calls(name, module, module.bias is not None))
            found.setdefault(calls.name, calls)
            calls.add(node, node.all_input_nodes[0], position)
            position += 1
    return found


def merge_linears(
    linears: Sequence[Linear], modules: Mapping[Linear, QLinear], biased: Container[Linear]
) -> tuple[list[list[Linear]], Rewritten]:
    """Groups of linears to merge in a graph where they are float products still; each time that they are called.

    Args:
        linears: all that will be quantized, in execution order.
        modules: of the form of what will compute them, for those that an op computes; their own biases do not count.
        biased: the linears to which a bias is added.
    """
    found: dict[tuple[str, bool], Calls] = {}
    by_node = {linear.node: linear for linear in linears}
    for position, linear in enumerate(linears):
        if (module := modules.get(linear)) is not None:
            key = linear.weight, linear in biased
            found.setdefault(key, Calls(linear.name, module, key[1])).add(linear.node, linear.x, position)
    if linears:
        mark_writes(linears[0].node.graph)
    groups, misses = group_calls(found.values())
    each = [[by_node[node] for node in nodes] for g in groups for nodes in zip(*(c.nodes for c in g), strict=True)]
    return each, Rewritten("merge linears", len(each), misses=misses)


def find_groups(graph: Graph) -> tuple[list[list[str]], list[Miss]]:
    """Groups of quantized linears to merge, by path, and those that read what others read and stay alone."""
    mark_writes(graph.fx)
    groups, misses = group_calls(find_calls(graph).values())
    return [[calls.name for calls in group] for group in groups], misses


def group_calls(found: Iterable[Calls]) -> tuple[list[list[Calls]], list[Miss]]:
    """Groups of linears to merge, and linears that read what others read and stay alone.

    A group's members have the same form, read the same value in each of their calls, and no other quantized linear is
    called between them: its outputs would be kept meanwhile.
    """
    readers: dict[tuple[fx.Node, ...], list[Calls]] = {}
    for calls in found:
        readers.setdefault(tuple(calls.inputs), []).append(calls)
    groups: list[list[Calls]] = []
    misses: list[Miss] = []
    for inputs, together in readers.items():
        if len(together) > 1 and any(map(is_written, inputs)):
            misses += [_miss(c, "the model writes into its input, in place") for c in together]
            continue
        runs = _runs(together)
        for before, after in itertools.pairwise(runs):
            misses += [_miss(c, _BETWEEN.format(before[0].name)) for c in after]
        for run in runs:
            kinds: list[list[Calls]] = []
            for calls in run:
                alike = (k for k in kinds if k[0].unlike(calls) is None)
                if (kind := next(alike, None)) is not None:
                    kind.append(calls)
                else:
                    kinds.append([calls])
            groups += [kind for kind in kinds if len(kind) > 1]
            for kind in kinds[1:]:
                why = kinds[0][0].unlike(kind[0])
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
