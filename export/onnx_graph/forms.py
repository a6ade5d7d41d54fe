"""What of a model is exported: its forward as a function of tensors, with the names that ONNX files have by custom.

The names are those of Optimum and ONNX Runtime GenAI: `input_ids`, `attention_mask`, `position_ids`,
`past_key_values.0.key`, `logits`, `present.0.key`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qfx._manifest import one_line
from qfx.core.errors import PackageError

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model"
"""Names of the files."""


@dataclass
class Form:
    """One graph.

    Attributes:
        name: of the file.
        wrap: makes the module to export from the model.
        inputs: example tensors by name, in the order of the module's arguments.
        outputs: names.
        dims: names of the sizes that vary, by input.
        variadic: how many of the last inputs the module takes as `*args`.
        cache: per layer, (heads, head size) of the keys, if the graph has a cache.
        note: what a reader of the export should know of this form.
        otherwise: makes the form to take if this one does not export, from the reason.
    """

    name: str
    wrap: Any
    inputs: dict[str, Tensor]
    outputs: list[str]
    dims: dict[str, dict[int, str]]
    variadic: int = 0
    cache: list[tuple[int, int]] = field(default_factory=list)
    note: str = ""
    otherwise: Callable[[str], Form] | None = None


class _Plain(nn.Module):
    """Named tensors to the tensors of a `ModelOutput`, without a cache."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: Sequence[str], settings: Mapping[str, Any]):
        super().__init__()
        self.model, self.names, self.outputs, self.settings = model, tuple(names), tuple(outputs), dict(settings)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.names, values, strict=True)), **self.settings)
        return tuple(_named(out)[name] for name in self.outputs)


class _Cached(nn.Module):
    """Tokens and the cache so far to logits and the cache from now on, all as plain tensors."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        tokens, past = values[: len(self.names)], values[len(self.names) :]
        cache = DynamicCache()  # without a config it keeps all tokens of windowed layers too; the mask has the window
        for i in range(0, len(past), 2):
            cache.update(past[i], past[i + 1], i // 2)
        named = dict(zip(self.names, tokens, strict=True))
        out = self.model(**named, **{_cache_argument(self.model): cache}, use_cache=True)
        # the cache is changed in place, under whatever name the output has it
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (out.logits, *kept)


class _Decoder(nn.Module):
    """The decoder of a model whose encoder has run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        given = {} if mask is None else {"attention_mask": mask}
        out = self.model(encoder_outputs=(states,), decoder_input_ids=input_ids, use_cache=False, **given)
        return out.logits


def forms_of(model: Any, example: Mapping[str, Tensor], cache: bool | None) -> list[Form]:
    """The graphs that a model is exported as.

    Args:
        model: it is run on small inputs, to see what it gives.
        example: its inputs by name; sizes matter where they do not vary.
        cache: whether a decoder takes and gives keys and values; None: if it can.

    Raises:
        PackageError: it has no outputs that can be named, or no cache that a file can hold.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        if cache:
            raise PackageError("a cache of an encoder-decoder model is not exported; pass cache=False")
        return _encoder_decoder(model, example)
    generates = "input_ids" in example and _generates(model)
    if cache and not generates:
        raise PackageError(f"{type(model).__name__} does not generate text; it has no cache to export")
    if not generates:
        return [_plain(model, example)]
    if cache is False:
        return [_plain(model, _as_padded(model, example))]
    try:
        form = _cached(model, example)
    except Exception as e:  # also what the model's own code raises for a cache that is not its own
        reason = str(e) if isinstance(e, PackageError) else f"{type(e).__name__}: {one_line(e)}"
        if cache:
            raise PackageError(
                f"{type(model).__name__} is not exported with a cache ({reason}); pass cache=False"
            ) from e
        return [_without_cache(model, example, reason)]
    if cache is None:
        form.otherwise = lambda reason: _without_cache(model, example, reason)
    return [form]


def _without_cache(model: Any, example: Mapping[str, Tensor], reason: str) -> Form:
    form = _plain(model, _as_padded(model, example))
    form.note = f"{form.name}.onnx has no cache, each token reads all before it anew: {reason}"
    return form


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)()) and bool(_cache_argument(model))


def _cache_argument(model: nn.Module) -> str:
    """The argument that takes the cache: transformers 5.24 renamed it."""
    takes = _arguments(model)
    return next((name for name in ("cache", "past_key_values") if name in takes), "")


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _plain(model: nn.Module, example: Mapping[str, Tensor]) -> Form:
    takes = _arguments(model)
    settings: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    found = _named(model(**example, **settings))
    inputs = {k: _at_least_two(v) for k, v in example.items()}
    names = list(inputs)
    # of what is not tokens, only the batch varies
    dims = {
        k: {0: BATCH, 1: SEQUENCE} if v.dim() == 2 and not v.is_floating_point() else {0: BATCH}
        for k, v in inputs.items()
    }
    return Form(MODEL, lambda m: _Plain(m, names, list(found), settings), inputs, list(found), dims, len(names))


def _cached(model: Any, example: Mapping[str, Tensor]) -> Form:
    tokens = {"input_ids": _at_least_two(example["input_ids"])[:, :8]}
    batch, length = tokens["input_ids"].shape
    layers = _cache_layers(model, tokens)
    past, device = 3, tokens["input_ids"].device
    tokens["attention_mask"] = torch.ones(batch, past + length, dtype=torch.int64, device=device)
    if "position_ids" in _arguments(model):
        tokens["position_ids"] = torch.arange(past, past + length, device=device).expand(batch, -1).contiguous()
    inputs, dims = dict(tokens), {k: {0: BATCH, 1: SEQUENCE} for k in tokens}
    dims["attention_mask"] = {0: BATCH, 1: TOTAL}
    dtype = next(p.dtype for p in model.parameters())
    outputs, sizes = ["logits"], []
    for i, pair in enumerate(layers):
        sizes.append((pair[0].shape[1], pair[0].shape[3]))
        for leaf, t in zip(("key", "value"), pair, strict=True):
            inputs[f"past_key_values.{i}.{leaf}"] = torch.zeros(
                batch, t.shape[1], past, t.shape[3], dtype=dtype, device=device
            )
            dims[f"past_key_values.{i}.{leaf}"] = {0: BATCH, 2: PAST}
            outputs.append(f"present.{i}.{leaf}")
    names = list(tokens)
    return Form(MODEL, lambda m: _Cached(m, names), inputs, outputs, dims, len(inputs), sizes)


def _cache_layers(model: Any, tokens: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer after a run; PackageError if the cache holds anything else."""
    from transformers import DynamicCache

    length = tokens["input_ids"].shape[1]
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if others := kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise PackageError(f"its cache holds {', '.join(sorted(others))}, not only keys and values")
    cache = DynamicCache()
    model(**tokens, **{_cache_argument(model): cache}, use_cache=True)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if not pairs or any(t is None or t.dim() != 4 or t.shape[2] != length for pair in pairs for t in pair):
        raise PackageError("its cache holds no keys and values of shape [batch, heads, tokens, size]")
    return pairs


def _encoder_decoder(model: Any, example: Mapping[str, Tensor]) -> list[Form]:
    """The encoder, of tokens with a mask or of whatever the model takes first; and the decoder on its output."""
    tokens, source = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 1: "encoder_sequence_length"}
    masked = "input_ids" in example
    if masked:
        first = {"input_ids": _at_least_two(example["input_ids"])}
        first["attention_mask"] = torch.ones_like(first["input_ids"])
    else:  # sounds and images: of their sizes only the batch varies
        first = {k: _at_least_two(v) for k, v in example.items() if not k.startswith("decoder_")}
        source = {0: BATCH}
    if (target := example.get("decoder_input_ids", first["input_ids"][:, :2] if masked else None)) is None:
        raise PackageError("pass example= with decoder_input_ids beside the encoder's inputs")
    target = _at_least_two(target)
    states = model.get_encoder()(**first).last_hidden_state
    names = list(first)
    encoder = Form(
        ENCODER,
        lambda m: _Plain(m.get_encoder(), names, ["last_hidden_state"], {}),
        first,
        ["last_hidden_state"],
        {k: tokens if masked else {0: BATCH} for k in names},
        len(names),
    )
    inputs = {"input_ids": target, "encoder_hidden_states": states}
    dims = {"input_ids": tokens, "encoder_hidden_states": source}
    if masked:
        inputs["encoder_attention_mask"], dims["encoder_attention_mask"] = first["attention_mask"], source
    return [encoder, Form(DECODER, _Decoder, inputs, ["logits"], dims)]


def _as_padded(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ids with a mask and positions: what a runtime that pads on the left hands over."""
    ids, takes = example["input_ids"], _arguments(model)
    given = {"input_ids": ids}
    if "attention_mask" in takes:
        given["attention_mask"] = torch.ones_like(ids)
        if "position_ids" in takes:  # without a mask, some models would look for packed sequences in them
            given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1).contiguous()
    return {**given, **{k: v for k, v in example.items() if k not in given}}


def _named(out: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by name."""
    if isinstance(out, Tensor):
        return {"output": out}
    pairs = out.items() if hasattr(out, "items") else ((f"output_{i}", t) for i, t in enumerate(out))
    found = {k: t for k, t in pairs if isinstance(t, Tensor)}
    if not found:
        raise PackageError(f"the model gives a {type(out).__name__} without tensors; there is nothing to export")
    return found


def _at_least_two(x: Tensor) -> Tensor:
    """Sizes of one would be fixed by the export: repeat them."""
    for dim in range(min(x.dim(), 2)):
        if x.shape[dim] == 1:
            x = x.repeat_interleave(2, dim)
    return x.contiguous()
