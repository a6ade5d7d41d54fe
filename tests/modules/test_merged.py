"""Linears computed as one: each gives what it gave alone, whoever calls it, and keeps its own names."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qfx.core.errors import KernelError
from qfx.core.online import make_online
from qfx.modules.linear import QLinear
from qfx.modules.merged import Group, Whole, merge, unlike, unmerge
from tests.kernels.law import make_case

SCHEMES = ("W8A8", "W8A8_STATIC_ASYM", "W8A8_TENSOR", "FP8", "FP8_DYNAMIC", "W4A16_G32", "W3A16_ASYM_G16", "W4A8_G16")
SCHEMES += ("NF4_G32", "NF4_DQ_G16", "W4A8_DQ_G16", "W4A16_DQ_G32")
EXACT = ("W8A8", "W8A8_STATIC_ASYM", "W8A8_TENSOR")  # integer sums
WIDE = 64


def linear(scheme: str, out: int, bias: bool = True, columns: int = WIDE, scale: float = 0.03) -> QLinear:
    case = make_case((5,), columns, out, scheme)
    static, asymmetric = (t is not None for t in case.static[:2])
    inputs = {"input_scale": scale if static else None, "input_zero": 7 if asymmetric else None}
    return QLinear.from_qtensor(case.weight, case.bias if bias else None, case.scheme, dtype=torch.float32, **inputs)


class Three(nn.Module):
    """Three linears of one value, and a count of how often each op ran."""

    def __init__(self, scheme: str, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(scheme, out, bias) for out in (20, 12, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x) * 2, self.k(x), self.v(x)], -1)

    def merge(self) -> Group:
        return merge([self.q, self.k, self.v])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDE)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    alike = all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    return list(a) == list(b) and alike


def wholes(group: Group) -> Callable[[], int]:
    """Counts the merged linear's calls from now on."""
    counts = [0]
    whole = group.whole

    def counting(x: Tensor) -> Tensor:
        counts[0] += 1
        return whole(x)

    group.whole = counting  # type: ignore[assignment]
    return lambda: counts[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_same_values_and_the_same_state(scheme: str, x: Tensor) -> None:
    model = Three(scheme)
    want, before, weights = model(x), state(model), [m.weight for m in (model.q, model.k, model.v)]
    group = model.merge()
    got = model(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if scheme in EXACT else 1e-5)
    assert same(state(model), before)
    assert all(torch.equal(m.weight, w) for m, w in zip(group.members, weights, strict=True))
    assert sum(b.numel() for n, b in model.named_buffers() if "codes" in n) == sum(
        t.numel() for n, t in before.items() if "codes" in n
    )
    unmerge(group)
    assert torch.equal(model(x), want) and same(state(model), before)
    assert not any(isinstance(m, Whole) for m in model.modules())
    storages = {m.weight_codes.untyped_storage().data_ptr() for m in group.members}
    assert len(storages) == 3


@torch.no_grad()
def test_the_whole_is_computed_once_for_all(x: Tensor) -> None:
    model = Three("W8A8")
    group = model.merge()
    ran = wholes(group)
    model(x)
    assert ran() == 1 and group.held is None
    model(x)
    assert ran() == 2


@torch.no_grad()
def test_each_is_right_whatever_it_is_called_with(x: Tensor) -> None:
    model = Three("W8A8")
    y = torch.randn(3, WIDE)
    want = {(name, i): m(t) for name, m in model.named_children() for i, t in enumerate((x, y))}
    model.merge()

    def check(*calls: str) -> None:
        for call in calls:
            name, i = call[0], int(call[1])
            assert torch.equal(model.get_submodule(name)((x, y)[i]), want[name, i]), calls

    check("q0", "k1", "v0", "k0", "v1")
    check("v0", "k0", "q0", "k0", "k0", "v0", "v0")
    check("q0", "q1", "k0", "v1")
    copied = x.clone()
    check("q0")
    assert torch.equal(model.k(copied), want["k", 0])


@torch.no_grad()
def test_a_write_into_the_input_is_seen(x: Tensor) -> None:
    model = Three("W8A8")
    twin = copy.deepcopy(model)
    group = model.merge()
    model.q(x)
    x.mul_(-3)
    assert torch.equal(model.k(x), twin.k(x))
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), twin(x.clone()))
    assert group.held is None or group.held[0] is x


@pytest.mark.parametrize("scheme", ["W8A8_STATIC_ASYM", "W4A16_G32", "W8A8_TENSOR", "NF4_DQ_G16", "W4A8_DQ_G16"])
@torch.no_grad()
def test_a_state_dict_loads_into_merged_linears(scheme: str, x: Tensor) -> None:
    model, other = Three(scheme), Three(scheme)
    for m in other.children():
        m.weight_codes.copy_(m.weight_codes.flip(0))
        if m.weight_scale_scale is None:
            m.weight_scale.mul_(1.5)
        else:
            m.weight_scale_scale.mul_(2)
        m.bias.add_(1)
        if m.input_scale is not None:
            m.input_scale.mul_(2)
    want, given = other(x), state(other)
    group = model.merge()
    assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
    torch.testing.assert_close(model(x), want, rtol=0, atol=0 if scheme in EXACT else 1e-5)
    assert same(state(model), given)
    if group.whole.input_scale is not None:
        with pytest.raises(RuntimeError, match="cannot be merged: another input scale"):
            model.load_state_dict({**given, "k.input_scale": torch.tensor(9.0)})


@torch.no_grad()
def test_a_kernel_of_the_whole(x: Tensor) -> None:
    model = Three("W4A16_G32")
    want, before = model(x), state(model)
    group = model.merge()
    group.whole.use_kernel("w4a16_linear")
    torch.testing.assert_close(model(x), want)
    assert same(state(model), before)
    model.load_state_dict(before)
    assert group.whole.kernel == "w4a16_linear" and same(state(model), before)
    with pytest.raises(KernelError, match="choose the kernel of that one"):
        model.q.use_kernel("w4a16_linear")
    unmerge(group)
    assert same(state(model), before) and torch.equal(model(x), want)


@torch.no_grad()
def test_scales_in_multiples_stay_so_in_the_whole() -> None:
    """A row has its second scale wherever it stands: the whole keeps them, and its kernel reads them."""
    members = [linear("W4A8_DQ", out, columns=256) for out in (20, 12, 150)]
    states, seconds = [state(m) for m in members], torch.cat([m.weight_scale_scale for m in members])
    x = torch.randn(5, 256)
    want = [m(x) for m in members]
    group = merge(members)
    assert group.whole.scheme == members[0].scheme and torch.equal(group.whole.weight_scale_scale, seconds)
    for kernel in ("", "w4a8_linear"):
        group.whole.use_kernel(kernel)
        assert all(same(state(m), s) for m, s in zip(members[1:], states[1:], strict=True))
        torch.testing.assert_close([m(x) for m in members], want)
        for member, s in zip(members, states, strict=True):
            member.load_state_dict({**s, "weight_scale_scale": s["weight_scale_scale"] * 2})
            assert torch.equal(member.stored()["scale_scale"], s["weight_scale_scale"] * 2)
            member.load_state_dict(s)
    second = group.whole.get_buffer("kernel_second")
    assert torch.equal(second[:182], seconds) and second.shape == (256,) and not second[182:].any()
    assert merge([linear("NF4_DQ_G16", 8), linear("NF4_DQ_G16", 8)]).whole.scheme.weight.scale is None
    unmerge(group)
    assert all(same(state(m), s) for m, s in zip(members, states, strict=True))


@torch.no_grad()
def test_copies_and_casts(x: Tensor) -> None:
    model = Three("W8A8")
    group = model.merge()
    want = model(x)
    model.q(x)  # leaves something to take
    twin = copy.deepcopy(model)
    assert twin.k.part.group is not group and twin.k.part.group.held is None
    assert twin.k.part.group.whole is twin.q.merged and torch.equal(twin(x), want)
    twin.to(torch.bfloat16)
    assert {m.dtype for m in twin.children()} == {torch.bfloat16} == {twin.q.merged.bias.dtype}
    assert twin(x.bfloat16()).dtype == torch.bfloat16 and twin.q.merged.weight_scale.dtype == torch.float32
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "W4A16_G32"])
def test_compiles_without_a_graph_break_and_once(scheme: str, backend: str, x: Tensor) -> None:
    model = Three(scheme)
    group = model.merge()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        ops = [n for g in counter.graphs for n in g.graph.nodes if "linear" in str(n.target)]
        assert len(ops) == 1
        model.q(x)  # something is held
        assert group.held is not None and torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x + 1), model(x + 1)) and group.held is None
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exports_as_one_op(strict: bool, x: Tensor) -> None:
    model = Three("W8A8")
    group = model.merge()
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls.count("qfx.int8_linear.default") == 1 and group.held is None
    assert torch.equal(program.module()(x[:1, :3]), model(x[:1, :3]))


@torch.no_grad()
def test_gradients_flow() -> None:
    model = Three("W8A8")
    twin = copy.deepcopy(model)
    model.merge()
    with torch.enable_grad():
        a, b = (torch.ones(3, WIDE, requires_grad=True) for _ in range(2))
        model(a).square().sum().backward()
        twin(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_refusals() -> None:
    def why(*linears: QLinear) -> str | None:
        return unlike(linears)

    static = linear("W8A8_STATIC_ASYM", 8)
    assert why(static, linear("W8A8_STATIC_ASYM", 9)) is None
    assert why(static, linear("W8A8_STATIC_ASYM", 9, scale=0.04)) == "another input scale"
    assert why(linear("W8A8", 8), linear("W8A8_TENSOR", 8)) == "another scheme"
    assert why(linear("W8A8", 8), linear("W8A8", 8, bias=False)) == "another form: only one has a bias"
    assert why(linear("W8A8", 8), linear("W8A8", 8).half()) == "another dtype"
    assert why(linear("W8A8", 8), linear("W8A8", 8, columns=32)) == "another number of input channels"
    with pytest.raises(KernelError, match="another scheme"):
        merge([linear("W8A8", 8), linear("W4A8_G16", 8)])
    same = linear("W8A8", 8)
    with pytest.raises(KernelError, match="two or more different"):
        merge([same, same])
    with pytest.raises(KernelError, match="two or more different"):
        merge([same])
    online = linear("W8A8", 8)
    make_online(online, nn.Parameter(torch.ones(WIDE)), nn.Parameter(torch.zeros(WIDE)))
    with pytest.raises(KernelError, match="at run time"):
        merge([same, online])
    merge([same, linear("W8A8", 4)])
    with pytest.raises(KernelError, match="two or more different"):
        merge([same, linear("W8A8", 4)])
