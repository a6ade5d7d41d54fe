"""Attention that reads keys and values once, not repeated for the query heads that share them.

With H query heads on G key heads, head `g·r + i` of `r = H / G` reads key head g. Models repeat the keys r times,
`softmax(q[b, g·r + i] · k[b, g]ᵀ) v[b, g]`, and a copy of the cache is written and read at every step of decoding.
Where the attention kernel of the device shares heads by itself (cuDNN, FlashAttention), it is given the keys as they
are. Where it does not, one token's `q [B, H, 1, D]` laid out as `[B, G, r, D]` is attention of r positions: the same
sums. A mask must say the same of all heads then, since heads are positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend

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
    """Attention reads keys and values that are not repeated for the heads that share them."""
    done, writes = 0, find_writes(graph)
    for node in list(graph.nodes):
        if not is_call(node, ATTENTION):
            continue
        a = arguments(node)
        key, values = find_repeat(a["key"]), find_repeat(a["value"])
        if key is None and values is None:
            continue
        why = _why_unlike(a, key, values)
        if why or key is None or values is None:
            miss(node, why)
            continue
        if any(_is_written_behind(repeat, node, writes) for repeat in (key, values)):
            miss(node, "its keys or values are written to after they were repeated")
            continue
        if _is_shared_by_kernel(a, key.x, values.x):
            with graph.inserting_before(node):
                given = a["query"], key.x, values.x, a["attn_mask"], a["dropout_p"], a["is_causal"]
                shared = emit(graph, ATTENTION, given, node, {**_scale(a), "enable_gqa": True})
        elif why := _why_not_positions(a):
            miss(node, why)
            continue
        else:
            (_, heads, _, features), groups = _shape(a["query"]), _shape(key.x)[1]
            with graph.inserting_before(node):
                query = emit(graph, aten.reshape.default, (a["query"], [-1, groups, key.times, features]), node)
                positions = emit(graph, ATTENTION, (query, key.x, values.x, a["attn_mask"]), node, _scale(a))
                shared = emit(graph, aten.reshape.default, (positions, [-1, heads, 1, _shape(values.x)[3]]), node)
        replace(graph, node, shared)
        done += 1
    return done


def _scale(a: Mapping[str, Any]) -> dict[str, Any]:
    return {} if a["scale"] is None else {"scale": a["scale"]}


def _is_shared_by_kernel(a: Mapping[str, Any], key: fx.Node, values: fx.Node) -> bool:
    """Whether torch has a fused kernel here for keys with fewer heads than the query; without one it repeats them."""
    found = [value(node) for node in (a["query"], key, values)]
    if any(x is None or not x.is_cuda for x in found) or a["dropout_p"] != 0:
        return False
    (_, heads, tokens, wide), (_, groups, _, _), (*_, wide_values) = map(_shape, (a["query"], key, values))
    if not all(isinstance(n, int) for n in (heads, groups, wide, wide_values)):
        return False
    mask = value(a["attn_mask"])
    sizes = heads, groups, 1 if tokens == 1 else 64, wide, wide_values
    kinds = found[0].dtype, found[0].device, None if mask is None else mask.dtype  # type: ignore[union-attr]
    return _chosen_kernel(*sizes, *kinds, a["is_causal"]) > SDPBackend.MATH.value


def _chosen_kernel(
    heads: int, groups: int, tokens: int, wide: int, wide_values: int,
    dtype: torch.dtype, device: torch.device, mask: torch.dtype | None, causal: bool,
) -> int:  # fmt: skip
    """What torch takes for heads that are shared; asked with small tensors, since those of a capture tell nothing.

    Asked each time: `torch.nn.attention.sdpa_kernel` may allow other kernels now, or none that does it.
    """
    with unset_fake_temporarily():
        q, k, v = (
            torch.empty(1, *size, dtype=dtype, device=device)
            for size in ((heads, tokens, wide), (groups, 64, wide), (groups, 64, wide_values))
        )
        bias = None if mask is None else torch.empty(1, 1, tokens, 64, dtype=mask, device=device)
        try:
            return torch._fused_sdp_choice(q, k, v, bias, 0.0, causal, enable_gqa=True)
        except RuntimeError:  # none of those that are allowed
            return SDPBackend.ERROR.value


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


def _why_not_positions(a: Mapping[str, Any]) -> str:
    """Why heads cannot be positions of a query, for what is asked of this attention."""
    query = _shape(a["query"])
    if not all(isinstance(n, int) for n in query[1:]):
        return "the number of its query's tokens is not fixed"
    if query[2] != 1:
        return "its query is longer than one token"
    if a["is_causal"]:
        return "it is causal, and positions of a query would differ"
    if a["dropout_p"] != 0:
        return "it drops weights at random"
    if a["attn_mask"] is not None and not _is_shared(_shape(a["attn_mask"])):
        return "its mask is not the same for all heads"
    return ""


def _why_unlike(a: Mapping[str, Any], key: Repeat | None, values: Repeat | None) -> str:
    """Why its keys and values cannot be shared, in whatever way."""
    if key is None or values is None:
        return f"only its {'values' if key is None else 'keys'} are repeated"
    if a["enable_gqa"]:
        return "it shares heads by itself, and those are repeated"
    if key.times != values.times:
        return f"its keys are repeated {key.times} times, its values {values.times} times"
    query = _shape(a["query"])
    if len(query) != 4 or query[1] != _shape(key.x)[1] * key.times:
        return "its query has other heads than its repeated keys"
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
