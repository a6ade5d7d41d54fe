"""The one place that edits weights by a map: its writer takes the map, its readers the inverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .graph import Graph
from .linear import Linear
from .maps import Diagonal, Map, Shift
from .site import Site

Undo = Callable[[], None]


@torch.no_grad()
def fold(graph: Graph, site: Site, change: Map) -> Undo:
    """Folds a map into a site's parameters, computing in float64 and rounding once.

    Args:
        graph: the graph whose module holds the parameters.
        site: where; the map must be among `site.folds`.
        change: `Diagonal` with scales `[site.channels]`, or `Shift` with offsets `[site.channels]`.

    Returns:
        A function that restores every touched parameter bit for bit, and removes biases that were added.

    Raises:
        ValueError: the site does not fold this map, or a value is not finite or a scale is zero.
    """
    _check(site, change)
    undo: list[Undo] = []
    if isinstance(change, Diagonal):
        _scale(graph, site, change.scale.double(), undo)
    else:
        assert isinstance(change, Shift)
        _shift(graph, site, change.offset.double(), undo)

    def restore() -> None:
        for step in reversed(undo):
            step()

    return restore


def _check(site: Site, change: Map) -> None:
    if isinstance(change, Diagonal):
        values = change.scale
        kind = "Diagonal" if bool((values > 0).all()) else "SignedDiagonal"
        if bool((values == 0).any()):
            raise ValueError(f"fold: a scale at {site.name} is zero")
    elif isinstance(change, Shift):
        values, kind = change.offset, "Shift"
    else:
        raise ValueError(f"fold: {type(change).__name__} does not fold into a site's channels")
    if kind not in site.folds:
        why = site.why_not.get(kind, "it is not among what the probe proved")
        raise ValueError(f"fold: {site.name} does not fold {kind}: {why}")
    if values.shape != (site.channels,) or not bool(values.isfinite().all()):
        raise ValueError(f"fold: {site.name} takes {site.channels} finite values, not {list(values.shape)}")


def _scale(graph: Graph, site: Site, scale: Tensor, undo: list[Undo]) -> None:
    writer = site.writer
    if writer.gain is not None:
        slope, offset = writer.gain.slope, writer.gain.offset
        _edit(graph, writer.gain.param, lambda w: ((slope * w + offset) * scale.to(w.device) - offset) / slope, undo)
    if writer.linear is not None:
        _edit_linear(graph, writer.linear, lambda w: _rows(w, -2, writer.rows, scale), undo)
    if writer.bias is not None:
        _edit(graph, writer.bias, lambda b: _rows(b, -1, writer.rows, scale), undo)
    for reader in site.readers:
        per_column = torch.cat([scale, scale.new_ones(1)])[reader.index]  # index -1 is the last entry: no change
        _edit_linear(graph, reader.linear, lambda w, s=per_column: w / s.to(w.device), undo)  # type: ignore[misc]


def _shift(graph: Graph, site: Site, offset: Tensor, undo: list[Undo]) -> None:
    writer = site.writer
    if writer.linear is not None:
        ensure_bias(graph, writer.linear, undo)
    assert writer.bias is not None
    rows = writer.rows if writer.rows is not None else torch.arange(site.channels)
    _edit(graph, writer.bias, lambda b: b.index_add(0, rows.to(b.device), -offset.to(b)), undo)
    for reader in site.readers:
        ensure_bias(graph, reader.linear, undo)
        per_column = torch.cat([offset, offset.new_zeros(1)])[reader.index]
        change = reader.linear.read(graph).double() @ per_column.to(reader.linear.read(graph).device)
        assert reader.linear.bias is not None
        _edit(graph, reader.linear.bias, lambda b, c=change: b + c, undo)  # type: ignore[misc]


def ensure_bias(graph: Graph, linear: Linear, undo: list[Undo]) -> None:
    """Gives an `nn.Linear` without a bias one of zeros, in the module and in the graph."""
    if linear.bias is not None:
        return
    module = graph.module.get_submodule(linear.name)
    assert isinstance(module, nn.Linear)
    node, args, y = linear.node, linear.node.args, linear.y
    zeros = module.weight.new_zeros(module.out_features)
    name = f"{linear.name}.bias"
    constant = graph.add_parameter(name, zeros, before=node)
    added: fx.Node | None = None
    if node.target is torch.ops.aten.linear.default:
        node.args = (*args[:2], constant)
    else:  # a product written out: the bias is added behind it, as the module will
        with graph.fx.inserting_after(y):
            added = graph.fx.create_node("call_function", torch.ops.aten.add.Tensor)
        added.meta = dict(y.meta)
        y.replace_all_uses_with(added)
        added.args = (y, constant)
        linear.y = added
    linear.bias = name
    if graph.working_dtype is not None:
        graph.overrides[name] = zeros.float()
    graph.touch()

    def remove() -> None:
        if added is None:
            node.args = args
        else:
            added.replace_all_uses_with(y)
            graph.fx.erase_node(added)
            linear.y = y
        linear.bias = None
        graph.overrides.pop(name, None)
        graph.fx.erase_node(constant)
        graph.touch()
        module.bias = None  # type: ignore[assignment]

    undo.append(remove)


def _rows(w: Tensor, dim: int, rows: Tensor | None, scale: Tensor) -> Tensor:
    """Scales some rows of a weight `[..., out, in]`, or some entries of a bias."""
    per_row = torch.ones(w.shape[dim], dtype=w.dtype, device=w.device)
    per_row[rows if rows is not None else slice(None)] = scale.to(w)
    return w * (per_row if dim == -1 else per_row[:, None])


def _edit(graph: Graph, name: str, change: Callable[[Tensor], Tensor], undo: list[Undo]) -> None:
    value = graph.attr(name)
    undo.append(_restore(value))
    value.data.copy_(change(value.detach().double()))


def _edit_linear(graph: Graph, linear: Linear, change: Callable[[Tensor], Tensor], undo: list[Undo]) -> None:
    undo.append(_restore(graph.attr(linear.weight)))
    linear.write(graph, change(linear.read(graph).double()))


def _restore(value: Tensor) -> Undo:
    saved = value.detach().clone()

    def restore() -> None:
        value.data.copy_(saved)

    return restore
