"""The linears of a model, found by walking its modules and by no graph: what a report may not leave out."""

from torch import nn

TABLES = {"cls_token", "distillation_token", "mask_token", "register_tokens", "probe", "position_embeddings"}
"""Leaf names of parameters that have two axes or more and are added or looked up, never multiplied with."""


def layers(model: nn.Module) -> list[set[str]]:
    """Return, for each parameter that some product reads, all its names, without a trailing `.weight`.

    A tied weight has several names; it is a layer if one of them belongs to a linear.
    """
    names: dict[int, set[str]] = {}
    multiplied: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            names.setdefault(id(parameter), set()).add(name.removesuffix(".weight"))
            if parameter.ndim > 1 and not _is_table(module, leaf):
                multiplied.add(id(parameter))
    return [found for key, found in names.items() if key in multiplied]


def _is_table(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd) or "Norm" in type(module).__name__:
        return True
    return leaf in TABLES or leaf.endswith("bias") or leaf.endswith("bias_table")
