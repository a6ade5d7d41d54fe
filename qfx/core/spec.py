"""How one tensor (`QSpec`) and one layer (`Scheme`) are represented, and the names that the field uses for them.

The grammar of names is `W<bits>A<bits>` with suffixes, and compressed-tensors' own names where it has one:
`W8A8`, `W4A16`, `W4A16_ASYM`, `W8A16`, `W4A8`, `FP8`, `FP8_DYNAMIC`. Weights on a table of 16 values are `NF4`, `FP4`
and `FP4_BNB`, with suffixes, too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import RecipeError
from .grid import E4M3, E5M2, Codebook, Float, Grid, Int, grid_from_dict, grid_to_dict

GROUP = 128
"""Group size of weight-only schemes whose name gives none, as in compressed-tensors and GPTQ."""


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    Args:
        grid: what the codes mean.
        block: the (rows, columns) that share a scale; -1 is the whole axis. Rows are output channels of a weight
            [out, in] and tokens of an activation [tokens, channels]: (1, -1) is per channel or per token, (-1, -1) per
            tensor, (1, 128) groups of 128 inputs.
        symmetric: no zero point. Asymmetric needs an unsigned grid.
        dynamic: the scale is computed from the tensor at run time (activations only).
        scale: how the scales are quantized themselves (double quantization; weights only), or None: they are float32.
            Its block (1, n) is n scales that follow each other in memory, (1, -1) those of a row, (-1, -1) all of them.
            Scales are positive: an asymmetric integer grid has no zero point to store then.
    """

    grid: Grid
    block: tuple[int, int] = (1, -1)
    symmetric: bool = True
    dynamic: bool = False
    scale: QSpec | None = None

    def __post_init__(self) -> None:
        """Refuses what no quantizer computes."""
        if len(self.block) != 2 or any(not isinstance(b, int) or b == 0 or b < -1 for b in self.block):
            raise ValueError(f"spec: block {self.block} must be two sizes, positive or -1 for the whole axis")
        if not self.symmetric and not (isinstance(self.grid, Int) and not self.grid.signed):
            raise ValueError("spec: an asymmetric spec needs an unsigned integer grid")
        if self.symmetric and isinstance(self.grid, Int) and not self.grid.signed:
            raise ValueError("spec: a symmetric spec needs a signed grid")
        if (inner := self.scale) is None:
            return
        if self.dynamic or not self.symmetric:
            raise ValueError("spec: scales of dynamic and of asymmetric specs are not quantized")
        whole = isinstance(inner.grid, Int) and not inner.grid.signed
        if inner.dynamic or inner.scale or not (whole or isinstance(inner.grid, Float)):
            raise ValueError("spec: scales are quantized on an asymmetric grid of integers or on a float8 grid")
        if inner.block[0] != 1 and inner.block != (-1, -1):
            raise ValueError(f"spec: scales in blocks of {inner.block}; use (1, n), (1, -1) for rows, (-1, -1) for all")

    def groups(self, columns: int) -> int:
        """How many scales one row of `columns` values has; raises ValueError if the block does not divide them."""
        size = self.block[1]
        if size == -1:
            return 1
        if columns % size:
            raise ValueError(f"group_size {size} does not divide {columns} input channels")
        return columns // size

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready description."""
        data: dict[str, object] = {
            "grid": grid_to_dict(self.grid),
            "block": list(self.block),
            "symmetric": self.symmetric,
            "dynamic": self.dynamic,
        }
        return data if self.scale is None else {**data, "scale": self.scale.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> QSpec:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        fields = dict(data)
        grid = grid_from_dict(dict(fields.pop("grid")))  # type: ignore[call-overload]
        block: Any = fields.pop("block")
        if (inner := fields.pop("scale", None)) is not None:
            fields["scale"] = cls.from_dict(inner)  # type: ignore[arg-type]
        try:
            return cls(grid, (block[0], block[1]), **fields)  # type: ignore[arg-type]
        except TypeError as e:
            raise ValueError(f"spec: {e}") from None


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized: its weight, and its input if that is quantized too."""

    weight: QSpec
    input: QSpec | None = None

    def with_group(self, group_size: int) -> Scheme:
        """The same scheme with another group size (-1: one scale for each output channel).

        Raises:
            RecipeError: the scales are multiples of one for each row already.
        """
        if group_size == -1 and self.weight.scale is not None and self.weight.scale.block == (1, -1):
            raise RecipeError("recipe: group_size is -1, but '_DQ' quantizes the scales of groups; drop '_DQ'")
        return replace(self, weight=replace(self.weight, block=(1, group_size)))

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready description."""
        return {"weight": self.weight.to_dict(), "input": self.input.to_dict() if self.input else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Scheme:
        """The inverse of `to_dict`."""
        if unknown := set(data) - {"weight", "input"}:
            raise ValueError(f"scheme: unknown keys {sorted(unknown)}; use 'weight' and 'input'")
        weight, x = data["weight"], data.get("input")
        return cls(
            QSpec.from_dict(weight),  # type: ignore[arg-type]
            QSpec.from_dict(x) if x is not None else None,  # type: ignore[arg-type]
        )


DOUBLE = QSpec(Int(8, signed=False), (1, 256), symmetric=False)
"""Scales of 8 bits in blocks of 256, as in QLoRA (arXiv 2305.14314, section 3)."""

MULTIPLES = QSpec(Int(4, signed=False), (1, -1), symmetric=False)
"""Scales that are 1 to 15 times one of their row, as in QoQ (arXiv 2405.04532, section 4.1).

A code of 4 bits times such a number fits in 8 bits: a product with int8 activations is a sum of integers over a whole
row.
"""

PRESETS = {
    "INT8": "W8A8",
    "FP8": Scheme(QSpec(E4M3, (-1, -1)), QSpec(E4M3, (-1, -1))),
    "FP8_DYNAMIC": Scheme(QSpec(E4M3, (1, -1)), QSpec(E4M3, (1, -1), dynamic=True)),
    "FP8_E5M2": Scheme(QSpec(E5M2, (-1, -1)), QSpec(E5M2, (-1, -1))),
    "FP8_E5M2_DYNAMIC": Scheme(QSpec(E5M2, (1, -1)), QSpec(E5M2, (1, -1), dynamic=True)),
    "W4AFP8": Scheme(QSpec(Int(4), (1, GROUP)), QSpec(E4M3, (1, -1), dynamic=True)),
    "NF4": Scheme(QSpec(Codebook("nf4"), (1, 64))),
    "NF4_DQ": Scheme(QSpec(Codebook("nf4"), (1, 64), scale=DOUBLE)),
    "FP4": Scheme(QSpec(Codebook("e2m1"), (1, 64))),
    "FP4_BNB": Scheme(QSpec(Codebook("fp4_bnb"), (1, 64))),
}
_TABLES = {"NF4": "nf4", "FP4": "e2m1", "FP4_BNB": "fp4_bnb"}
_TABLE_NAME = re.compile(r"(?P<table>NF4|FP4_BNB|FP4)(?P<double>_DQ)?(?:_G(?P<group>[1-9]\d*)|(?P<channel>_CHANNEL))?")
_NAME = re.compile(
    r"W(?P<w>\d+)A(?P<a>\d+)(?P<flags>(?:_(?:ASYM|STATIC|STATIC_ASYM|TENSOR|CHANNEL|DQ|G\d+))*)", re.IGNORECASE
)


def parse_scheme(name: str) -> Scheme:
    """The scheme that a name stands for.

    `W<bits>A<bits>`: weights of 1 to 8 bits, activations of 2 to 8, or 16 for float. Weights of 8 bits with quantized
    activations have a scale per output channel; other widths below 8 have groups of 128. Activations have a dynamic
    scale per token. Suffixes: `_ASYM` (weights with zero points), `_STATIC` (per-tensor activation scales from
    calibration), `_STATIC_ASYM` (those with a zero point), `_G<size>`, `_CHANNEL`, `_TENSOR` (the weight's block),
    `_DQ` (the scales of groups are whole multiples of one of their row).

    `NF4`, `FP4` (E2M1), `FP4_BNB` (the table of bitsandbytes): weights of 4 bits in groups of 64, float activations.
    Suffixes, in this order: `_DQ` (the scales are quantized, too), `_G<size>` or `_CHANNEL`.

    Raises:
        RecipeError: the name is not one of these.
    """
    key = name.upper()
    preset = PRESETS.get(key)
    if isinstance(preset, Scheme):
        return preset
    if (match := _TABLE_NAME.fullmatch(key)) is not None:
        size = -1 if match["channel"] else int(match["group"] or 64)
        return Scheme(QSpec(Codebook(_TABLES[match["table"]]), (1, size), scale=DOUBLE if match["double"] else None))
    match = _NAME.fullmatch(str(preset or key))
    if match is None:
        raise RecipeError(
            f"recipe: unknown scheme {name!r}; use W<bits>A<bits> (W8A8, W8A8_STATIC, W4A16, W4A16_ASYM, W4A16_G64, "
            f"W3A16, W8A16, W4A8 ...) or one of {', '.join(PRESETS)}"
        )
    w, a = int(match["w"]), int(match["a"])
    flags = match["flags"].upper()
    if not 1 <= w <= 8:
        raise RecipeError(f"recipe: scheme {name!r} asks for weights of {w} bits; use 1 to 8")
    if not (2 <= a <= 8 or a == 16):
        raise RecipeError(f"recipe: scheme {name!r} asks for activations of {a} bits; use 2 to 8, or 16")
    given = re.sub("_STATIC_ASYM", "_STATIC", flags).split("_")[1:]
    blocks = [f for f in given if f in ("TENSOR", "CHANNEL") or f[0] == "G"]
    if len(blocks) > 1 or len(set(given)) < len(given):
        raise RecipeError(f"recipe: scheme {name!r} says {' and '.join(blocks if len(blocks) > 1 else given)}; use one")
    static = "_STATIC" in flags
    asym_input = "_STATIC_ASYM" in flags
    asym_weight = "_ASYM" in flags.replace("_STATIC_ASYM", "")
    if w == 1 and not asym_weight:
        raise RecipeError(
            f"recipe: scheme {name!r} has the codes -1 and 0 and would round every weight to 0; use 'W1A{a}_ASYM'"
        )
    if static and a == 16:
        raise RecipeError(f"recipe: scheme {name!r} is static but keeps float activations; drop '_STATIC'")
    if group := re.search(r"_G(\d+)", flags):
        block = (1, int(group[1]))
    elif "_TENSOR" in flags:
        block = (-1, -1)
    else:
        block = (1, -1) if "_CHANNEL" in flags or w == 8 else (1, GROUP)
    if block[1] == 0:
        raise RecipeError(f"recipe: scheme {name!r} has a group of 0; use a positive group size")
    grid = Int(w, signed=not asym_weight, narrow=w == 8 and not asym_weight)
    double = "DQ" in given
    if double and (asym_weight or block[1] == -1):
        has = "zero points" if asym_weight else "no groups"
        raise RecipeError(f"recipe: scheme {name!r} has {has}; '_DQ' is for groups without zero points: 'W4A8_DQ_G128'")
    weight = QSpec(grid, block, symmetric=not asym_weight, scale=MULTIPLES if double else None)
    if a == 16:
        return Scheme(weight)
    x_grid = Int(a, signed=not asym_input, narrow=not asym_input)
    x_block = (-1, -1) if static else (1, -1)
    return Scheme(weight, QSpec(x_grid, x_block, symmetric=not asym_input, dynamic=not static))


def scheme_from(value: str | Mapping[str, object] | Scheme | None) -> Scheme | None:
    """A scheme from a name, {"preset": name, "group_size": n}, `Scheme.to_dict`'s form, or None (keep float)."""
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        return parse_scheme(value)
    if not isinstance(value, Mapping):
        raise RecipeError(f"recipe: a scheme is a name, a mapping, or null, not {value!r}")
    if "preset" in value:
        if unknown := set(value) - {"preset", "group_size"}:
            raise RecipeError(f"recipe: unknown scheme keys {sorted(unknown)}; use 'preset' and 'group_size'")
        scheme = parse_scheme(str(value["preset"]))
        group = value.get("group_size")
        if group is None:
            return scheme
        if not isinstance(group, int) or isinstance(group, bool) or not (group > 0 or group == -1):
            raise RecipeError(f"recipe: group_size is {group!r}; use a positive number, or -1 for a scale per channel")
        return scheme.with_group(group)
    try:
        return Scheme.from_dict(value)
    except KeyError as e:
        raise RecipeError(
            f"recipe: scheme {dict(value)!r} lacks {e}; write its name, or 'preset', or 'weight'"
        ) from None
    except (ValueError, TypeError) as e:
        raise RecipeError(f"recipe: bad scheme {dict(value)!r}: {e}") from None


def scheme_label(scheme: Scheme) -> str:
    """A short name for tables: the shortest name of the grammar that stands for this scheme, or a description."""
    for name, preset in PRESETS.items():
        if preset == scheme:
            return name
    size = scheme.weight.block[1]
    for table in _TABLES:
        for name in (f"{table}{double}{block}" for double in ("", "_DQ") for block in (f"_G{abs(size)}", "_CHANNEL")):
            if parse_scheme(name) == scheme:
                return name
    base = f"W{scheme.weight.grid.bits}A{scheme.input.grid.bits if scheme.input else 16}"
    for weight in ("", "_ASYM", "_DQ"):
        for block in ("", "_CHANNEL", "_TENSOR", *((f"_G{size}",) if size > 0 else ())):
            for x in ("", "_STATIC", "_STATIC_ASYM"):
                with contextlib.suppress(RecipeError):  # not every combination is a scheme
                    if parse_scheme(base + weight + block + x) == scheme:
                        return base + weight + block + x
    return f"{_describe(scheme.weight)} x {_describe(scheme.input) if scheme.input else 'float'}"


def _describe(spec: QSpec) -> str:
    """For example "int8 per tensor, dynamic"."""
    grid = spec.grid
    if isinstance(grid, Codebook):
        kind = grid.name
    else:
        kind = f"{'' if grid.signed else 'u'}int{grid.bits}" if isinstance(grid, Int) else f"e{grid.exp}m{grid.man}"
    block = {(-1, -1): "per tensor", (1, -1): "per row"}.get(spec.block, "per {} x {}".format(*spec.block))
    inner = f", scales {_describe(spec.scale)}" if spec.scale else ""
    return f"{kind} {block}{', dynamic' if spec.dynamic else ''}{inner}"
