"""The `quantization_config` of compressed-tensors: schemes as its `config_groups`, and back.

A group holds `weights` and `input_activations` (its `QuantizationArgs`), the `targets` that have them, and the layout
of the tensors (`format`). Reference: `compressed_tensors.quantization` 0.20, `QuantizationArgs` and `match_targets`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qfx.core.errors import PackageError
from qfx.core.grid import E4M3, Codebook, Float, Int
from qfx.core.spec import QSpec, Scheme

PACKED, INTS, FLOATS, PLAIN = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
MIXED = "mixed-precision"
PACKED_BITS = (2, 4, 8)
"""Widths whose words of 32 bits are the same in every release: before 0.20 the others left bits of a word unused."""
LINEAR = "Linear"
_WEIGHT_KEYS = {"num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder", "block_structure"}
_IDLE_KEYS = {"observer", "observer_kwargs", "zp_dtype", "scale_dtype"}
"""Keys that say how scales were found, and dtypes that the tensors have anyway."""


@dataclass(frozen=True)
class Group:
    """A config group, understood.

    Attributes:
        scheme: its weight's grid is not narrow.
        layout: one of `PACKED`, `INTS`, `FLOATS`, `PLAIN`.
        g_idx: whether groups of columns may be out of order (`actorder: group`, of releases before 0.20).
    """

    scheme: Scheme
    layout: str
    g_idx: bool


def refusal(scheme: Scheme, g_idx: bool) -> str | None:
    """Why a linear of this scheme cannot be written, and what is nearest; None if it can."""
    w, x = scheme.weight, scheme.input
    grid = w.grid
    activations = "A16" if x is None else "AFP8" if isinstance(x.grid, Float) else "A8"
    if isinstance(grid, Codebook):
        return f"has no {grid.name} weights; nearest: W4{activations}_G{max(w.block[1], 32)}"
    if isinstance(grid, Float) and grid != E4M3:
        return "has no float8 weights but E4M3; nearest: FP8 or FP8_DYNAMIC"
    if w.scale is not None:
        return "stores scales as they are, here they are quantized; nearest: the same scheme without _DQ"
    if w.block[0] != 1 and w.block != (-1, -1):
        return f"has no blocks of {w.block}; nearest: _CHANNEL or _G128"
    if isinstance(grid, Float) and w.block[1] != -1:
        return "has no groups of float8 weights that engines read; nearest: FP8_DYNAMIC"
    if g_idx:
        return "has no g_idx since its release 0.20; let gptq take static_groups=True, or act_order=False"
    if _layout(scheme) == PACKED and grid.bits not in PACKED_BITS:
        near = min((bits for bits in PACKED_BITS if bits >= grid.bits), default=8)
        return f"packs {grid.bits} bits in different ways in different releases; nearest: W{near}{activations}"
    if isinstance(grid, Int) and grid.bits == 1:
        return "has no weights of 1 bit; nearest: W2A16"
    if x is None:
        return None
    if isinstance(grid, Float) and isinstance(x.grid, Int):
        return "has no float8 weights with integer activations; nearest: FP8_DYNAMIC"
    if x.grid not in (E4M3, Int(8, narrow=True), Int(8, signed=False)):
        return f"computes activations of 8 bits, here they are {x.grid}; nearest: W{grid.bits}A8 or FP8_DYNAMIC"
    if x.block != (-1, -1) and not (x.dynamic and x.block == (1, -1)):
        return f"has no activations in blocks of {x.block}; nearest: a dynamic scale per token"
    return None


def group_of(scheme: Scheme) -> dict[str, Any]:
    """The config group of a scheme that is not refused, without its targets."""
    x = scheme.input
    return {
        "weights": _args(scheme.weight, "channel"),
        "input_activations": None if x is None else _args(x, "token"),
        "output_activations": None,
        "format": _layout(scheme),
    }


def find_group(config: Mapping[str, Any], name: str) -> Group | None:
    """What a config says of the linear of this path; None if it stays in float.

    Raises:
        PackageError: the config, or the group, is nothing that qfx computes.
    """
    _check(config)
    if _first(name, config.get("ignore") or ()) is not None:
        return None
    groups = {t: group for group in config["config_groups"].values() for t in group["targets"]}
    target = _first(name, groups)
    return None if target is None else _understood(groups[target], config)


def _layout(scheme: Scheme) -> str:
    if isinstance(scheme.weight.grid, Float):
        return PLAIN if scheme.input is None else FLOATS
    return PACKED if scheme.input is None or isinstance(scheme.input.grid, Float) else INTS


def _args(spec: QSpec, per_row: str) -> dict[str, Any]:
    size = spec.block[1]
    strategy = "tensor" if spec.block == (-1, -1) else per_row if size == -1 else "group"
    return {
        "num_bits": spec.grid.bits,
        "type": "float" if isinstance(spec.grid, Float) else "int",
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "group_size": size if strategy == "group" else None,
        "dynamic": spec.dynamic,
    }


def _first(name: str, targets: Any) -> str | None:
    """The target that decides: the very name, then a regular expression, then the class."""
    targets = sorted(map(str, targets), key=lambda t: ("re:" in t, t))
    for target in targets:
        regex = target.startswith("re:")
        if target == name or (regex and re.match(target.removeprefix("re:"), name)):
            return target
    return LINEAR if LINEAR in targets else None


def _check(config: Mapping[str, Any]) -> None:
    for key, what in (("kv_cache_scheme", "a quantized cache of keys and values"), ("transform_config", "transforms")):
        if config.get(key):
            raise PackageError(
                f"quantization_config has {what} ({key}), which qfx does not read; use another checkpoint"
            )
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise PackageError("quantization_config has sparse weights (sparsity_config); use a dense checkpoint")
    status = config.get("quantization_status")
    if status != "compressed":
        raise PackageError(f"quantization_config has the status {status!r}; only 'compressed' checkpoints hold codes")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(
        isinstance(g, Mapping) and isinstance(g.get("targets"), list) for g in groups.values()
    ):
        raise PackageError("quantization_config has no config_groups with targets; it is no whole checkpoint")


def _understood(group: Mapping[str, Any], config: Mapping[str, Any]) -> Group | None:
    weights, x = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        raise PackageError("a config group quantizes outputs (output_activations), which qfx does not compute")
    if weights is None:
        if x:
            raise PackageError("a config group quantizes activations and no weights, which qfx does not compute")
        return None
    scheme = Scheme(_weight(weights), None if x is None else _input(x))
    layout = group.get("format") or config.get("format")
    stored = {PACKED: (Int,), INTS: (Int,), FLOATS: (Float,), PLAIN: (Int, Float)}.get(str(layout))
    if stored is None:
        raise PackageError(f"a config group has the format {layout!r}; qfx reads {PACKED}, {INTS}, {FLOATS}, {PLAIN}")
    if not isinstance(scheme.weight.grid, stored):
        raise PackageError(f"a config group has the format {layout!r} for weights of {weights['type']}")
    if layout == PACKED and scheme.weight.grid.bits not in PACKED_BITS:
        bits = scheme.weight.grid.bits
        raise PackageError(f"weights of {bits} bits are packed in different ways in different releases; use 2, 4 or 8")
    return Group(scheme, str(layout), str(weights.get("actorder")).lower() in ("group", "dynamic"))


def _weight(args: Mapping[str, Any]) -> QSpec:
    _check_keys(args, "weights")
    if args.get("dynamic"):
        raise PackageError("weights have dynamic scales; only stored ones can be read")
    size, strategy = args.get("group_size"), args.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    blocks: dict[Any, Any] = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, size)}
    if strategy not in blocks or (strategy == "group" and not (isinstance(size, int) and size > 0)):
        raise PackageError(f"weights have the strategy {strategy!r} (group_size {size}); qfx reads {', '.join(blocks)}")
    bits, symmetric = args.get("num_bits", 8), args.get("symmetric", True)
    if args.get("type", "int") == "float":
        if bits != 8 or not symmetric or strategy == "group":
            raise PackageError(
                f"weights are floats of {bits} bits per {strategy}; qfx reads float8 per tensor or channel"
            )
        return QSpec(E4M3, blocks[strategy])
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise PackageError(f"weights have {bits} bits; qfx reads 2 to 8")
    return QSpec(Int(bits, signed=bool(symmetric)), blocks[strategy], symmetric=bool(symmetric))


def _input(args: Mapping[str, Any]) -> QSpec:
    _check_keys(args, "input_activations")
    bits, dynamic, strategy = args.get("num_bits", 8), args.get("dynamic", False), args.get("strategy") or "tensor"
    symmetric = bool(args.get("symmetric", True))
    floats = args.get("type", "int") == "float"
    known = (strategy == "tensor" and dynamic in (True, False)) or (strategy == "token" and dynamic is True)
    if bits != 8 or not known or (floats and not symmetric):
        kind = f"{args.get('type', 'int')}{bits} per {strategy}, dynamic={dynamic}, symmetric={symmetric}"
        raise PackageError(f"activations are {kind}; qfx reads 8 bits, per tensor or dynamic per token")
    # engines divide by 127 (the library on a CPU by 127.5)
    grid = E4M3 if floats else Int(8, signed=symmetric, narrow=symmetric)
    return QSpec(grid, (-1, -1) if strategy == "tensor" else (1, -1), symmetric=symmetric, dynamic=dynamic)


def _check_keys(args: Any, where: str) -> None:
    if not isinstance(args, Mapping):
        raise PackageError(f"{where} of a config group is {args!r}, not a mapping")
    if unknown := sorted(set(args) - _WEIGHT_KEYS - _IDLE_KEYS):
        raise PackageError(f"{where} of a config group has the unknown key {unknown[0]!r}; this qfx may be too old")
