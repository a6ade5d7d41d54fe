"""Quantized raw parameters: the experts of Mixtral and Qwen3-MoE in every implementation, and modules of one's own."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from qfx.core.errors import KernelError
from qfx.core.qtensor import dynamic_scale, fake_quantize
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.modules.parameter import QuantizingWeight, empty_parameter, parameter_qtensor, quantize_parameter
from tests.kernels.law import quantize_weight

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "mixtral": MixtralConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **SIZE),
    "qwen3_moe": Qwen3MoeConfig(
        intermediate_size=48, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=8, **SIZE
    ),
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
NAMES = ("gate_up_proj", "down_proj")
ACTIVATIONS = ("W4A8_G16", "W8A8_STATIC", "W8A8_ASYM_STATIC_ASYM", "FP8_DYNAMIC")
PER_TENSOR = "dynamic per tensor"


def scheme_of(name: str) -> Scheme:
    if name != PER_TENSOR:
        return parse_scheme(name)
    scheme = parse_scheme("W8A8")
    assert scheme.input is not None
    return replace(scheme, input=replace(scheme.input, block=(-1, -1)))


def static_of(scheme: Scheme) -> dict[str, Tensor]:
    """A static scale for values of the size that the experts see; some are clamped."""
    x = scheme.input
    if x is None or x.dynamic:
        return {}
    scale, zero = dynamic_scale(torch.tensor([[-1.5, 2.0]]), x)
    static = {"input_scale": scale} if zero is None else {"input_scale": scale, "input_zero": zero}
    return {key: value.reshape(()) for key, value in static.items()}


def tiny(name: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else p.data
    model.config._experts_implementation = implementation
    return model


def experts(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.experts


def quantize(model: nn.Module, scheme: Scheme) -> None:
    module = experts(model)
    for name in NAMES:
        q = quantize_weight(getattr(module, name).detach(), scheme.weight)
        quantize_parameter(module, name, q, scheme, (0, 1, 2), **static_of(scheme))


@pytest.mark.parametrize("scheme_name", ["W4A16_ASYM_G16", "NF4_DQ_G16", "W4A16_DQ_G16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_name", CONFIGS)
@torch.no_grad()
def test_weight_only_equals_dequantized_weights(model_name: str, implementation: str, scheme_name: str) -> None:
    ids, scheme = torch.randint(0, 64, (2, 7)), parse_scheme(scheme_name)
    model, expected = tiny(model_name, implementation), tiny(model_name, implementation)
    before = model(ids).logits
    for name in NAMES:
        w = getattr(experts(expected), name)
        w.copy_(quantize_weight(w, scheme.weight).dequantize())
    quantize(model, scheme)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def by_hand(module: nn.Module, weights: dict[str, Tensor], scheme: Scheme, x: Tensor, idx: Tensor, p: Tensor) -> Tensor:
    """The experts one token and expert at a time, inputs fake-quantized."""
    spec, static = scheme.input, static_of(scheme)
    assert spec is not None

    def quantized(t: Tensor) -> Tensor:
        scale, zero = (static["input_scale"], static.get("input_zero")) if static else dynamic_scale(t, spec)
        return fake_quantize(t, scale, zero, spec)

    out = torch.zeros_like(x)
    for token in range(len(x)):
        for k in range(idx.shape[1]):
            e = idx[token, k]
            gate, up = F.linear(quantized(x[token]), weights["gate_up_proj"][e]).chunk(2, -1)
            h = quantized(module.act_fn(gate) * up)
            out[token] += F.linear(h, weights["down_proj"][e]) * p[token, k]
    return out


def routed() -> tuple[Tensor, Tensor, Tensor]:
    x, p = torch.randn(9, 32), torch.rand(9, 2)
    return x, torch.stack([torch.randperm(4)[:2] for _ in range(9)]), p


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scheme_name", ACTIVATIONS)
@pytest.mark.parametrize("model_name", CONFIGS)
@torch.no_grad()
def test_quantized_inputs_equal_a_reference_by_hand(model_name: str, scheme_name: str, implementation: str) -> None:
    scheme, (x, idx, p) = scheme_of(scheme_name), routed()
    model = tiny(model_name, implementation)
    weights = {n: quantize_weight(getattr(experts(model), n), scheme.weight).dequantize() for n in NAMES}
    quantize(model, scheme)
    module = experts(model)
    got, expected = module(x, idx, p), by_hand(module, weights, scheme, x, idx, p)
    assert type(got) is Tensor
    # one float32 rounding can tip a value over to the next code: on few values, by one step
    wrong = (got - expected).abs() > 1e-5 * expected.abs().max()
    assert wrong.float().mean() < 0.02 and torch.allclose(got, expected, atol=0.02 * expected.abs().max().item())
    unquantized = by_hand(module, weights, replace(scheme, input=QSpec(parse_scheme("FP8").input.grid)), x, idx, p)
    assert ((unquantized - expected).abs() > 1e-5 * expected.abs().max()).float().mean() > 0.5


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("scheme_name", ["W4A16_G16", "NF4_DQ_G16", "W4A8_DQ_G16", *ACTIVATIONS, PER_TENSOR])
@torch.no_grad()
def test_compiles_without_a_graph_break(scheme_name: str, implementation: str) -> None:
    model, (x, idx, p) = tiny("mixtral", implementation), routed()
    quantize(model, scheme_of(scheme_name))
    torch._dynamo.reset()
    compiled = torch.compile(experts(model), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, idx, p), experts(model)(x, idx, p), atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme_name", ["W4A16_G16", "NF4_DQ_G16", "W4A8_DQ_G16", "W8A8_STATIC"])
@torch.no_grad()
def test_exports(scheme_name: str, strict: bool) -> None:
    model, args = tiny("mixtral", "grouped_mm"), routed()
    quantize(model, scheme_of(scheme_name))
    program = torch.export.export(experts(model), args, strict=strict)
    assert torch.allclose(program.module()(*args), experts(model)(*args), atol=1e-5)


def test_the_module_keeps_its_name_kind_and_copies() -> None:
    scheme = parse_scheme("W4A8_G16")
    model, other = tiny("mixtral"), tiny("mixtral")
    kind = type(experts(model))
    quantize(model, scheme)
    quantize(other, scheme)
    module = experts(model)
    assert isinstance(module, kind) and type(module).__name__ == kind.__name__ and type(module) is not kind
    assert type(module) is type(experts(other))  # so that torch.compile sees one class, not one for each layer
    assert not dict(module.named_parameters()) and "gate_up_proj_codes" in module.state_dict()
    twin = copy.deepcopy(module)
    twin.gate_up_proj_scale.zero_()
    assert twin.gate_up_proj.abs().sum() == 0 and module.gate_up_proj.abs().sum() > 0


def test_casts_change_what_is_given_not_what_is_stored() -> None:
    model = tiny("mixtral")
    quantize(model, parse_scheme("FP8"))
    module = experts(model)
    stored, weight = copy.deepcopy(module.state_dict()), module.gate_up_proj.as_subclass(Tensor)
    for cast, dtype in ((nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16)):
        cast(model)
        assert module.gate_up_proj.dtype == dtype and torch.equal(
            module.gate_up_proj.as_subclass(Tensor), weight.to(dtype)
        )
    for key, value in module.state_dict().items():
        assert value.dtype == stored[key].dtype and torch.equal(value.float(), stored[key].float())
    model.to("meta")
    assert module.gate_up_proj.is_meta and module.gate_up_proj_codes.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("scheme_name", ["W4A16_ASYM_G16", "W8A8_ASYM_STATIC_ASYM", "FP8", "NF4_DQ_G16", "W4A8_DQ_G16"])
def test_state_dict_loads_into_an_empty_one(scheme_name: str, device: str) -> None:
    scheme = parse_scheme(scheme_name)
    model, (x, idx, p) = tiny("qwen3_moe", "grouped_mm"), routed()
    quantize(model, scheme)
    fresh = tiny("qwen3_moe", "grouped_mm").to(device)
    for name in NAMES:
        empty_parameter(experts(fresh), name, scheme, (0, 1, 2))
    fresh.load_state_dict(model.state_dict(), assign=device == "meta")
    with torch.no_grad():
        assert torch.equal(experts(fresh)(x, idx, p), experts(model)(x, idx, p))


class Products(nn.Module):
    """Multiplies with parameters in layouts other than [out, in], in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 10))  # [in, out]
        self.experts = nn.Parameter(torch.randn(3, 24, 10))  # [e, in, out]

    def forward(self, x: Tensor, how: str) -> Tensor:
        batch = x.expand(3, *x.shape)
        return {
            "matmul": lambda: x @ self.w,
            "weight first": lambda: (self.w.t() @ x.t()).t(),
            "weight first 1-D": lambda: torch.stack([self.w.mT.matmul(row) for row in x]),
            "mm": lambda: torch.mm(x, self.w.contiguous()),
            "addmm": lambda: torch.addmm(torch.zeros(10), x, self.w.to(x.dtype)),
            "linear": lambda: F.linear(x, self.w.T),
            "cat": lambda: F.linear(x, torch.cat([self.w.T[:3], self.w.T[3:]])),
            "halves": lambda: torch.cat([F.linear(x, half) for half in self.w.T.chunk(2)], -1),
            "view": lambda: x @ self.w.view(24, 2, 5).flatten(1),
            "einsum": lambda: torch.einsum("ti, io -> to", x, self.w),
            "einsum bmm": lambda: torch.einsum("ti,eio->eto", x, self.experts),
            "bmm": lambda: torch.bmm(batch, self.experts),
            "baddbmm": lambda: torch.baddbmm(torch.zeros(3, 1, 10), batch, self.experts),
            "select": lambda: torch.stack([x @ w for w in self.experts.unbind()]),
        }[how]()


HOWS = ("matmul", "weight first", "mm", "addmm", "linear", "halves", "cat", "view", "einsum", "weight first 1-D")
BATCHED = ("einsum bmm", "bmm", "baddbmm", "select")


@pytest.mark.parametrize("how", (*HOWS, *BATCHED))
@pytest.mark.parametrize("scheme_name", ["W8A8", "W8A8_STATIC_ASYM"])
@torch.no_grad()
def test_products_and_layouts(scheme_name: str, how: str) -> None:
    module, scheme, x = Products(), parse_scheme(scheme_name), torch.randn(6, 24)
    q2 = quantize_weight(module.w.t(), scheme.weight)
    q3 = quantize_weight(module.experts.transpose(1, 2), scheme.weight)
    quantize_parameter(module, "w", q2, scheme, (1, 0), **static_of(scheme))
    quantize_parameter(module, "experts", q3, scheme, (0, 2, 1), **static_of(scheme))
    assert torch.equal(parameter_qtensor(module, "experts").codes, q3.codes)
    assert isinstance(module.w, QuantizingWeight) and module.experts.shape == (3, 24, 10)
    assert module.experts.is_contiguous()
    spec, static = scheme.input, static_of(scheme)
    assert spec is not None
    scale, zero = (static["input_scale"], static["input_zero"]) if static else dynamic_scale(x, spec)
    xq = fake_quantize(x, scale, zero, spec)
    expected = xq @ (q3 if how in BATCHED else q2).dequantize().mT
    got = module(x, how)
    assert type(got) is Tensor and torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(x @ (q3 if how in BATCHED else q2).dequantize().mT, expected, atol=1e-3)


@torch.no_grad()
def test_what_cannot_be_quantized_is_refused() -> None:
    module, scheme, x = Products(), parse_scheme("W8A8"), torch.randn(6, 24)
    quantize_parameter(module, "w", quantize_weight(module.w.t(), scheme.weight), scheme, (1, 0))
    for call in (
        lambda w: (x.unsqueeze(-1) * w).sum(1),
        lambda w: F.embedding(torch.tensor([1]), w),
        lambda w: F.conv1d(x.unsqueeze(-1), w.mT.unsqueeze(-1)),
        lambda w: w.mT @ w,
        lambda w: torch.einsum("ti,io", x, w),
        lambda w: torch.einsum("ti,io,t->to", x, w, x[:, 0]),
        lambda w: F.linear(x, weight=w.mT),
    ):
        with pytest.raises(KernelError, match="'w' cannot be quantized in this"):
            call(module.w)
    other = Products()
    static = parse_scheme("W8A8_STATIC")
    quantize_parameter(other, "w", quantize_weight(other.w.t(), static.weight), static, (1, 0), **static_of(static))
    with pytest.raises(KernelError, match="cannot be quantized in this cat"):
        torch.cat([module.w, other.w])
    # what asks about the weight, or takes it as a plain tensor, goes on working
    assert module.w.dtype == torch.float32 and module.w.size(0) == 24 and "Weight" in repr(module.w)
    assert type(module.w.as_subclass(Tensor)) is Tensor
    assert torch.equal(module.w[torch.tensor([1, 0])].flip(0).as_subclass(Tensor), module.w[:2].as_subclass(Tensor))


def test_refusals() -> None:
    module, scheme = Products(), parse_scheme("W8A8")
    q = quantize_weight(module.w.detach().t(), scheme.weight)
    static = parse_scheme("W8A8_STATIC")
    grouped = Scheme(scheme.weight, QSpec(scheme.weight.grid, (1, 8), dynamic=True))
    for name, scheme_, layout, match in (
        ("bias", scheme, (1, 0), "it has none"),
        ("w", scheme, (0, 1, 2), r"one of \(24, 10\)"),
        ("w", scheme, (0, 1), "parameter and layout say"),
        ("w", parse_scheme("W4A8"), (1, 0), "parameter and layout say"),
        ("w", static, (1, 0), "needs an input scale"),
        ("w", grouped, (1, 0), "activation in blocks"),
    ):
        with pytest.raises(KernelError, match=match):
            quantize_parameter(module, name, q, scheme_, layout)
    with pytest.raises(KernelError, match="needs an input scale"):
        quantize_parameter(module, "w", q, scheme, (1, 0), input_scale=1.0)
    with pytest.raises(KernelError, match="needs an input zero"):
        quantize_parameter(module, "w", q, parse_scheme("W8A8_STATIC_ASYM"), (1, 0), input_scale=1.0)
    assert dict(module.named_parameters()).keys() == {"w", "experts"} and type(module) is Products
