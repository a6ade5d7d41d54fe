"""The codes that a graph multiplies with quantized weights, to compare two graphs step by step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx.kernels import fp8_gemm, fp8_linear, int8_gemm, int8_linear, quantize_rows  # noqa: F401 (registers the ops)

ops = torch.ops.qfx
_LINEARS = (ops.int8_linear.default, ops.fp8_linear.default)
_PRODUCTS = (ops.int8_gemm.default, ops.fp8_gemm.default)


@dataclass
class Codes:
    """A backend for `torch.compile` that runs a graph op by op.

    Attributes:
        seen: of each product: the weight's codes `[out, in]`, and those of its input `[tokens, in]`.
        graphs: what it got.
    """

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)

    __name__ = "codes"

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return lambda *args: _Recording(gm, self.seen).run(*args)

    def ops(self) -> list[str]:
        """Names of the ops of all graphs."""
        calls = [n for gm in self.graphs for n in gm.graph.nodes if n.op == "call_function"]
        return [str(n.target).removesuffix(".default") for n in calls]


class _Recording(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(gm)
        self.seen = seen

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _LINEARS:
            names = [a.name for a in target._schema.arguments]
            a = dict(zip(names, args, strict=False))
            codes, _ = ops.quantize_rows(a["x"], a["x_grid"], a["x_scale"], None)
            self.seen.append((a["codes"], codes.reshape(-1, codes.shape[-1])))
        elif target in _PRODUCTS:
            self.seen.append((args[2], args[0].reshape(-1, args[0].shape[-1])))
        return super().call_function(target, args, kwargs)


@dataclass
class Difference:
    """How the codes of two graphs differ.

    Attributes:
        linears: products of the first that the second has, too, alone or joined with others.
        codes: how many codes there are.
        moved: how many of them differ.
        steps: by how many steps of the grid at most.
        first: the same two numbers of the first product whose input differs; what is behind it follows.
    """

    linears: int = 0
    codes: int = 0
    moved: int = 0
    steps: int = 0
    first: tuple[int, int] = (0, 0)


def compare(plain: Codes, fused: Codes) -> Difference:
    """Products are matched by their weights' codes, of which a joined one has several below each other."""
    result, rest = Difference(), list(fused.seen)
    taken = [0] * len(rest)
    for weight, codes in plain.seen:
        for i, (others, theirs) in enumerate(rest):
            rows = others[taken[i] : taken[i] + len(weight)]
            if rows.shape == weight.shape and theirs.shape == codes.shape and torch.equal(_steps(rows), _steps(weight)):
                apart = (_steps(codes) - _steps(theirs)).abs()
                moved, steps = int((apart > 0).sum()), int(apart.max()) if apart.numel() else 0
                result.linears += 1
                result.codes += apart.numel()
                result.moved += moved
                result.steps = max(result.steps, steps)
                result.first = result.first if result.first[0] else (moved, steps)
                taken[i] += len(weight)
                break
    return result


def _steps(codes: Tensor) -> Tensor:
    """Numbers of which neighbours on the grid are one apart; floats of 8 bits are sign and magnitude."""
    if not codes.is_floating_point():
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)
