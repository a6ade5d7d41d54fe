"""Finds the sites of a graph: proposes writers from the graph, proves by probe what folds there.

Writers are norm gains (also `1 + w`, layer scales, and norms written out op by op) and linears, whole or some of their
rows. A site is legal only if every use of the written value ends in a linear that can compensate. What is not covered
is returned as a miss with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qfx.core.graph import Env, Graph
from qfx.core.linear import Linear
from qfx.core.report import Miss
from qfx.core.site import Gain, Reader, Site, Writer
from qfx.passes.discover._ports import missing_bias, norm_writers, other_uses
from qfx.passes.discover._probe import TOLERANCE, Blocked, Prober, Trace, nearest

_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}
Rejected = list[tuple[fx.Node, str, str]]  # the writer's value, its name, why no site begins there


def find_sites(graph: Graph, linears: list[Linear], env: Env, *, seed: int = 0) -> tuple[list[Site], list[Miss]]:
    """All sites in graph order, and a miss for every linear whose input no site covers.

    Args:
        graph: the captured model.
        linears: its linears.
        env: every node's value for one small example input.
        seed: of the probe's random values.
    """
    prober = Prober(graph, env, linears, seed)
    sites: list[Site] = []
    rejected: Rejected = []
    proposals = [(p.value, p.writer) for p in norm_writers(graph)]
    proposals += [(lin.y, Writer(linear=lin)) for lin in linears]
    proposals.sort(key=lambda p: prober.position[p[0]])
    for value, writer in proposals:
        try:
            sites += _prove(graph, prober, value, writer)
        except Blocked as e:
            rejected.append((value, writer.name, e.why))
    return sites, _uncovered(graph, linears, sites, rejected, prober)


def norm_gains(graph: Graph) -> dict[fx.Node, Gain]:
    """The gain of each norm, by the value that it writes."""
    return {p.value: p.writer.gain for p in norm_writers(graph) if p.writer.gain is not None}


def _prove(graph: Graph, prober: Prober, value: fx.Node, writer: Writer) -> list[Site]:
    """The sites that begin at one writer; raises Blocked with the most telling reason if there is none."""
    if why := _fixed(graph, writer):
        raise Blocked(value, why)
    if writer.linear is None:
        return [_site(graph, prober, value, writer)]
    if writer.linear.foreign_bias:
        raise Blocked(value, "its bias is not a plain parameter of one axis")
    sites: list[Site] = []
    reason: Blocked | None = None
    total = prober.env[value].shape[-1]
    for rows in _row_sets(prober, value):
        if any(s.writer.rows is not None and set(rows) <= set(s.writer.rows.tolist()) for s in sites):
            continue
        part = Writer(linear=writer.linear, rows=torch.tensor(rows))
        try:
            sites.append(_site(graph, prober, value, part))
        except Blocked as e:
            reason = reason or e
        if sites and len(rows) == total:
            break
    if not sites:
        raise reason or Blocked(value, "no linear reads it")
    return sites


def _fixed(graph: Graph, writer: Writer) -> str | None:
    """Why a writer's parameters must stay as they are."""
    params = [writer.bias, writer.gain.param if writer.gain else None, writer.linear.weight if writer.linear else None]
    for name in params:
        if name and (uses := other_uses(graph, name)):
            return f"{name} is also used by {', '.join(uses)}"
    return None


def _row_sets(prober: Prober, value: fx.Node) -> Iterator[tuple[int, ...]]:
    """The whole of a linear's rows, then each set of rows that pure data movement carries to some op, largest first."""
    total = prober.env[value].shape[-1]
    yield tuple(range(total))
    ids = prober.normal(total)
    table, order = ids.sort()
    moved: dict[fx.Node, Tensor] = {value: ids.expand(prober.env[value].shape)}
    found: set[tuple[int, ...]] = set()
    for node in prober.nodes[prober.position[value] + 1 :]:
        inputs = [n for n in node.all_input_nodes if n in moved]
        if not inputs:
            continue
        carried = (
            _move(prober, node, moved, table) if node not in prober.by_node and node.op == "call_function" else None
        )
        if carried is not None:
            moved[node] = carried
            continue
        for n in inputs:
            if isinstance(moved[n], Tensor):
                found.add(tuple(sorted(order[nearest(moved[n].unique(), table)[0]].tolist())))
        if len(moved) > 200:
            break
    yield from sorted((f for f in found if len(f) < total), key=len, reverse=True)


def _move(prober: Prober, node: fx.Node, moved: dict[fx.Node, Tensor], table: Tensor) -> Tensor | None:
    """What an op makes of row numbers, if it only moves data; None if it computes.

    The numbers are random and of both signs, so that no computation returns them by accident.
    """
    if sum(n in moved for n in node.all_input_nodes) != 1:
        return None
    try:
        result = prober._both(node, {n: (v, v) for n, v in moved.items()})[0]
    except Blocked:
        return None
    tensors = result if isinstance(result, tuple | list) else [result]
    for t in tensors:
        if not isinstance(t, Tensor) or t.dtype != torch.float64 or t.numel() == 0:
            return None
        if (nearest(t.unique(), table)[1] > 0).any():
            return None
    return result


def _site(graph: Graph, prober: Prober, value: fx.Node, writer: Writer) -> Site:
    total = prober.env[value].shape[-1]
    rows = writer.rows if writer.rows is not None else torch.arange(total)
    n = len(rows)
    plain = prober.gaussian(value)
    scales = prober.distinct_scales(n)
    allowed = torch.cat([scales, scales.new_ones(1)]).sort().values
    trace = prober.trace(value, plain, _on_rows(plain, rows, lambda v: v * scales), allowed)
    readers = tuple(Reader(lin, _index(lin, a, b, scales).cpu()) for lin, a, b in trace.readers)
    for reader in readers:
        if uses := other_uses(graph, reader.linear.weight, reader.linear.node):
            raise Blocked(reader.linear.node, f"{reader.linear.weight} is also used by {', '.join(uses)}")
    name = writer.name if n == total else f"{writer.name}[{_span(rows)}]"
    kind = "norm" if writer.linear is None else "value" if _mixes_tokens(trace.path) else "inner"
    site = Site(name, kind, value, n, writer, readers, {"Diagonal"}, path=tuple(trace.path))
    _probe_signed(prober, site, rows)
    _probe_shift(graph, prober, site, rows)
    return site


def _mixes_tokens(path: list[fx.Node]) -> bool:
    """Whether a product of activations lies on the way, as in attention: the site is then its value path."""
    return any(str(n.target).split(".")[1] in _PRODUCTS for n in path if "." in str(n.target))


def _probe_signed(prober: Prober, site: Site, rows: Tensor) -> None:
    scales = prober.distinct_scales(len(rows))
    scales[::2] *= -1
    plain = prober.gaussian(site.value)
    try:
        trace = prober.trace(site.value, plain, _on_rows(plain, rows, lambda v: v * scales))
        _expect(trace, site, lambda x, i: torch.where(i >= 0, x * scales[i.clamp_min(0)], x))
        site.folds.add("SignedDiagonal")
    except Blocked as e:
        site.why_not["SignedDiagonal"] = e.why


def _probe_shift(graph: Graph, prober: Prober, site: Site, rows: Tensor) -> None:
    offsets = prober.normal(len(rows))
    plain = prober.gaussian(site.value)
    try:
        trace = prober.trace(site.value, plain, _on_rows(plain, rows, lambda v: v - offsets))
        _expect(trace, site, lambda x, i: torch.where(i >= 0, x - offsets[i.clamp_min(0)], x))
    except Blocked as e:
        site.why_not["Shift"] = e.why
        return
    for reader in site.readers:
        if why := missing_bias(graph, reader.linear):
            site.why_not["Shift"] = why
            return
    if site.writer.linear is not None and (why := missing_bias(graph, site.writer.linear)):
        site.why_not["Shift"] = why
    elif site.writer.linear is None and site.writer.bias is None:
        site.why_not["Shift"] = f"{site.writer.name} has no bias (the option shift_rmsnorm adds one)"
        site.folds.add("AddedShift")
    else:
        site.folds.add("Shift")


def _on_rows(plain: Tensor, rows: Tensor, change) -> Tensor:  # type: ignore[no-untyped-def]
    mapped = plain.clone()
    mapped[..., rows] = change(plain[..., rows])
    return mapped


def _index(linear: Linear, plain: Tensor, mapped: Tensor, scales: Tensor) -> Tensor:
    """Which channel each input channel of a reader holds (-1: none), read off the ratios."""
    a, b = plain.reshape(-1, plain.shape[-1]), mapped.reshape(-1, plain.shape[-1])
    finite = a.isfinite() & b.isfinite()
    a, b = a.where(finite, 0), b.where(finite, 0)
    strongest = a.abs().argmax(0, keepdim=True)
    top = a.gather(0, strongest)[0]
    if (top == 0).any():
        raise Blocked(linear.node, "some of its input channels were never active in the probe")
    ratio = b.gather(0, strongest)[0] / top
    table, order = torch.cat([scales, scales.new_ones(1)]).sort()
    at, off = nearest(ratio, table)
    index = order[at]
    index = torch.where(index == len(scales), -1, index)
    expected = a * torch.cat([scales, scales.new_ones(1)])[index]
    if (off > TOLERANCE).any() or ((b - expected).abs() > TOLERANCE * a.abs().amax(0)).any():
        raise Blocked(linear.node, f"{linear.name} does not see one channel in each of its inputs")
    return index


def _expect(trace: Trace, site: Site, change) -> None:  # type: ignore[no-untyped-def]
    """Raises Blocked unless every reader sees exactly the mapped value."""
    if len(trace.readers) != len(site.readers):
        raise Blocked(site.value, "the map changes which linears read it")
    for (linear, plain, mapped), reader in zip(trace.readers, site.readers, strict=True):
        off = (mapped - change(plain, reader.index.to(plain.device))).nan_to_num(0).abs().max()
        if off > TOLERANCE * plain.nan_to_num(0).abs().max().clamp_min(1):
            worst = trace.path[-1] if trace.path else site.value
            raise Blocked(worst, f"the map does not commute with the ops before {linear.name}")


def _uncovered(
    graph: Graph, linears: list[Linear], sites: list[Site], rejected: Rejected, prober: Prober
) -> list[Miss]:
    covered = {id(r.linear) for s in sites for r in s.readers}
    reasons = {value: (name, why) for value, name, why in rejected}
    misses = []
    for linear in linears:
        if id(linear) in covered:
            continue
        why = "no norm or linear writes its input"
        queue, seen = [linear.x], {linear.x}
        while queue:
            queue.sort(key=lambda n: prober.position[n])
            node = queue.pop()
            if node in reasons:
                why = "{} writes its input, but {}".format(*reasons[node])
                break
            if len(seen) > 150:
                break
            for source in node.all_input_nodes:
                value = prober.env.get(source)
                chosen = isinstance(value, Tensor) and not value.is_floating_point()  # by a router: no channels there
                if source not in seen and source.op == "call_function" and not chosen:
                    seen.add(source)
                    queue.append(source)
        misses.append(Miss(linear.name, why, weights=graph.attr(linear.weight).numel()))
    return misses


def _span(rows: Tensor) -> str:
    first, last = int(rows[0]), int(rows[-1])
    return f"{first}:{last + 1}" if last - first + 1 == len(rows) else f"{len(rows)} rows of {first}:{last + 1}"
