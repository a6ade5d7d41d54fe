"""What `model.py` compares: one whole model made smaller and compiled in one way, with every case ready to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import qfx
from bench import models, timing
from bench.peers import library

WAYS = ("bf16", "modules", "fused", "backend", "released", "torchao")
HELP = """a way, and what follows its colon:
  bf16                  the float model under Inductor; bf16:max-autotune-no-cudagraphs and the like: a mode of it
  modules:SCHEME        layers replaced and lowered as qfx.quantize does, under Inductor
  fused:SCHEME          the same under torch.compile(backend="qfx"), which fuses norms and activations with codes
  backend:SCHEME        the float model under torch.compile(backend="qfx", options={"recipe": SCHEME})
  released:SCHEME       the same, its float weights given back by `release()` after a first call
  torchao:int8|fp8|int4 torchao's layers under Inductor
with +head behind a scheme, as in fused:W4A16+head, the output head is quantized too"""


class Variant:
    """One model in one way.

    Args:
        name: of the model's shape.
        way: see HELP.
        layers: how many, or None for all.
        scope: "compile" for one graph of the whole model, "layers" for each layer by itself, "eager" for no compiling.
        device: where.
        body: without the output head, and the embeddings are not counted as weights.

    Attributes:
        row: what is known of it: bytes of weights, seconds of the first call of each case, notes.
    """

    def __init__(self, name: str, way: str, layers: int | None, scope: str, device: str, body: bool = False) -> None:
        self.name, self.way, self.layers, self.scope, self.device, self.body = name, way, layers, scope, device, body
        self.kind, _, option = way.partition(":")
        self.option, self.head = option.removesuffix("+head"), option.endswith("+head")
        if self.kind not in WAYS:
            raise SystemExit(f"model: no way {way!r}; use {HELP}")
        self.row: dict[str, Any] = {
            "model": name,
            "way": way,
            "scope": scope,
            "layers": layers,
            "body": body,
            "first": {},
        }
        self.model: nn.Module | None = None

    def build(self) -> None:
        """Makes the weights; only here a float model is in memory beside what stays."""
        began = time.perf_counter()
        model = models.build(self.name, self.layers, self.device)
        if self.kind in ("modules", "fused"):
            models.quantize(model, self.option, self.head)
        elif self.kind == "torchao":
            _torchao(model, self.option, self.head)
        models.free()
        self.row |= {"weights": models.stored_bytes(model), "seconds": time.perf_counter() - began}
        self.model = model

    def _lower(self) -> None:
        """Gives the layers their kernels."""
        if self.kind in ("modules", "fused"):
            assert self.model is not None
            ids = torch.randint(0, self.model.config.vocab_size, (1, 32), device=self.device)
            self.row["lowered"] = models.lower(self.model, ids)
            print(self.row["lowered"].partition("\n")[0], flush=True)
            models.free()
            self.row["weights"] = models.stored_bytes(self.model)  # in the kernels' layouts

    def imports(self) -> None:
        """Loads what building needs."""
        import transformers  # noqa: F401

        models.config(self.name)
        if self.kind == "torchao":
            library("torchao.quantization")

    def cases(
        self, decode: list[int], prefill: list[tuple[int, int]]
    ) -> Iterator[tuple[str, int, Callable[[], models.Prepared]]]:
        """Every case: its name, its tokens, and what compiles it, runs it once, and returns how to time it."""
        assert self.model is not None
        self._lower()
        if self.body:
            self.model = self.model.base_model
            embeddings = models.stored_bytes(self.model.get_input_embeddings())  # type: ignore[operator]
            self.row["weights"] = models.stored_bytes(self.model) - embeddings
            models.free()
        forward = models.compiled(self.model, self.scope, self._settings())
        if self.kind == "released":
            models.decode_step(self.model, forward, 1).run()
            self.row["freed"] = self.chosen.release()
            models.free()
            self.row["weights"] = models.stored_bytes(self.model)
        for batch in decode:
            case = f"decode {batch}"
            yield case, batch, partial(self._first, case, partial(models.decode_case, self.model, forward, batch))
        for batch, tokens in prefill:
            ids = torch.randint(0, self.model.config.vocab_size, (batch, tokens), device=self.device)
            case = f"prefill {batch}x{tokens}"
            yield (
                case,
                batch * tokens,
                partial(self._first, case, partial(models.prefill_case, forward, ids, not self.body)),
            )

    def _first(self, name: str, make: Callable[[], models.Prepared]) -> models.Prepared:
        began = time.perf_counter()
        made = make()
        torch.cuda.synchronize()
        self.row["first"][name] = time.perf_counter() - began
        return made

    def _settings(self) -> dict[str, Any]:
        """Arguments of torch.compile."""
        if self.kind in ("backend", "released"):
            self.chosen = qfx.backend({"schemes": {"*": self.option}} if self.head else self.option)
            return {"backend": self.chosen}
        if self.kind == "fused":
            return {"backend": "qfx"}
        if self.kind == "torchao" and self.option == "int8":  # a setting that torchao would make for all of the process
            return {"options": {"force_fuse_int_mm_with_mul": True}}
        return {"mode": self.option} if self.kind == "bf16" and self.option else {}


def measured(made: models.Prepared, tokens: int) -> dict[str, Any]:
    """Milliseconds of a case, tokens a second, and the most memory that was allocated meanwhile."""
    torch.cuda.reset_peak_memory_stats()
    taken: timing.Timing = made()
    ms = taken.us / 1e3
    rate = {"tokens_per_second": tokens / ms * 1e3, "peak": torch.cuda.max_memory_allocated()}
    launched = {"launched": made.launched} if hasattr(made, "launched") else {}
    return {"ms": ms, "low": taken.low / 1e3, "high": taken.high / 1e3, **launched, **rate}


def _torchao(model: nn.Module, kind: str, head: bool) -> None:
    """Torchao's own replacement of the same linears, without what it sets for Inductor as a whole."""
    quantization = library("torchao.quantization")
    if kind == "int8":
        config = quantization.Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    elif kind == "fp8":
        config = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
    else:
        config = quantization.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    kept = None if head else model.get_output_embeddings()  # type: ignore[operator]
    quantization.quantize_(model, config, lambda m, _: isinstance(m, nn.Linear) and m is not kept)
