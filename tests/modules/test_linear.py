"""`QLinear`: one op, right for every scheme, and a well-behaved module."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import qfx
from qfx.core.errors import KernelError
from qfx.core.grid import E4M3, Codebook, Int
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.modules.linear import QLinear, ReadWeight, choose_op
from tests.kernels.law import DTYPES, Case, make_case, quantize_weight, violation

SCHEMES = {
    "W8A8": "int8_linear",
    "W8A8_STATIC_ASYM": "int8_linear",
    "W8A8_TENSOR": "int8_linear",
    "FP8": "fp8_linear",
    "FP8_DYNAMIC": "fp8_linear",
    "W8A16": "wna16_linear",
    "W4A16_G16": "wna16_linear",
    "W3A16_ASYM_G16": "wna16_linear",
    "W4A8_G16": "wnaq_linear",
    "W8A8_ASYM": "wnaq_linear",
    "W4A8_CHANNEL_STATIC": "wnaq_linear",
    "NF4_G16": "wna16_linear",
    "NF4_DQ_G16": "wna16_linear",
    "W4A16_DQ_G16": "wna16_linear",
    "W4A8_DQ_G16": "wnaq_linear",
    "FP4_BNB_CHANNEL": "wna16_linear",
}
ONE_EACH = ("W8A8_STATIC_ASYM", "FP8_DYNAMIC", "W3A16_ASYM_G16", "W4A8_G16", "NF4_DQ_G16", "W4A8_DQ_G16")
CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to_device": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "parent": (lambda m: nn.Sequential(m).half()[0], torch.float16),
}


def lower(case: Case, dtype: torch.dtype = torch.float32) -> QLinear:
    scale, zero = case.static
    return QLinear.from_qtensor(case.weight, case.bias, case.scheme, input_scale=scale, input_zero=zero, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_law(name: str, dtype: torch.dtype) -> None:
    for lead, bias in (((2, 3), True), ((), False), ((0,), True)):
        case = make_case(lead, 48, 20, name, dtype, bias=bias)
        module = lower(case, dtype)
        assert module.op == SCHEMES[name] == choose_op(case.scheme, 48)
        assert violation(module(case.x), case) <= 1


def test_float8_weights_with_float_input_and_act_order() -> None:
    case = make_case((5,), 48, 20, Scheme(parse_scheme("FP8_DYNAMIC").weight))
    assert violation(lower(case)(case.x), case) <= 1
    case = make_case((5,), 48, 20, "W4A8_ASYM_G16", act_order=True)
    assert violation(lower(case)(case.x), case) <= 1
    # a group of columns that are not neighbours is more than the int8 op knows
    assert choose_op(parse_scheme("W8A8"), 48, g_idx=True) == "wnaq_linear"


@pytest.mark.parametrize("name", SCHEMES)
def test_weight_dequantize_and_qtensor(name: str) -> None:
    case = make_case((5,), 33 if "G16" not in name else 48, 20, name)
    module = lower(case, torch.bfloat16)
    expected = case.weight.dequantize()
    assert torch.equal(module.dequantize(), expected) and module.dequantize().dtype == torch.float32
    assert torch.equal(module.weight, expected.bfloat16()) and module.weight.device.type == "cpu"
    back = module.qtensor()
    assert back.spec == case.weight.spec and back.codes.dtype == case.weight.codes.dtype
    assert torch.equal(back.codes.float(), case.weight.codes.float())
    assert back.zero is None or torch.equal(back.zero, case.weight.zero)


def test_quantized_scales_with_every_op_that_could_take_them() -> None:
    scales = parse_scheme("NF4_DQ").weight.scale
    for name, op in (("W8A8", "wnaq_linear"), ("FP8_DYNAMIC", "wnaq_linear"), ("W4A16_G16", "wna16_linear")):
        plain = parse_scheme(name)
        case = make_case((5,), 48, 20, replace(plain, weight=replace(plain.weight, scale=scales)))
        module = lower(case)
        assert module.op == op and module.weight_scale.dtype == torch.uint8
        assert torch.equal(module.dequantize(), case.weight.dequantize()) and violation(module(case.x), case) <= 1
    inputs = parse_scheme("W8A8").input
    case = make_case((5,), 48, 20, replace(parse_scheme("NF4_DQ_G16"), input=inputs))
    assert lower(case).op == "wnaq_linear" and violation(lower(case)(case.x), case) <= 1


def test_quantized_scales_are_stored_as_such() -> None:
    case = make_case((5,), 64, 40, "NF4_DQ_G16")
    state = lower(case).state_dict()
    stored = {k: (v.dtype, tuple(v.shape)) for k, v in state.items() if k != "bias"}
    assert stored == {
        "weight_codes": (torch.uint8, (40, 32)),
        "weight_scale": (torch.uint8, (40, 4)),
        "weight_scale_scale": (torch.float32, (1,)),
    }
    bits = 8 * sum(v.numel() * v.element_size() for k, v in state.items() if k != "bias") / (64 * 40)
    assert bits == case.weight.bits_per_weight == 4 + 8 / 16 + 32 / (64 * 40)


def test_scales_in_multiples_are_stored_with_one_for_each_row() -> None:
    case = make_case((5,), 64, 40, "W4A8_DQ_G16")
    state = lower(case).state_dict()
    stored = {k: (v.dtype, tuple(v.shape)) for k, v in state.items() if k != "bias"}
    assert stored == {
        "weight_codes": (torch.uint8, (40, 32)),
        "weight_scale": (torch.uint8, (40, 4)),
        "weight_scale_scale": (torch.float32, (40,)),
    }
    assert bool((state["weight_scale"].amax(1) == 15).all()) and bool((state["weight_scale"] >= 1).all())
    bits = 8 * sum(v.numel() * v.element_size() for k, v in state.items() if k != "bias") / (64 * 40)
    assert bits == case.weight.bits_per_weight == 4 + 8 / 16 + 32 / 64


def test_stands_for_linear_and_conv1d() -> None:
    spec, x = parse_scheme("W8A16"), torch.randn(2, 3, 24)
    for module, weight in ((nn.Linear(24, 10), lambda m: m.weight), (Conv1D(10, 24), lambda m: m.weight.t())):
        q = quantize_weight(weight(module).detach(), spec.weight)
        out = QLinear.from_qtensor(q, module.bias, spec, dtype=torch.float32)(x)
        assert out.shape == (2, 3, 10) and (out - module(x)).abs().max() < 0.02
        assert not out.requires_grad  # nothing in it is trained


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SCHEMES)
def test_state_dict_loads_into_an_empty_one(name: str, device: str) -> None:
    case = make_case((5,), 48, 20, name, act_order="G16" in name)
    saved = lower(case)
    empty = QLinear.empty(48, 20, case.scheme, bias=True, g_idx=case.weight.g_idx is not None, device=device)
    assert set(empty.state_dict()) == set(saved.state_dict())
    empty.load_state_dict(saved.state_dict(), assign=device == "meta")
    for key, value in saved.state_dict().items():
        assert empty.state_dict()[key].dtype == value.dtype
    assert torch.equal(empty(case.x), saved(case.x))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ONE_EACH)
def test_casts_keep_codes_and_scales(name: str, cast: str) -> None:
    case = make_case((5,), 48, 20, name, bias=False, act_order="G16" in name)
    module, x = lower(case), case.x
    before, expected = copy.deepcopy(module.state_dict()), module(x)
    fn, dtype = CASTS[cast]
    module = fn(module)
    for key, value in module.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value.float(), before[key].float())
    assert module.dtype == module.weight.dtype == dtype
    assert torch.equal(module(x), expected)
    assert module(x.to(dtype)).dtype == dtype


def test_the_bias_is_cast_and_everything_moves() -> None:
    case = make_case((5,), 48, 20, "W8A8_STATIC_ASYM")
    module = lower(case).half()
    assert module.bias.dtype == torch.float16
    module.to("meta")
    assert all(b.is_meta for b in module.buffers()) and module.weight.is_meta
    module.to_empty(device="cpu")
    assert {b.device.type for b in module.buffers()} == {"cpu"} and module.weight_codes.dtype == torch.int8


def test_deepcopy_is_independent() -> None:
    case = make_case((5,), 48, 20, "FP8")
    module = lower(case)
    twin = copy.deepcopy(module)
    expected = module(case.x)
    assert torch.equal(twin(case.x), expected)
    twin.weight_scale.mul_(2)
    assert torch.equal(module(case.x), expected) and not torch.equal(twin(case.x), expected)


def test_does_not_share_the_bias_it_was_given() -> None:
    case = make_case((5,), 48, 20, "W8A8")
    module = lower(case)
    expected = module(case.x)
    case.bias.zero_()
    assert torch.equal(module(case.x), expected)


class Block(nn.Module):
    """A quantized linear behind a norm that is trained."""

    def __init__(self, linear: QLinear) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(linear.in_features), linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)).relu()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_compiles_without_a_graph_break(name: str, grad: bool) -> None:
    case = make_case((2, 5), 48, 20, name)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        block = Block(lower(case))
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(case.x), block(case.x))
        if grad:
            compiled(case.x).sum().backward()
            assert block.norm.weight.grad.isfinite().all() and block.norm.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ONE_EACH)
def test_compiles_with_inductor(name: str) -> None:
    case = make_case((2, 5), 48, 20, name)
    torch._dynamo.reset()
    module = lower(case)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(case.x), module(case.x))


@pytest.mark.parametrize("name", SCHEMES)
def test_exports_as_one_op(name: str) -> None:
    case = make_case((2, 5), 48, 20, name)
    module = lower(case)
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(module, (case.x,), dynamic_shapes=shapes)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls == [f"qfx.{SCHEMES[name]}.default"]
    x = torch.randn(3, 1, 48)
    assert torch.equal(program.module()(x), module(x))


def test_refusals() -> None:
    case = make_case((5,), 48, 20, "W8A8_STATIC_ASYM")
    with pytest.raises(KernelError, match="use its own spec"):
        QLinear.from_qtensor(case.weight, None, parse_scheme("W8A8_ASYM"), dtype=torch.float32)
    with pytest.raises(KernelError, match="input_scale has shape None"):
        QLinear.from_qtensor(case.weight, None, case.scheme, dtype=torch.float32)
    with pytest.raises(KernelError, match="input_zero has shape None"):
        QLinear.from_qtensor(case.weight, None, case.scheme, input_scale=1.0, dtype=torch.float32)
    with pytest.raises(KernelError, match="input_scale has shape"):
        QLinear.from_qtensor(case.weight, None, parse_scheme("W8A8"), input_scale=1.0, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"bias has shape \(3,\)"):
        QLinear.from_qtensor(case.weight, torch.zeros(3), parse_scheme("W8A8"), dtype=torch.float32)
    grouped = Scheme(case.scheme.weight, QSpec(Int(8), (1, 16), dynamic=True))
    with pytest.raises(KernelError, match=r"no op computes .* on 48 channels \(int8_linear: .*; wnaq_linear: "):
        QLinear.empty(48, 20, grouped)
    with pytest.raises(KernelError, match="does not divide"):
        QLinear.empty(48, 20, parse_scheme("W4A16"))
    codebook = Scheme(case.scheme.weight, QSpec(Codebook("nf4"), dynamic=True))
    with pytest.raises(KernelError, match="wnaq_linear: an activation on the codebook nf4"):
        QLinear.empty(48, 20, codebook)
    coarse = make_case((5,), 48, 20, "NF4_G16").weight
    double = parse_scheme("NF4_DQ_G16")
    with pytest.raises(KernelError, match="the scales are not on the grid of their own spec"):
        QLinear.from_qtensor(replace(coarse, spec=double.weight), None, double, dtype=torch.float32)
    zero = replace(make_case((5,), 48, 20, "W4A16_ASYM_G16").weight, zero=torch.full((20, 3), -1))
    with pytest.raises(KernelError, match=r"outside 0\.\.255"):
        QLinear.from_qtensor(zero, None, Scheme(zero.spec), dtype=torch.float32)


def test_repr_says_what_it_is() -> None:
    text = repr(QLinear.empty(256, 20, parse_scheme("W4A16"), bias=False))
    assert text == "QLinear(in_features=256, out_features=20, bias=False, scheme=W4A16, op=wna16_linear)"
    assert "E4M3" not in repr(QLinear.empty(16, 2, Scheme(QSpec(E4M3), QSpec(E4M3, dynamic=True))))


def encoder(norm_first: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    layer = nn.TransformerEncoderLayer(64, 4, 96, norm_first=norm_first, batch_first=True)
    padding = torch.arange(9)[None] >= torch.tensor([9, 5, 7])[:, None]
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model, {"src": torch.randn(3, 9, 64), "src_key_padding_mask": padding}


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_fused_layers_of_torch_do_not_leave_the_inputs_rounding_out(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, feeds = encoder(norm_first)
    q = qfx.quantize(model, {"schemes": {"*": "W8A8"}}, [feeds], progress=False)
    keep = ~feeds["src_key_padding_mask"]
    y = q(**feeds)[keep]
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    slow = q(**feeds)[keep]
    assert (y - slow).abs().max() < 1e-5
    monkeypatch.undo()
    monkeypatch.setattr(QLinear, "weight", property(QLinear.dequantize))  # as torch would find any other weight
    assert (q(**feeds)[keep] - slow).abs().max() > 1e-3


@torch.no_grad()
def test_a_weight_that_is_read_computes_plain_tensors() -> None:
    def quantized(scheme: str) -> nn.Module:
        model, feeds = nn.Sequential(nn.Linear(64, 48)), {"input": torch.randn(2, 64)}
        return qfx.quantize(model, {"schemes": {"*": scheme}, "ignore": []}, [feeds], progress=False)

    q = quantized("W8A8")
    weight = q[0].weight
    assert type(weight) is ReadWeight and weight.dtype == torch.float32 and weight.shape == (48, 64)
    made = weight @ weight.t(), weight.clone(), weight[:2], weight.to(torch.float16), torch.cat([weight, weight])
    assert all(type(t) is torch.Tensor for t in made) and torch.equal(made[1], q[0].dequantize())
    plain = quantized("W4A16_G32")
    assert type(plain[0].weight) is torch.Tensor
