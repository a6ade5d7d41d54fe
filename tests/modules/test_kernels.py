"""A weight in a kernel's own layout: the same values, the same `state_dict`, and no second copy."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import DOUBLE, Scheme, parse_scheme, scheme_label
from qfx.kernels.pack import dequantize
from qfx.modules import kernels
from qfx.modules.kernels import Stored, choose_kernel
from qfx.modules.linear import QLinear
from qfx.modules.merged import merge
from qfx.modules.state import BUFFERS
from tests.kernels.law import make_case, violation


class Reversed:
    """Bytes of a row from last to first, scales transposed; what it refuses has nine outputs."""

    def supports(self, scheme: Scheme, in_features: int, out_features: int, g_idx: bool) -> str | None:
        if scheme.input is not None:
            return "reversed: the input is quantized"
        return "reversed: nine outputs" if out_features == 9 else None

    def prepare(self, stored: Stored, scheme: Scheme, in_features: int) -> Stored:
        codes, scale, zero = stored["codes"], stored["scale"], stored["zero"]
        assert codes is not None and scale is not None
        return {"bytes": codes.flip(-1), "t": scale.t().contiguous(), "z": zero, "order": stored["g_idx"]}

    def restore(self, prepared: Stored, scheme: Scheme, in_features: int, out_features: int) -> Stored:
        codes, scale = prepared["bytes"], prepared["t"]
        assert codes is not None and scale is not None
        whole = {"codes": codes.flip(-1), "scale": scale.t().contiguous()}
        return {**whole, "zero": prepared["z"], "g_idx": prepared["order"]}

    def settings(self, scheme: Scheme, in_features: int, out_features: int) -> tuple[Any, ...]:
        return scheme.weight.grid.bits, in_features, scheme.weight.symmetric

    def call(self, x: Tensor, prepared: Sequence[Tensor | None], bias: Tensor | None, *rest: Any) -> Tensor:
        codes, scale, zero, g_idx = prepared
        _, _, bits, columns, signed = rest
        assert codes is not None and scale is not None
        stored = codes.flip(-1), scale.t(), zero, g_idx
        return torch.nn.functional.linear(x, dequantize(*stored, bits=bits, columns=columns, signed=signed), bias)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", found := {"reversed": Reversed(), **kernels.KERNELS})
    monkeypatch.setattr("qfx.modules.linear.KERNELS", found)


SCHEMES = ("W4A16_G16", "W3A16_ASYM_G16", "W8A16", "W4A16_TENSOR")
KERNELS = {
    "reversed": ((2, 5), 48, SCHEMES),
    "wxa16_linear": ((2, 5), 64, ("W8A16", "W8A16_ASYM_G32", "W3A16_G32", "W3A16_ASYM_TENSOR", "W6A16_CHANNEL")),
    "w4a16_linear": ((2, 5), 64, ("W4A16_G32", "W3A16_ASYM_G32", "W4A16_TENSOR")),
    "w4a8_linear": ((2, 5), 256, ("W4A8_DQ", "W4A8_DQ_G64", "W3A8_DQ_G256", "W4A8_G32", "W4AFP8")),
    "nf4_linear": ((2, 5), 64, ("NF4_DQ_G32", "NF4", "FP4_CHANNEL", "FP4_BNB")),
}
CASES = [(kernel, scheme) for kernel, (*_, schemes) in KERNELS.items() for scheme in schemes]


def linear(kernel: str, scheme: str, out: int = 20) -> tuple[QLinear, Tensor]:
    rows, columns, _ = KERNELS[kernel]
    case = make_case(rows, columns, out, scheme)
    return QLinear.from_qtensor(case.weight, case.bias, case.scheme, dtype=torch.float32), case.x


def saved(module: QLinear) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    alike = all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    return list(a) == list(b) and alike


@pytest.mark.parametrize(("kernel", "scheme"), CASES)
@torch.no_grad()
def test_only_the_layout_changes(kernel: str, scheme: str) -> None:
    module, x = linear(kernel, scheme)
    want, state, weight = module(x), saved(module), module.qtensor()
    module.use_kernel(kernel)
    assert module.kernel == kernel and not set(module._buffers) & set(BUFFERS.values())
    torch.testing.assert_close(module(x), want)
    assert same(saved(module), state)
    assert torch.equal(module.qtensor().codes, weight.codes) and torch.equal(module.qtensor().scale, weight.scale)
    assert torch.equal(module.weight, weight.dequantize())
    module.use_kernel("")
    assert module.as_stored and list(module._buffers) == list(state) and same(saved(module), state)
    assert torch.equal(module(x), want) and not module.layout and not module._non_persistent_buffers_set


@pytest.mark.parametrize(("kernel", "scheme"), CASES)
@torch.no_grad()
def test_a_state_dict_loads_into_a_kernel_s_layout(kernel: str, scheme: str) -> None:
    module, x = linear(kernel, scheme)
    other, _ = linear(kernel, scheme)
    other.weight_codes.copy_(other.weight_codes.flip(0))
    (other.weight_scale if other.weight_scale_scale is None else other.weight_scale_scale).mul_(2)
    other.bias.add_(1)
    want, state = other(x), saved(other)
    module.use_kernel(kernel)
    memory = {name: t.data_ptr() for name, t in module._buffers.items()}
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    assert same(saved(module), state)
    torch.testing.assert_close(module(x), want)
    assert {name: t.data_ptr() for name, t in module._buffers.items()} == memory


def test_what_does_not_fit_is_said() -> None:
    module, _ = linear("reversed", "W4A16_G16")
    state = saved(module)
    module.use_kernel("reversed")
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        module.load_state_dict({k: v for k, v in state.items() if k != "weight_scale"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_zero"):
        module.load_state_dict({**state, "weight_zero": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_codes: \(3, 24\) in the state dict, \(20, 24\)"):
        module.load_state_dict({**state, "weight_codes": torch.zeros(3, 24, dtype=torch.uint8)})
    assert same(saved(module), state)
    with pytest.raises(KernelError, match="nine outputs"):
        linear("reversed", "W4A16_G16", out=9)[0].use_kernel("reversed")


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_casts_moves_and_copies(kernel: str) -> None:
    module, x = linear(kernel, KERNELS[kernel][2][0])
    module.use_kernel(kernel)
    state, want = saved(module), module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), want)
    twin.to(torch.bfloat16)
    assert twin.dtype == torch.bfloat16 == twin.bias.dtype and twin.device.type == "cpu"
    assert all(torch.equal(v, state[k]) for k, v in saved(twin).items() if k != "bias")
    assert module.dtype == torch.float32 and torch.equal(module(x), want)
    assert module.to("meta").device.type == "meta"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiles_without_a_graph_break(kernel: str, backend: str) -> None:
    module, x = linear(kernel, KERNELS[kernel][2][0])
    module.use_kernel(kernel)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend=backend)(x), module(x))


def test_the_choice_has_a_reason() -> None:
    own = "a GPU kernel with a weight layout of its own"
    assert choose_kernel(parse_scheme("W4A16_G16"), 48, 20) == ("reversed", own)
    assert choose_kernel(parse_scheme("W4A16_G32"), 64, 9) == ("w4a16_linear", own)
    assert choose_kernel(parse_scheme("W3A16_G32"), 64, 9) == ("wxa16_linear", own)
    assert choose_kernel(parse_scheme("W8A16"), 64, 9) == ("wxa16_linear", own)
    name, why = choose_kernel(parse_scheme("W4A16_G16"), 48, 9)
    assert name == "wna16_linear" and why.startswith(
        "PyTorch ops: no GPU kernel takes it; reversed: nine outputs; wxa16"
    )
    stored = "a GPU kernel that reads the weight as it is stored"
    assert choose_kernel(parse_scheme("W8A8"), 48, 20) == ("int8_linear", stored)
    with pytest.raises(KernelError, match="does not divide"):
        choose_kernel(parse_scheme("W4A16"), 48, 20)


@pytest.mark.parametrize("scheme", ["W4A8_ASYM_G64", "W4A8_ASYM_G128", "W4A8", "W4A16", "W3A16_ASYM_G32", "NF4"])
def test_groups_that_do_not_divide_the_columns_are_a_reason(scheme: str) -> None:
    ours = {name: kernel for name, kernel in kernels.KERNELS.items() if name != "reversed"}
    assert len(ours) == 4
    for kernel in ours.values():
        assert isinstance(kernel.supports(parse_scheme(scheme), 100, 64, False), str)


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("W4A8_DQ", True),
        ("W3A8_DQ_G256", True),
        ("W4A8_DQ_G64", False),  # the kernel changes its multiples with the tile
        ("W4A8", False),
        ("W4A8_CHANNEL", False),
        (replace(parse_scheme("W4A8_DQ"), input=parse_scheme("FP8_DYNAMIC").input), False),
        (replace(parse_scheme("W4A8"), weight=replace(parse_scheme("W4A8").weight, scale=DOUBLE)), False),
    ],
    ids=lambda v: v if isinstance(v, str) else scheme_label(v) if isinstance(v, Scheme) else "",
)
@torch.no_grad()
def test_second_scales_are_laid_out_where_integers_can_be_summed(scheme: str | Scheme, given: bool) -> None:
    case = make_case((5,), 256, 20, scheme)
    module = QLinear.from_qtensor(case.weight, case.bias, case.scheme, dtype=torch.float32)
    want = module.weight_scale_scale
    module.use_kernel("w4a8_linear")
    second = module._buffers.get("kernel_second")
    assert module.layout[-1] == "kernel_second" and (second is not None) == given
    if second is not None:
        assert second.dtype == torch.float32 and torch.equal(second, torch.nn.functional.pad(want, (0, 108)))
        multiples = module.get_buffer("kernel_scale")[:, :20] / second[:20]
        assert torch.equal(multiples, multiples.round()) and multiples.min() >= 1 and multiples.max() == 15
    assert violation(module(case.x), case) <= 1


def test_groups_of_unequal_sizes_stay_as_they_are_stored() -> None:
    """The kernel's layout could not say which column was of which group."""
    case = make_case((5,), 64, 20, "W4A16_G32")
    uneven = torch.tensor([0] * 40 + [1] * 24)
    weight = replace(case.weight, g_idx=uneven)
    module = QLinear.from_qtensor(weight, None, case.scheme, dtype=torch.float32)
    state = saved(module)
    with pytest.raises(KernelError, match="w4a16_linear takes no groups of unequal sizes"):
        module.use_kernel("w4a16_linear")
    assert module.as_stored and same(saved(module), state)
    scattered = torch.randperm(64) // 32
    module = QLinear.from_qtensor(replace(weight, g_idx=scattered), None, case.scheme, dtype=torch.float32)
    state, want = saved(module), module(case.x)
    module.use_kernel("w4a16_linear")
    assert same(saved(module), state)
    torch.testing.assert_close(module(case.x), want)


def test_foreign_codes_of_scales_stay_as_they_are_stored() -> None:
    """A kernel's layout holds float32 scales, which give back only codes that use the whole range."""
    module, x = linear("nf4_linear", "NF4_DQ_G32")
    module.weight_scale.clamp_(max=200)
    state, want = saved(module), module(x)
    with pytest.raises(KernelError, match="other codes of scales than qfx would give"):
        module.use_kernel("nf4_linear")
    assert module.as_stored and same(saved(module), state) and torch.equal(module(x), want)
    assert torch.equal(module.qtensor().dequantize(), module.dequantize())
    lowered, _ = linear("nf4_linear", "NF4_DQ_G32")
    before = saved(lowered)
    lowered.use_kernel("nf4_linear")
    with pytest.raises(RuntimeError, match="other codes of scales than qfx would give"):
        lowered.load_state_dict(state)
    assert same(
        {k: v for k, v in saved(lowered).items() if k != "bias"}, {k: v for k, v in before.items() if k != "bias"}
    )
    with pytest.raises(KernelError, match="cannot be merged: codes of scales that qfx would not give"):
        merge([module, linear("nf4_linear", "NF4_DQ_G32")[0]])
    assert module.as_stored and same(saved(module), state)
