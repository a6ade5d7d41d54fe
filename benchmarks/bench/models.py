"""Whole models for benchmarks: well-known shapes, random weights made on the GPU and rounded to nearest."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import qfx
from bench import timing
from qfx.core.qtensor import encode_minmax
from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear

POSITIONS = 256
"""Length of the cache that a decoding step reads."""
AT = 200
"""The position that the step writes."""


def config(name: str, layers: int | None = None) -> Any:
    """The Hugging Face config of a model's shape, with fewer layers if asked."""
    from transformers import LlamaConfig, OPTConfig

    llama: dict[str, dict[str, int]] = {
        "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
        "llama-2-7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    }
    opt = {"opt-13b": (5120, 40, 40), "opt-30b": (7168, 48, 56)}
    tiny = {"num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 2048}  # to try the script itself
    if name in llama:
        sizes = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192}
        return LlamaConfig(**sizes, **llama[name], num_hidden_layers=layers or 32)
    if name in opt:
        width, depth, heads = opt[name]
        sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
        return OPTConfig(**sizes, num_hidden_layers=layers or depth, vocab_size=50272, dropout=0.0)
    if name == "tiny-llama":
        return LlamaConfig(**tiny, hidden_size=256, intermediate_size=512, num_hidden_layers=layers or 2)
    if name == "tiny-opt":
        return OPTConfig(**tiny, hidden_size=256, word_embed_proj_dim=256, ffn_dim=512, num_hidden_layers=layers or 2)
    raise SystemExit(f"model: no shape {name!r}; use {', '.join([*llama, *opt])}")


def build(name: str, layers: int | None, device: str) -> nn.Module:
    """A bf16 model with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=torch.bfloat16, attn_implementation="sdpa")
    for where, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0.0, 0.02)
        else:
            p.data.fill_(1.0 if where.endswith("weight") else 0.0)  # of norms; biases
    return model.to(device).eval()


def quantize(model: nn.Module, scheme_name: str, head: bool = False) -> int:
    """Replaces all linears, but the output head without `head`, by quantized ones, one at a time; returns how many."""
    scheme = parse_scheme(scheme_name)
    kept = None if head else model.get_output_embeddings()  # type: ignore[operator]
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and m is not kept]
    for name in names:  # names only: a list of modules would keep the old weights
        linear = model.get_submodule(name)
        weight = linear.weight.detach()
        new = QLinear.from_qtensor(encode_minmax(weight, scheme.weight), linear.bias, scheme, dtype=weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.eval())
        del linear, weight
    return len(names)


def lower(model: nn.Module, ids: Tensor) -> str:
    """`qfx.lower`, and what it says."""
    fn = getattr(qfx, "lower", None)
    if fn is None:
        return "not lowered: this version of qfx has no `lower`"
    report = fn(model, {"input_ids": ids})
    return str(report)


def compiled(model: nn.Module, scope: str, settings: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The model as it is called: `eager`; `compile`, one graph; `layers`, every layer by itself, far sooner compiled.

    Args:
        model: the model.
        scope: one of these.
        settings: arguments of torch.compile.
    """
    torch.compiler.reset()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for layer in layers:
        layer._compiled_call_impl = None
    if scope == "compile":
        return torch.compile(model, dynamic=False, **(settings or {}))  # type: ignore[return-value]
    if scope == "layers":
        torch._dynamo.config.recompile_limit = 16 * len(layers)  # once for each layer's index and each shape
        for layer in layers:
            layer.compile(dynamic=False, **(settings or {}))
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    own = [t for p in [*model.parameters(), *model.buffers()] for t in _inside(p)]
    return sum({t.data_ptr(): min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in own}.values())


def _inside(t: Tensor) -> list[Tensor]:
    """The tensors that a tensor of another library's class is made of, or the tensor itself."""
    if not hasattr(t, "__tensor_flatten__"):
        return [t]
    return [x for name in t.__tensor_flatten__()[0] for x in _inside(getattr(t, name))]


def free() -> None:
    """Gives back what a deleted model held, compiled code included."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


Prepared = Callable[[], timing.Timing]
"""A case that was run once; a call measures it."""


@dataclass
class Step:
    """One decoding step over a static cache, at a fixed position."""

    run: Callable[[], Tensor]
    reset: Callable[[], None]


def decode_step(model: nn.Module, forward: Callable[..., Any], batch: int) -> Step:
    """A step of `forward`: the model, compiled or not. Mask and positions are given, so that no step makes them."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=POSITIONS)
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # the cache allocates itself
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    mask = (torch.arange(POSITIONS, device=device) <= AT).expand(batch, 1, 1, POSITIONS).contiguous()
    place = torch.full((batch, 1), AT, device=device)

    def run() -> Tensor:
        given = {"attention_mask": mask, "position_ids": place}
        return _result(forward(input_ids=ids, past_key_values=cache, use_cache=True, **given))

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(AT)

    reset()
    return Step(run, reset)


def _result(out: Any) -> Tensor:
    """Logits, or what the layers give, of a model without a head."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def decode_case(model: nn.Module, forward: Callable[..., Any], batch: int, replays: int = 20) -> Prepared:
    """A step in a CUDA graph; the cache's length is set back between replays, outside of the time."""
    step = decode_step(model, forward, batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.reset()
            logits = step.run()
    torch.cuda.current_stream().wait_stream(stream)
    if not logits.isfinite().all():
        raise ArithmeticError("the logits are not finite")
    del logits
    graph, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    with torch.cuda.graph(back):
        step.reset()

    def measure() -> timing.Timing:
        times = []
        for _ in range(replays + 2):
            back.replay()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return timing.summary(times[2:], 1)

    measure.step = step  # type: ignore[attr-defined]  # the graph reads its tensors
    return measure


def prefill_case(forward: Callable[..., Any], ids: Tensor, head: bool = True, repeats: int = 7) -> Prepared:
    """A pass over a prompt without a cache, in a CUDA graph; with a head, logits of the last position only.

    What is returned also has `launched`, the milliseconds of a pass that the host launches op by op: more where the
    host is the slower one.
    """

    kept = {"logits_to_keep": 1} if head else {}

    def call() -> Tensor:
        return _result(forward(input_ids=ids, use_cache=False, **kept))

    if not call().isfinite().all():
        raise ArithmeticError("the logits are not finite")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    once = timing.event_time([call], 1).us
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    count = repeats if once < 5e5 else 2

    def measure() -> timing.Timing:
        measure.launched = timing.event_time([call], count).us / 1e3  # type: ignore[attr-defined]
        return timing.event_time([graph.replay], count)

    measure.graph = graph  # type: ignore[attr-defined]  # its memory
    return measure
