"""Modules that a person might write, with none of a library's conventions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decoders import BATCH, LENGTH, VOCAB, Row, token_inputs

HIDDEN, INNER, HEADS, HEAD_DIM = 64, 96, 4, 8


def feature_inputs() -> dict[str, Tensor]:
    """Return seeded features (batch, sequence, hidden)."""
    generator = torch.Generator().manual_seed(4)
    return {"x": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator)}


def sequential_inputs() -> dict[str, Tensor]:
    """Return features under the name that `nn.Sequential` gives its argument."""
    return {"input": feature_inputs()["x"]}


def matrix(*shape: int) -> nn.Parameter:
    """Return a raw weight."""
    return nn.Parameter(torch.randn(*shape))


def vector(size: int, value: float) -> nn.Parameter:
    """Return a raw gain or bias."""
    return nn.Parameter(torch.full((size,), value))


def split_heads(x: Tensor) -> Tensor:
    """Reshape (batch, sequence, heads * head_dim) to (batch, heads, sequence, head_dim)."""
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`."""
    return x.transpose(1, 2).flatten(-2)


def build_mlp() -> nn.Module:
    """Build a norm and two layers, as a plain sequence."""
    return nn.Sequential(
        nn.LayerNorm(HIDDEN),
        nn.Linear(HIDDEN, INNER),
        nn.ReLU(),
        nn.Linear(INNER, HIDDEN),
    )


class FusedAttention(nn.Module):
    """Pre-norm causal attention whose query, key and value are one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(merge_heads(attended))


class FeedForward(nn.Module):
    """Pre-norm two-layer perceptron with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class BlockStack(nn.Module):
    """A small language model of pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.Sequential(
            FusedAttention(),
            FeedForward(),
            FusedAttention(),
            FeedForward(),
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(input_ids))))


class HandRMSNorm(nn.Module):
    """RMS norm spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = vector(HIDDEN, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class SwiGLUBlock(nn.Module):
    """Hand-written RMS norm and gated perceptron, twice."""

    def __init__(self, norm: type[nn.Module] = HandRMSNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(INNER, HIDDEN, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, gate, up, down in zip(self.norms, self.gates, self.ups, self.downs, strict=True):
            h = norm(x)
            x = x + down(F.silu(gate(h)) * up(h))
        return x


class NativeRMSNorm(nn.RMSNorm):
    """The RMS norm of torch, at the size of this file."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, eps=1e-6)


class RawParameters(nn.Module):
    """Weights that belong to no layer: functional linears, and a product kept (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.norm_bias = vector(HIDDEN, 1.0), vector(HIDDEN, 0.0)
        self.w_up, self.up_bias = matrix(INNER, HIDDEN), vector(INNER, 0.0)
        self.w_down = matrix(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (HIDDEN,), self.gain, self.norm_bias)
        return x + F.relu(F.linear(h, self.w_up, self.up_bias)) @ self.w_down


class EinsumBlock(nn.Module):
    """Attention in which projections, scores and output are all einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.w_q = matrix(HEADS, HEAD_DIM, HIDDEN)
        self.w_k = matrix(HEADS, HEAD_DIM, HIDDEN)
        self.w_v = matrix(HEADS, HEAD_DIM, HIDDEN)
        self.w_o = matrix(HIDDEN, HEADS, HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (torch.einsum("bsd,hkd->bhsk", h, w) for w in (self.w_q, self.w_k, self.w_v))
        scores = torch.einsum("bhqk,bhsk->bhqs", q, k) * HEAD_DIM**-0.5
        mixed = torch.einsum("bhqs,bhsk->bqhk", scores.softmax(-1), v)
        return x + torch.einsum("bqhk,dhk->bqd", mixed, self.w_o)


class SharedBlock(nn.Module):
    """One block applied twice: a fold into it must hold for both of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = FeedForward()
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.block(x))))


class SharedLinear(nn.Module):
    """One linear after two different norms: neither gain can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.down(F.relu(self.linear(self.norm_a(x))))
        return y + self.down(F.relu(self.linear(self.norm_b(y))))


class NormToResidual(nn.Module):
    """A norm read by a linear and by the residual: its gain may not simply leave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.down(F.relu(self.up(h)))


class BranchingOutput(nn.Module):
    """A hidden state that is read by a linear and also returned to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return self.down(F.relu(self.up(h))), h


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


class ConvStem(nn.Module):
    """A convolution and a batch norm in front of a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.bn = nn.BatchNorm1d(HIDDEN)
        self.block = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(self.bn(self.conv(x.transpose(1, 2)))).transpose(1, 2))


def build_encoder_layer() -> nn.Module:
    """Build the pre-norm encoder layer of torch."""
    return nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, norm_first=True, batch_first=True)


def encoder_layer_inputs() -> dict[str, Tensor]:
    """Return features under the name that `nn.TransformerEncoderLayer` gives them."""
    return {"src": feature_inputs()["x"]}


USER_MODULES: tuple[Row, ...] = (
    ("mlp", build_mlp, sequential_inputs, "user"),
    ("block_stack", BlockStack, token_inputs, "user"),
    ("swiglu", SwiGLUBlock, feature_inputs, "user"),
    ("swiglu_native_norm", lambda: SwiGLUBlock(NativeRMSNorm), feature_inputs, "user"),
    ("raw_parameters", RawParameters, feature_inputs, "user"),
    ("einsum", EinsumBlock, feature_inputs, "user"),
    ("shared_block", SharedBlock, feature_inputs, "user"),
    ("shared_linear", SharedLinear, feature_inputs, "user"),
    ("norm_to_residual", NormToResidual, feature_inputs, "user"),
    ("branching_output", BranchingOutput, feature_inputs, "user"),
    ("multihead_attention", SelfAttention, feature_inputs, "user"),
    ("conv_stem", ConvStem, feature_inputs, "user"),
    ("torch_encoder_layer", build_encoder_layer, encoder_layer_inputs, "user"),
)
