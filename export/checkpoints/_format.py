"""What a checkpoint format is: how one quantized linear becomes named tensors, and how it comes back.

A format sees one linear at a time, so that folders are written and read shard by shard. Whatever is not a quantized
linear (norms, embeddings, linears kept in float) has the names and values that the float model gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, dtype

from qfx.core.qtensor import QTensor
from qfx.core.spec import Scheme


@dataclass(frozen=True)
class LinearWeights:
    """A quantized linear as plain tensors.

    Attributes:
        name: its path in the model, `model.layers.0.mlp.up_proj`.
        weight: codes, scales and zero points, `[out, in]`.
        scheme: its `weight` is the spec of `weight`.
        dtype: of the output layer around it: what float tensors of the checkpoint have.
        bias: `[out]`, or None.
        input_scale: float32 scalar, if the scheme's input is static.
        input_zero: int32 scalar, if that is asymmetric as well.
    """

    name: str
    weight: QTensor
    scheme: Scheme
    dtype: dtype
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


class Format(Protocol):
    """One checkpoint format.

    Attributes:
        name: as `qfx.save(format=...)` has it.
    """

    name: str

    def refuses(self, layer: LinearWeights) -> str | None:
        """None if the format expresses the linear bit for bit; otherwise why not, and the nearest that it does."""
        ...

    def config(self, layers: Sequence[LinearWeights], floats: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of the whole model.

        Args:
            layers: every quantized linear; their tensors are on the meta device, with shapes and dtypes alone.
            floats: the paths of linears that stay in float, and of routers.

        Raises:
            PackageError: the layers cannot stand in one checkpoint of this format.
        """
        ...

    def write(self, layer: LinearWeights) -> dict[str, Tensor]:
        """The linear's tensors by leaf name (`weight_packed`, `weight_scale`, `bias` ...), contiguous."""
        ...

    def leaves(self, config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        """Leaf names that a quantized linear of this path may have in such a checkpoint; None if it stays in float."""
        ...

    def read(self, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], dtype: dtype) -> LinearWeights:
        """The inverse of `write`.

        Args:
            config: the folder's `quantization_config`, of this qfx or of another tool.
            name: the linear's path.
            tensors: what the folder has under that path, by leaf name.
            dtype: the model's.

        Raises:
            PackageError: the tensors are not of the form that the config says, or of one that qfx does not compute.
        """
        ...
