"""The format of GPTQ checkpoints, as AutoGPTQ and GPTQModel write it and vLLM, SGLang and transformers read it.

A linear `[out, in]` of b bits is, with `u` the code counted from the lowest one and `z` its zero point, so that the
weight is `(u - z) * scale`:

- `qweight` int32 `[in * b / 32, out]`: u, packed along the inputs (`_words.py`).
- `qzeros` int32 `[groups, out * b / 32]`: z, packed along the outputs; format `gptq` stores z - 1, `gptq_v2` z itself.
- `scales` `[groups, out]`, `g_idx` int32 `[in]` (the group of each input), `bias` `[out]`.

Symmetric weights have z = 2^(b-1). Scales are float16 where that holds them bit for bit and otherwise float32, which
qfx reads as they were; other readers cast them to the model's dtype, an error of at most 2^-11 of the scale in float16.
A weight of 8 bits that comes back has the narrow grid if no code is -128.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import Int
from qfx.core.qtensor import QTensor
from qfx.core.spec import QSpec, Scheme
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints._words import (
    HEAD,
    check_shape,
    groups_of,
    least_scale,
    named_within,
    pack,
    refusal,
    take,
    unpack,
)

WIDTHS = (2, 3, 4, 8)
METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"


class Settings(NamedTuple):
    """What may differ from linear to linear; the names are those of the config."""

    bits: int
    group_size: int
    sym: bool


class Gptq:
    """Weights of 2, 3, 4 or 8 bits in groups or rows, in any order of columns.

    Args:
        checkpoint_format: `gptq`, which all readers know, or `gptq_v2`, which holds zero points of 0, too. `read` takes
            either, whatever is given here.
    """

    def __init__(self, checkpoint_format: str = V1) -> None:
        if checkpoint_format not in (V1, V2):
            raise PackageError(f"gptq: checkpoint_format is {checkpoint_format!r}; use {V1!r} or {V2!r}")
        self.name = checkpoint_format

    def refuses(self, layer: LinearWeights) -> str | None:
        """As `Format` says."""
        weight = layer.weight
        if reason := refusal(layer.scheme, weight, WIDTHS):
            return f"{self.name} {reason}"
        if self.name == V1 and weight.zero is not None and bool((weight.zero == 0).any()):
            return f"{V1} stores zero points minus one, and some here are 0; use format={V2!r} or a symmetric scheme"
        return None

    def config(self, layers: Sequence[LinearWeights], floats: Sequence[str]) -> dict[str, Any]:
        """As `Format` says: what most linears have, and under `dynamic` those that differ.

        Linears that stay in float are named twice: vLLM, SGLang and GPTQModel read `dynamic`, transformers reads
        `modules_in_block_to_quantize`. Transformers does not read what else `dynamic` says.
        """
        settings = {layer.name: _settings_of(layer.weight.spec) for layer in layers}
        base = Counter(settings.values()).most_common(1)[0][0] if settings else Settings(4, 128, True)
        config: dict[str, Any] = {
            "quant_method": METHOD,
            "checkpoint_format": self.name,
            **base._asdict(),
            "desc_act": any(layer.weight.g_idx is not None for layer in layers),
            "lm_head": any(named_within(name, HEAD) for name in settings),
            "pack_dtype": "int32",
        }
        dynamic: dict[str, dict[str, Any]] = {}
        if floats:
            dynamic["-:" + _exactly(floats)] = {}
            if any(not named_within(name, HEAD) for name in floats):
                config["modules_in_block_to_quantize"] = [list(settings)]
        for other in sorted(set(settings.values()) - {base}):
            names = [name for name, own in settings.items() if own == other]
            differ = {k: v for k, v in other._asdict().items() if v != getattr(base, k)}
            dynamic["+:" + _exactly(names)] = differ
        return {**config, "dynamic": dynamic} if dynamic else config

    def write(self, layer: LinearWeights) -> dict[str, Tensor]:
        """As `Format` says."""
        q = layer.weight
        bits, (_, columns) = q.spec.grid.bits, q.codes.shape
        middle = 2 ** (bits - 1)
        # arithmetic of uint8 wraps, which is what signed codes need
        codes = q.codes.view(torch.uint8) + middle & 2**bits - 1 if q.zero is None else q.codes
        zero = torch.full_like(q.scale, middle, dtype=torch.int32) if q.zero is None else q.zero
        g_idx = _in_order(q.spec, columns).to(codes.device) if q.g_idx is None else q.g_idx
        found = {
            "qweight": pack(codes, bits).T,
            "qzeros": pack((zero - int(self.name == V1)).to(torch.uint8).T, bits),
            "scales": least_scale(q.scale).T,
            "g_idx": g_idx.to(torch.int32),
        }
        if layer.bias is not None:
            found["bias"] = layer.bias
        return {leaf: t.contiguous() for leaf, t in found.items()}

    def leaves(self, config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        """As `Format` says."""
        return None if _settings(config, name) is None else ("qweight", "qzeros", "scales", "g_idx", "bias")

    def read(
        self, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> LinearWeights:
        """As `Format` says."""
        settings = _settings(config, name)
        if settings is None:
            raise PackageError(f"gptq: {name} stays in float by quantization_config; read it as it is")
        bits, size, symmetric = settings
        qweight, qzeros, scales = take(METHOD, name, tensors)
        g_idx = tensors.get("g_idx")
        out, columns = scales.shape[1], qweight.shape[0] * 32 // bits if g_idx is None else g_idx.numel()
        groups = groups_of(METHOD, name, columns, size)
        check_shape(METHOD, f"{name}.scales", scales, (groups, out))
        check_shape(METHOD, f"{name}.qweight", qweight, (_words(name, columns, bits), out))
        check_shape(METHOD, f"{name}.qzeros", qzeros, (groups, _words(name, out, bits)))
        codes = unpack(qweight.T, bits)[:, :columns].contiguous()
        zero = _zero(config, name, unpack(qzeros, bits)[:, :out].T, bits)
        spec = QSpec(Int(bits, signed=False), (1, size), symmetric=False)
        if symmetric:
            middle = 2 ** (bits - 1)
            if not bool((zero == middle).all()):
                raise PackageError(
                    f"gptq: {name} has other zero points than {middle} though sym is true, which its readers take in "
                    "different ways; set sym to false if they are meant"
                )
            codes = (codes - middle).view(torch.int8)
            narrow = bits == 8 and not bool((codes == -128).any())
            spec = QSpec(Int(bits, narrow=narrow), (1, size))
        order = None if g_idx is None else _order(name, g_idx, spec, groups)
        weight = QTensor(codes, scales.T.contiguous(), None if symmetric else zero.contiguous(), spec, order)
        return LinearWeights(name, weight, Scheme(spec), dtype, tensors.get("bias"))


def _settings_of(spec: QSpec) -> Settings:
    return Settings(spec.grid.bits, spec.block[1], spec.symmetric)


def _exactly(names: Sequence[str]) -> str:
    """A pattern of these paths and no others; readers match patterns from the start of a path only."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def _settings(config: Mapping[str, Any], name: str) -> Settings | None:
    """What a config says of the linear of this path; None if it stays in float."""
    given = dict(config)
    for pattern, own in (config.get("dynamic") or {}).items():  # the first pattern that matches decides
        skipped = pattern.startswith("-:")
        try:
            matches = re.match(pattern.removeprefix("-:").removeprefix("+:"), name)
        except re.error as e:
            raise PackageError(f"gptq: dynamic has the pattern {pattern!r}, which is none ({e})") from None
        if matches and skipped:
            return None
        if matches:
            given.update(own)
            break
    head = named_within(name, HEAD)
    if head and not config.get("lm_head"):
        return None
    if (listed := config.get("modules_in_block_to_quantize")) and not head:
        flat = [part for item in listed for part in (item if isinstance(item, list) else [item])]
        if not any(name == part or name.endswith("." + part) for part in flat):
            return None
    return _checked(given)


def _checked(config: Mapping[str, Any]) -> Settings:
    kind = config.get("checkpoint_format") or config.get("format") or V1
    if kind not in (V1, V2) or config.get("is_marlin_format"):
        raise PackageError(f"gptq: checkpoint_format is {kind!r}; qfx reads {V1!r} and {V2!r}")
    if (words := config.get("pack_dtype", "int32")) != "int32":
        raise PackageError(f"gptq: pack_dtype is {words!r}; qfx reads words of int32")
    if changed := next((key for key in ("rotation", "adapter") if config.get(key)), None):
        raise PackageError(f"gptq: the config has {changed}, which changes the linear and which qfx does not compute")
    bits, size, symmetric = config.get("bits"), config.get("group_size"), config.get("sym", True)
    if bits not in WIDTHS:
        raise PackageError(f"gptq: bits is {bits!r}; qfx reads {', '.join(map(str, WIDTHS))}")
    if type(size) is not int or not (size > 0 or size == -1):
        raise PackageError(f"gptq: group_size is {size!r}; qfx reads positive sizes and -1")
    return Settings(bits, size, bool(symmetric))


def _words(name: str, values: int, bits: int) -> int:
    if bits == 3 and values % 32:
        raise PackageError(f"gptq: {name} has {values} values of 3 bits in a row, which fill no whole words")
    return -(-values * bits // 32)


def _zero(config: Mapping[str, Any], name: str, stored: Tensor, bits: int) -> Tensor:
    """Zero points, int32, from what is stored of them."""
    if (config.get("checkpoint_format") or config.get("format") or V1) == V2:
        return stored.to(torch.int32)
    if bool((stored == 2**bits - 1).any()):  # 0 - 1, or a field into which such a difference has borrowed
        raise PackageError(
            f"gptq: {name} has zero points of 0, which {V1!r} does not hold: its readers take them for {2**bits} or 0; "
            f"save the model as {V2!r}"
        )
    return stored.to(torch.int32) + 1


def _in_order(spec: QSpec, columns: int) -> Tensor:
    size = columns if spec.block[1] == -1 else spec.block[1]
    return torch.arange(columns, dtype=torch.int64) // size


def _order(name: str, g_idx: Tensor, spec: QSpec, groups: int) -> Tensor | None:
    """`g_idx` as a `QTensor` has it: None if it is the order of the columns."""
    if g_idx.dim() != 1 or g_idx.is_floating_point() or bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise PackageError(f"gptq: {name}.g_idx is not a list of the numbers of {groups} groups")
    order = g_idx.to(torch.int64)
    return None if torch.equal(order, _in_order(spec, len(order)).to(order.device)) else order
