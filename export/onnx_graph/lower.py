"""Replaces the opaque linears of a graph by the nodes that a target computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import common

from qfx.core.errors import PackageError
from qfx.export.onnx_graph.emit import CONTRIB, Emit
from qfx.export.onnx_graph.targets import Choice, Refusal, choose
from qfx.export.onnx_graph.translations import DOMAIN
from qfx.modules.linear import QLinear

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass
class Lowered:
    """What became of a graph's quantized linears.

    Attributes:
        choices: by the linear's name.
        uses: how many nodes each linear had.
        constant: how many of them no input of the graph reaches; ONNX Runtime computes these when it loads the file.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    constant: Counter[str] = field(default_factory=Counter)

    def expected(self) -> dict[str, int]:
        """How many nodes of each type compute quantized linears after ONNX Runtime's fusions."""
        counts: Counter[str] = Counter()
        for name, choice in self.choices.items():
            if choice.op:
                counts[choice.op] += self.uses[name] - self.constant[name]
        return dict(counts)


def plan(linears: Mapping[str, QLinear], target: str, dtype: str, accuracy_level: int = 0) -> dict[str, Choice]:
    """Chooses the nodes of every linear.

    Raises:
        PackageError: the target has none for some; with their names, the reason and the nearest scheme.
    """
    found = {name: choose(name, linear, target, dtype, accuracy_level) for name, linear in linears.items()}
    reasons: dict[str, list[str]] = {}
    for name, choice in found.items():
        if isinstance(choice, Refusal):
            reasons.setdefault(str(choice), []).append(name)
    if reasons:
        told = [f"{_some(names)}: {why}" for why, names in reasons.items()]
        raise PackageError(f"{target} does not take this model: " + " | ".join(told))
    return {name: choice for name, choice in found.items() if isinstance(choice, Choice)}


def lower(model: ir.Model, choices: Mapping[str, Choice], dtype: str) -> Lowered:
    """Lowers a captured graph in place; weights are computed when it is saved.

    Args:
        model: as `capture` gives it.
        choices: as `plan` gives them.
        dtype: of the float parts, "float32" or "float16".
    """
    graph, done, shared = model.graph, Lowered(), dict[Any, Any]()
    varying = _varying(graph)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        name = node.attributes["layer"].as_string()
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        again = done.uses[name]
        emit = Emit(choices[name].layer, x, dtype, graph, shared, again)
        new = choices[name].write(emit)
        new.shape, new.type = old.shape, old.type
        label = old.name
        convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.insert_before(node, emit.nodes)
        graph.remove(node, safe=True)
        if new in graph.outputs:
            new.name = label
        done.uses[name] += 1
        done.constant[name] += old not in varying
        done.choices[name] = choices[name]
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == CONTRIB for node in graph):
        model.opset_imports[CONTRIB] = 1
    if missing := sorted(set(choices) - set(done.choices)):
        raise PackageError(f"{_some(missing)}: not in the exported graph; the model does not call it with these inputs")
    return done


def _varying(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on an input of the graph."""
    found = set(graph.inputs)
    for node in graph:  # in the order of computation
        if any(x in found for x in node.inputs) or any(a.type in _GRAPHS for a in node.attributes.values()):
            found.update(node.outputs)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
