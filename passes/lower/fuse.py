"""Rewrites of a quantized model's graph: values are quantized once, by the op that makes them; products end in one op.

Each takes a graph of opaque `qfx::` ops, as a capture of the lowered model gives it, edits it in place, and says what
it did and, for every place that it left, why. In float32 most give the same bits; in low precision a value that had
been rounded between two ops is rounded once, so that a code may be the next one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from qfx.core.report import Miss
from qfx.kernels import int8_gemm  # its package registers the ops
from qfx.passes.lower._activations import Gated, activation_of, find_gated
from qfx.passes.lower._attention import share_heads
from qfx.passes.lower._norms import Norm, find_norms, summands
from qfx.passes.lower._rewrite import (
    SHAPES,
    WRITTEN,
    Report,
    Rewritten,
    alike,
    arguments,
    count_ops,
    drop,
    emit,
    hoist,
    is_call,
    is_written,
    mark_writes,
    op_name,
    part,
    replace,
    sole_user,
    value,
    where,
)

aten, ops = torch.ops.aten, torch.ops.qfx
QUANTIZE = ops.quantize_rows.default
NORM, GATED = ops.norm.default, ops.gated.default
NORM_CODES, GATED_CODES = ops.norm_quantize.default, ops.gated_quantize.default
HADAMARD = ops.hadamard.default
GEMMS = {ops.int8_linear.default: ops.int8_gemm.default, ops.fp8_linear.default: ops.fp8_gemm.default}

LINEARS = (*GEMMS, ops.w4a8_linear.default)
FLOAT_LINEARS = (ops.w4a16_linear.default, ops.wxa16_linear.default, ops.nf4_linear.default)
"""Of quantized weights and float inputs, by kernels that start while what makes their input ends."""


def keep_shape(graph: fx.Graph, miss: Report) -> int:
    """A linear whose input is made rows, and whose output is shaped back, takes the input as it is."""
    done = 0
    for node in list(graph.nodes):
        rows, shaped = node.args[0] if is_call(node, *LINEARS, *FLOAT_LINEARS) else None, sole_user(node)
        if not isinstance(rows, fx.Node) or shaped is None or not all(is_call(n, *SHAPES) for n in (rows, shaped)):
            continue
        x = rows.args[0]
        source, like, y = value(x), value(rows), value(shaped)
        if source is None or like is None or y is None or is_written(x):
            continue
        lead, back = list(map(str, source.shape[:-1])), list(map(str, y.shape[:-1]))
        if str(source.shape[-1]) != str(like.shape[-1]) or lead != back:
            miss(node, "its output is shaped otherwise than its input was")
            continue
        with graph.inserting_before(node):
            whole = emit(graph, node.target, (x, *node.args[1:]), node)
        replace(graph, shaped, whole)
        done += 1
    return done


def quantize_apart(graph: fx.Graph, miss: Report) -> int:
    """A linear that quantizes its input becomes `quantize_rows` and a product of codes."""
    done = 0
    for node in list(graph.nodes):
        if is_call(node, ops.w4a8_linear.default):
            done += _grouped_apart(graph, node, miss)
            continue
        if not is_call(node, *GEMMS):
            continue
        a, x = arguments(node), value(node.args[0])
        if is_written(node.args[0]):
            miss(node, WRITTEN)
        elif x is None or x.dtype not in int8_gemm.OUT_DTYPES:
            miss(node, "its input has a dtype that no product of codes returns")
        elif a["per_tensor"] and a["x_scale"] is None:
            miss(node, "its input has one dynamic scale for all tokens")
        elif a.get("x_zero") is not None or a["x_grid"].startswith("u"):
            miss(node, "its input has a zero point")
        else:
            with graph.inserting_before(node):
                quantized = emit(graph, QUANTIZE, (a["x"], a["x_grid"], a["x_scale"], None), node)
                codes, scale = part(graph, quantized, 0), part(graph, quantized, 1)
                weight = a["codes"], a["w_scale"], a["bias"]
                product = emit(graph, GEMMS[node.target], (codes, scale, *weight, None, "", x.dtype), node)
            replace(graph, node, product)
            done += 1
    return done


def _grouped_apart(graph: fx.Graph, node: fx.Node, miss: Report) -> bool:
    """The same for weights in tiles, whose product takes codes as rows."""
    a, x = arguments(node), value(node.args[0])
    if x is None or a["order"] is not None or is_written(node.args[0]):
        miss(node, WRITTEN if is_written(node.args[0]) else "the columns of its input are reordered")
        return False
    with graph.inserting_before(node):
        quantized = emit(graph, QUANTIZE, (a["x"], a["x_grid"], None, None), node)
        parts = [part(graph, quantized, i) for i in (0, 1)]
        sizes = [emit(graph, aten.sym_size.int, (parts[0], i), node) for i in range(x.dim() - 1)]
        codes, scale = (emit(graph, aten.flatten.using_ints, (p, 0, -2), node) for p in parts)
        weight = (a[key] for key in ("tiles", "scale", "zero", "second", "bias", "out_features", "group"))
        product = emit(graph, ops.w4a8_gemm.default, (codes, scale, *weight, x.dtype), node)
        shaped = emit(graph, aten.reshape.default, (product, [*sizes, a["out_features"]]), node)
    replace(graph, node, shaped)
    return True


def share_codes(graph: fx.Graph, miss: Report) -> int:
    """Linears that read one value on one grid read the same codes."""
    seen: dict[Any, fx.Node] = {}
    done = 0
    for node in list(graph.nodes):
        if is_call(node, QUANTIZE):
            key = tuple(arguments(node).values())
            if (known := seen.setdefault(key, node)) is not node:
                _merge_parts(graph, known, node)
                done += 1
    values: dict[Any, list[fx.Node]] = {}
    for node in seen.values():
        values.setdefault(node.args[0], []).append(node)
    for several in values.values():
        for node in several[1:]:
            miss(node, f"reads what {where(several[0])} reads, but on another grid or scale")
    return done


def quantize_gated(graph: fx.Graph, miss: Report) -> int:
    """`quantize_rows(act(gate) · up)` becomes one op, and so does `quantize_rows(act(gate))`."""
    done = 0
    for node in list(graph.nodes):
        if not is_call(node, QUANTIZE):
            continue
        a = arguments(node)
        found = find_gated(a["x"])
        if isinstance(found, Gated) and len(a["x"].users) > 1:
            found = f"{op_name(a['x'])!r} is read {len(a['x'].users)} times"
        if isinstance(found, str):
            if found:
                miss(node, found)
            continue
        with graph.inserting_before(node):
            fused = emit(graph, GATED_CODES, (*found, a["x_grid"], a["x_scale"], a["x_zero"]), node)
        replace(graph, node, fused)
        done += 1
    return done


def quantize_hadamards(graph: fx.Graph, miss: Report) -> int:
    """A Hadamard transform gives codes itself."""
    done = 0
    for node in list(graph.nodes):
        y = node.args[0] if is_call(node, QUANTIZE) else None
        source = y.args[0] if isinstance(y, fx.Node) and is_call(y, operator.getitem) else None
        if not isinstance(source, fx.Node) or not is_call(source, HADAMARD) or arguments(source)["x_grid"]:
            continue
        if len(y.users) > 1:  # type: ignore[union-attr]
            miss(node, f"what the transform gives is read {len(y.users)} times")  # type: ignore[union-attr]
            continue
        a = arguments(node)
        with graph.inserting_before(node):
            block = arguments(source)["block"]
            fused = emit(graph, HADAMARD, (source.args[0], block, a["x_grid"], a["x_scale"], a["x_zero"]), node)
        replace(graph, node, fused)
        done += 1
    return done


def end_products(graph: fx.Graph, miss: Report) -> int:
    """An activation function and a residual sum behind a product of codes become its last steps."""
    done = 0
    for node in list(graph.nodes):
        if not is_call(node, *GEMMS.values()):
            continue
        args, y = dict(zip(_GEMM_ARGUMENTS, node.args, strict=True)), node
        if found := activation_of(node):
            y, args["activation"] = found
        user = sole_user(y)
        if user is not None and (other := _summand(user, y)) is not None:
            args["residual"], y = other, user
        if y is node:
            miss(node, _why_no_end(node))
            continue
        with graph.inserting_before(y):
            product = emit(graph, node.target, tuple(args.values()), node)
        replace(graph, y, product)
        done += 1
    return done


def quantize_norms(graph: fx.Graph, miss: Report) -> int:
    """A norm gives codes itself, and takes the residual sum in front of it in."""
    done = 0
    for norm in reversed(find_norms(graph)):  # what one replaces, those before it do not read
        if any(is_call(u, QUANTIZE) for u in norm.y.users):
            done += _fuse_norm(graph, norm, miss)
        else:
            miss(norm.y, "no quantized linear reads it")
    return done


def fuse_gated(graph: fx.Graph, miss: Report) -> int:
    """`act(gate) · up`, or `act(gate)`, becomes one op where a linear with quantized weights reads it as it is."""
    done = 0
    for node in list(graph.nodes):
        y = node.args[0] if is_call(node, *FLOAT_LINEARS) else None
        if not isinstance(y, fx.Node):
            continue
        found = find_gated(y)
        if isinstance(found, str):
            if found:
                miss(node, found)
            continue
        with graph.inserting_before(y):
            fused = emit(graph, GATED, found, y)
        replace(graph, y, fused)
        done += 1
    return done


def fuse_norms(graph: fx.Graph, miss: Report) -> int:
    """The same of norms: one takes the residual sum in front of it in."""
    done = 0
    for norm in reversed(find_norms(graph)):
        if any(is_call(u, *FLOAT_LINEARS) for u in norm.y.users):
            done += _fuse_norm(graph, norm, miss)
        else:
            miss(norm.y, "no linear with quantized weights and a float input reads it")
    return done


def fuse_other_norms(graph: fx.Graph, miss: Report) -> int:
    """A norm that no quantized linear reads becomes one op likewise, if it was several."""
    return sum(_fuse_norm(graph, norm, miss, several=True) for norm in reversed(find_norms(graph)))


def _fuse_norm(graph: fx.Graph, norm: Norm, miss: Report, several: bool = False) -> bool:
    """One op for a norm and what quantizes its result; with `several`, if it and the sum have been more than one."""
    if is_written(norm.x) or is_written(norm.y):
        miss(norm.y, WRITTEN)
        return False
    readers = [u for u in norm.y.users if is_call(u, QUANTIZE)]
    summed = summands(norm, miss)
    if several and summed is None and not norm.spelled:
        miss(norm.y, "it is one op, and there is no residual sum in front of it")
        return False
    grid = tuple(arguments(readers[0]).values())[1:] if readers else ()
    same = [r for r in readers if tuple(arguments(r).values())[1:] == grid]
    others = [u for u in norm.y.users if u not in same]
    x, residual = summed or (norm.x, None)
    with graph.inserting_before(norm.first):
        for constant in (norm.gain, norm.bias, *grid[1:]):
            hoist(constant, norm.first)
        # a number that the graph has as an input is one from here on; the graph's guards check that
        eps = float(norm.eps.meta["val"]) if isinstance(norm.eps, fx.Node) else norm.eps
        args = x, residual, norm.gain, norm.bias, eps, norm.center, norm.cast_first
        if readers:
            fused = emit(graph, NORM_CODES, (*args, *grid, bool(others)), norm.y)
        else:
            fused = emit(graph, NORM, args, norm.y)
        if others:
            y = part(graph, fused, 2 if readers else 0)
            norm.y.replace_all_uses_with(y, delete_user_cb=others.__contains__)
        if summed is not None:
            total = part(graph, fused, 3 if readers else 1)
            after = [user for user in norm.x.users if user is not fused]
            norm.x.replace_all_uses_with(total, delete_user_cb=after.__contains__)
    for reader in same:
        _merge_parts(graph, fused, reader)
    drop(graph, (norm.y, norm.x))
    return True


def left_alone(graph: fx.Graph, miss: Report) -> int:
    """Rewrites nothing: says of each input that is still quantized by an op of its own where it comes from."""
    for node in graph.nodes:
        if is_call(node, QUANTIZE):
            miss(node, f"its input is quantized by itself: it comes from {op_name(node.args[0])!r}")
    return 0


REWRITES: dict[str, Callable[[fx.Graph, Report], int]] = {
    "keep shapes": keep_shape,
    "share heads": share_heads,
    "quantize apart": quantize_apart,
    "share codes": share_codes,
    "quantize gated products": quantize_gated,
    "quantize hadamards": quantize_hadamards,
    "end products": end_products,
    "quantize norms": quantize_norms,
    "fuse gated products": fuse_gated,
    "fuse norms": fuse_norms,
    "fuse other norms": fuse_other_norms,
    "left alone": left_alone,
}
"""In the order in which they run."""


def rewrite(graph: fx.Graph, without: Container[str] = ()) -> list[Rewritten]:
    """Runs all rewrites on a graph, in place, but for those that are named in `without`."""
    done = []
    mark_writes(graph)
    for name, function in REWRITES.items():
        if name in without:
            continue
        result = Rewritten(name, before=count_ops(graph))

        def miss(node: fx.Node, why: str, result: Rewritten = result) -> None:
            result.misses.append(Miss(where(node), why, result.name))

        result.changed = function(graph, miss)
        graph.eliminate_dead_code()
        graph.lint()
        result.after = count_ops(graph)
        done.append(result)
    return done


_GEMM_ARGUMENTS = ("x_codes", "x_scale", "codes", "w_scale", "bias", "residual", "activation", "out_dtype")


def _merge_parts(graph: fx.Graph, kept: fx.Node, old: fx.Node) -> None:
    """The readers of one call's codes and scales read another's."""
    for getitem in list(old.users):
        index = getitem.args[1]
        assert isinstance(index, int)
        with graph.inserting_after(kept):
            getitem.replace_all_uses_with(part(graph, kept, index))
        graph.erase_node(getitem)
    graph.erase_node(old)


def _summand(node: fx.Node, y: fx.Node) -> fx.Node | None:
    """What a sum adds to y, if it is a tensor like it."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    other = next((a for a in node.args if a is not y), None)
    if not isinstance(other, fx.Node) or is_written(other):
        return None
    return other if alike(other, y) and alike(node, y) else None


def _why_no_end(node: fx.Node) -> str:
    user = sole_user(node)
    if user is None:
        return f"its product is read {len(node.users)} times"
    return f"its product goes to {op_name(user)!r}"
