"""Attention of one query token without repeated keys and values: heads that share a key head become query positions.

With H query heads on G key heads, head `g·r + i` of `r = H / G` reads key head g. Models repeat the keys r times,
`softmax(q[b, g·r + i, 0] · k[b, g]ᵀ) v[b, g]`, and a copy of the cache is written and read at every step of decoding.
For one token, `q [B, H, 1, D]` laid out as `[B, G, r, D]` is attention of r positions on the keys as they are: the same
sums. A mask must say the same of all heads, since heads are positions then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from qfx.passes.lower._rewrite import SHAPES, Report, arguments, emit, find_writes, is_call, replace, value

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
COPIES = (aten.clone.default, aten.contiguous.default)
Writes = Mapping[fx.Node, Sequence[fx.Node]]


class Repeat(NamedTuple):
    """Heads `[B, G, S, D]` that are repeated in a row, `[B, G · times, S, D]`.

    Attributes:
        x: the heads.
        times: how often each is repeated.
        copy: the node at which they are read and copied.
        nodes: all that may share memory with x or with the result.
    """

    x: fx.Node
    times: int
    copy: fx.Node
    nodes: tuple[fx.Node, ...]


def share_heads(graph: fx.Graph, miss: Report) -> int:
    """Attention of one token reads keys and values that are not repeated for the heads that share them."""
    done, writes = 0, find_writes(graph)
    for node in list(graph.nodes):
        if not is_call(node, ATTENTION):
            continue
        a = arguments(node)
        key, values = find_repeat(a["key"]), find_repeat(a["value"])
        if key is None and values is None:
            continue
        why = _why_not(a) or _why_unlike(key, values)
        if why or key is None or values is None:
            miss(node, why)
            continue
        if any(_is_written_behind(repeat, node, writes) for repeat in (key, values)):
            miss(node, "its keys or values are written to after they were repeated")
            continue
        (_, heads, _, features), groups = _shape(a["query"]), _shape(key.x)[1]
        if heads != groups * key.times:
            miss(node, "its query has other heads than its repeated keys")
            continue
        scale = {} if a["scale"] is None else {"scale": a["scale"]}
        with graph.inserting_before(node):
            query = emit(graph, aten.reshape.default, (a["query"], [-1, groups, key.times, features]), node)
            shared = emit(graph, ATTENTION, (query, key.x, values.x, a["attn_mask"]), node, scale)
            back = emit(graph, aten.reshape.default, (shared, [-1, heads, 1, _shape(values.x)[3]]), node)
        replace(graph, node, back)
        done += 1
    return done


def find_repeat(node: Any) -> Repeat | None:
    """The heads that a value repeats: by `repeat_interleave`, or by `reshape(expand(unsqueeze(x, 2)))`."""
    found = _in_one_op(node) if is_call(node, aten.repeat_interleave.self_int) else _in_steps(node)
    one, flat = (_shape(found.x), _shape(node)) if found is not None else ([], [])
    if found is None or len(one) != 4 or found.times == 1:
        return None
    batch, groups, length, features = one
    fixed = all(isinstance(n, int) for n in (groups, features, found.times))
    return found if fixed and _alike(flat, [batch, groups * found.times, length, features]) else None


def _in_one_op(node: fx.Node) -> Repeat | None:
    a = arguments(node)
    return Repeat(a["self"], a["repeats"], node, (node, a["self"])) if a["dim"] in (1, -3) else None


def _in_steps(node: Any) -> Repeat | None:
    wide, copy = _source(node, *SHAPES), node
    if inner := _source(wide, *COPIES):
        copy, wide = wide, inner
    apart = _source(wide, aten.expand.default)
    while (inner := _source(apart, aten.slice.Tensor)) and _alike(_shape(inner), _shape(apart)):
        apart = inner  # all of it: `x[:, :, None, :, :]` where sizes are open
    x = _source(apart, aten.unsqueeze.default)
    if wide is None or apart is None or x is None or apart.args[1] not in (2, -3):
        return None
    one, many = _shape(x), _shape(wide)
    if len(one) != 4 or len(many) != 5 or not _alike(many, [*one[:2], many[2], *one[2:]]):
        return None
    return Repeat(x, many[2], copy, (node, copy, wide, apart, x))


def _source(node: Any, *targets: Any) -> fx.Node | None:
    """What a call to one of these functions is made of."""
    source = node.args[0] if is_call(node, *targets) else None
    return source if isinstance(source, fx.Node) else None


def _why_not(a: Mapping[str, Any]) -> str:
    """Why heads cannot be positions of a query, for what is asked of this attention."""
    query = _shape(a["query"])
    if len(query) != 4 or not all(isinstance(n, int) for n in query[1:]):
        return "the number of its query's tokens is not fixed"
    if query[2] != 1:
        return "its query is longer than one token"
    if a["is_causal"]:
        return "it is causal, and positions of a query would differ"
    if a["dropout_p"] != 0:
        return "it drops weights at random"
    if a["enable_gqa"]:
        return "it shares heads by itself, and those are repeated"
    if a["attn_mask"] is not None and not _is_shared(_shape(a["attn_mask"])):
        return "its mask is not the same for all heads"
    return ""


def _why_unlike(key: Repeat | None, values: Repeat | None) -> str:
    if key is None or values is None:
        return f"only its {'values' if key is None else 'keys'} are repeated"
    if key.times != values.times:
        return f"its keys are repeated {key.times} times, its values {values.times} times"
    return ""


def _is_shared(mask: Sequence[Any]) -> bool:
    """Whether a mask that is broadcast to [batch, heads, queries, keys] has one row for all heads and queries."""
    axes = [1] * (4 - len(mask)) + list(mask)
    return len(axes) == 4 and all(isinstance(n, int) and n == 1 for n in axes[1:3])


def _is_written_behind(repeat: Repeat, reader: fx.Node, writes: Writes) -> bool:
    """Whether the heads, or their copy, change after they are copied and before the attention reads them."""
    return any(repeat.copy < by < reader for node in repeat.nodes for by in writes.get(node, ()))


def _shape(node: Any) -> list[Any]:
    """Of a node's value: numbers, also those that an open size has turned out to be; none if it is not known."""
    sizes = x.shape if (x := value(node)) is not None else ()
    return [n if isinstance(n, int) else n.node.maybe_as_int() or n for n in sizes]


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return list(map(str, a)) == list(map(str, b))
