"""Tiny models, quantized once for a module of tests, and how outputs are compared."""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qfx._tree import stored_names
from qfx.core.grid import Int
from qfx.core.qtensor import encode_minmax
from qfx.core.report import Report
from qfx.core.spec import parse_scheme
from qfx.modules.linear import QLinear
from qfx.package import Quantized, attach
from qfx.recipes import Recipe
from tests.zoo import ZOO

CLOSE = 1e-3
"""What sums in another order may change in logits, where scales of activations are stored or there are none. Dynamic
scales put the largest value half way between two codes (127.5), where any last bit decides: see `worst_linear`."""
SAME = 1e-5
"""A float32 sum of at most 96 products, in any order: 96 * 2^-24 = 6e-6."""


@functools.cache
def quantized(name: str, scheme: str, head: bool = False) -> Any:
    """A model of the zoo with its linears rounded, without a capture; do not change it."""
    model: Any
    model, inputs = ZOO[name].load()
    names, spec = stored_names(model), parse_scheme(scheme)
    for path, module in list(model.named_modules()):
        transposed = isinstance(module, Conv1D)
        if not isinstance(module, nn.Linear | Conv1D) or (module is model.get_output_embeddings() and not head):
            continue
        weight = module.weight.detach().T if transposed else module.weight.detach()
        static = spec.input is not None and not spec.input.dynamic
        linear = QLinear.from_qtensor(
            encode_minmax(weight, spec.weight),
            module.bias,
            spec,
            input_scale=0.03 if static else None,
            input_zero=117 if static and not spec.input.symmetric else None,
            dtype=weight.dtype,
        )
        model.set_submodule(path, linear)
    recipe = Recipe({"*": spec})
    report = Report(type(model).__name__, recipe.to_dict(), 1)
    attach(model, Quantized(report, recipe, {k: list(v.shape) for k, v in inputs.items()}), names)
    return model.eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    return ZOO[name].load()[1]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def worst_linear(theirs: nn.Module, ours: nn.Module) -> float:
    """The largest distance between outputs of one linear for one input, over all quantized linears of `ours`."""
    found = []
    for path, module in ours.named_modules():
        if isinstance(module, QLinear):
            x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                found.append(distance(theirs.get_submodule(path)(x), module(x)))
    assert found
    return max(found)


def by_transformers(folder: Path, cls: str, **settings: Any) -> Any:
    """The folder's model as transformers builds it; nothing is missing, unknown or of another shape."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, dtype="auto", **settings)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def wide(model: nn.Module) -> nn.Module:
    """The same with integer activations down to -128: engines end at -127, the library's CPU emulation does not."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, QLinear) and module.scheme.input is not None:
            x = module.scheme.input
            if x.grid != Int(8, narrow=True):
                continue
            scheme = replace(module.scheme, input=replace(x, grid=Int(8)))
            scales = {"input_scale": module.input_scale, "input_zero": module.input_zero}
            changed = QLinear.from_qtensor(module.qtensor(), module.bias, scheme, **scales, dtype=module.dtype)
            model.set_submodule(path, changed)
    return model


def codes(model: nn.Module) -> dict[str, Tensor]:
    """All that the quantized linears hold, as bytes."""
    return {
        f"{path}.{name}": buffer.contiguous().flatten().view(torch.uint8)
        for path, module in model.named_modules()
        if isinstance(module, QLinear)
        for name, buffer in module.named_buffers()
    }
