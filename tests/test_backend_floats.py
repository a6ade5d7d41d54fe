"""The rewrites in front of linears whose weights alone are quantized, on Dynamo's graphs, with a GPU's layouts."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.lowering import inductor_pass, lower_graph
from qfx.modules.linear import QLinear
from qfx.passes.lower import graph as graphs
from tests.test_backend import unfused
from tests.test_backend_fused import Block, changed, reasons
from tests.zoo import ZOO
from tests.zoo.captured import distance, floats
from tests.zoo.codes import Codes

pytestmark = pytest.mark.usefixtures("dynamo")
KERNELS = {"W4A16_G32": "w4a16_linear", "NF4_G32": "nf4_linear", "W8A16_G32": "wxa16_linear"}


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """As on a CUDA device: the backend lays weights out for the kernel of a scheme."""

    def use(scheme: str) -> None:
        monkeypatch.setattr(graphs, "fit_kernel", lambda module, device: module.use_kernel(KERNELS[scheme]))

    return use


# two blocks, of a norm in front of q, k and v and one in front of gate and up each
APPLIED = {"merge linears": 4, "fuse gated products": 2, "fuse norms": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", KERNELS)
def test_a_model_keeps_its_bits(scheme: str, dtype: torch.dtype, layouts: Callable[[str], None]) -> None:
    layouts(scheme)
    model, feeds = ZOO["llama"].load()
    model, codes = model.to(dtype), Codes()
    recipe = {"schemes": {"*": scheme}, "ignore": ["@head"]}
    want = floats(torch.compile(model, backend=unfused(recipe, then="eager"))(**feeds))
    torch._dynamo.reset()
    chosen = qfx.backend(recipe, then=codes)
    got = floats(torch.compile(model, backend=chosen)(**feeds))
    assert changed(chosen) == APPLIED
    counts = [codes.ops().count(f"qfx.{op}") for op in (KERNELS[scheme], "norm", "gated")]
    assert counts == [8, 4, 2]  # qkv, o, gate and up, down
    assert codes.ops().count("aten.rsqrt") == 1  # in front of the head
    assert reasons(chosen, "fuse norms") == {"no linear with quantized weights and a float input reads it"}
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("scheme", KERNELS)
@torch.no_grad()
def test_lower_graph_and_the_pass_of_inductor_do_the_same(scheme: str) -> None:
    model, feeds = ZOO["llama"].load()
    q = qfx.quantize(model, {"schemes": {"*": scheme}, "ignore": ["@head"]}, [feeds], progress=False)
    qfx.lower(q, feeds, device="cuda")
    graph = lower_graph(q, feeds)
    ops = [str(n.target) for n in graph.graph.nodes]
    # the last norm has no such reader, but this graph has no other compiler behind it
    assert [ops.count(f"qfx.{op}.default") for op in (KERNELS[scheme], "norm", "gated")] == [8, 5, 2]
    assert [r.changed for r in graph.meta["rewrites"] if r.name.startswith("fuse ")] == [2, 4, 1]
    assert torch.equal(graph(**feeds).logits, q(**feeds).logits)


class Writes(nn.Module):
    """A norm or a gated product of an input that is written to behind it."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.body = nn.Linear(64, 64), body

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.body(x))
        x.add_(1)
        return y


BODIES: dict[str, Callable[[Tensor], Tensor]] = {
    "fuse norms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "fuse gated products": lambda x: F.silu(x) * (x + 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_written_to_is_left_alone(name: str, layouts: Callable[[str], None]) -> None:
    layouts("W4A16_G32")
    model, x, recipe = Writes(BODIES[name]).eval(), torch.randn(5, 64), {"schemes": {"*": "W4A16_G32"}}
    want = torch.compile(model, backend=unfused(recipe, then="eager"))(x.clone())
    torch._dynamo.reset()
    chosen = qfx.backend(recipe, then="eager")
    assert torch.equal(torch.compile(model, backend=chosen)(x.clone()), want)
    assert reasons(chosen, name) == {"the model writes into its input, in place"} and changed(chosen) == {}


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_of_inductor(dtype: torch.dtype) -> None:
    """Decomposed ops: functions and norms in float32, with casts around them."""
    feeds: dict[str, Tensor] = {"x": torch.randn(2, 5, 64, dtype=dtype)}
    q = qfx.quantize(Block().eval().to(dtype), {"schemes": {"*": "W4A16_G32"}}, [feeds], progress=False)
    for module in q.modules():
        if isinstance(module, QLinear):
            module.use_kernel("w4a16_linear")
    ops: list[str] = []

    def spy(graph: torch.fx.Graph) -> None:
        inductor_pass(graph)
        ops.extend(str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function")

    got = torch.compile(q, fullgraph=True, options={"post_grad_custom_pre_pass": spy})(**feeds)
    assert distance([q(**feeds)], [got]) < (1e-6 if dtype is torch.float32 else 2e-2)
    assert [ops.count(f"qfx.{op}") for op in ("norm", "gated", "w4a16_linear")] == [2, 2, 6]
    assert "aten.rsqrt" not in ops
