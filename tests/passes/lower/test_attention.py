"""Attention without repeated heads: the same values, and the reason wherever it is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from qfx.passes.discover.capture import capture
from qfx.passes.lower import _attention as attention
from qfx.passes.lower._rewrite import find_writes, is_written
from qfx.passes.lower.fuse import rewrite

HEADS, GROUPS, LENGTH, WIDE = 4, 2, 7, 8
Body = Callable[..., Any]


def repeat(x: Tensor, times: int = HEADS // GROUPS) -> Tensor:
    """As Hugging Face models repeat heads."""
    batch, groups, length, wide = x.shape
    return x[:, :, None, :, :].expand(batch, groups, times, length, wide).reshape(batch, -1, length, wide)


def copied(x: Tensor) -> Tensor:
    batch, groups, length, wide = x.shape
    return x.unsqueeze(-3).expand(-1, -1, 2, -1, -1).contiguous().view(batch, 2 * groups, length, wide)


def cloned(x: Tensor) -> Tensor:
    wide = x.unsqueeze(2).expand(-1, -1, 2, -1, -1).clone(memory_format=torch.contiguous_format)
    return torch.ops.aten._unsafe_view(wide, [x.shape[0], 2 * x.shape[1], *x.shape[2:]])


def tiled(x: Tensor) -> Tensor:
    """The heads one after the other, twice: other query heads share them."""
    return x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def inputs(batch: int = 3, tokens: int = 1, heads: int = HEADS, groups: int = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(2, batch, groups, LENGTH, WIDE)
    return torch.randn(batch, tokens, heads, WIDE).transpose(1, 2), k, v


class Shared:
    """A function's graph before and after, run on the same values; what is written in place counts as a result."""

    @torch.no_grad()
    def __init__(self, body: Body, *given: Any, **sizes: int) -> None:
        given = given or inputs(**sizes)
        self.gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(*given)
        want = self.run(given)
        (self.done,) = [r for r in rewrite(self.gm.graph) if r.name == "share heads"]
        self.gm.recompile()
        self.why = [m.why for m in self.done.misses]
        self.pairs = list(zip(want, self.run(given), strict=True))

    def run(self, given: Any) -> list[Tensor]:
        torch.manual_seed(0)
        own = [x.clone() for x in given]
        result = self.gm(*own)
        return [*(result if isinstance(result, tuple) else (result,)), *own]

    def close(self) -> bool:
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in self.pairs)

    def shares(self) -> bool:
        """Rewritten, with the same result, and nothing is repeated any more."""
        ops = {str(n.target) for n in self.gm.graph.nodes}
        return self.done.changed == 1 and not self.why and "aten.expand.default" not in ops and self.close()

    def stays(self, why: str) -> bool:
        return self.done.changed == 0 and self.why == [why] and self.close()


@pytest.mark.parametrize("form", [repeat, copied, cloned, lambda x: x.repeat_interleave(2, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_heads_that_share_keys_become_positions(form: Body, scale: float | None) -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, form(k), form(v), scale=scale)

    f = Shared(body)
    assert f.shares() and Shared(body, batch=1).shares() and Shared(body, groups=1, heads=2).shares()
    assert Shared(body, groups=3, heads=6).shares()  # as many heads on a key as there are keys would hide their order
    (node,) = f.gm.graph.find_nodes(op="call_function", target=attention.ATTENTION)
    assert node.meta["val"].shape == (3, GROUPS, 2, WIDE) and node.kwargs == ({"scale": scale} if scale else {})
    (out,) = f.gm.graph.output_node().all_input_nodes
    assert out.meta["val"].shape == (3, HEADS, 1, WIDE)


@pytest.mark.parametrize("case", ["plain", "mask", "mask of heads", "causal", "prefill", "scale"])
def test_a_kernel_that_shares_heads_gets_them_as_they_are(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_shared_by_kernel", lambda *a: True)
    given: dict[str, Any] = {"is_causal": True} if case == "causal" else {"scale": 0.3} if case == "scale" else {}
    shape = {"mask": (3, 1, 1, LENGTH), "mask of heads": (1, HEADS, 1, LENGTH)}.get(case)
    mask = None if shape is None else torch.randn(shape)

    def body(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), *mask, **given)

    tokens = 5 if case in ("prefill", "causal") else 1
    f = Shared(body, *inputs(tokens=tokens), *([] if mask is None else [mask]))
    assert f.shares()
    (node,) = f.gm.graph.find_nodes(op="call_function", target=attention.ATTENTION)
    assert node.kwargs["enable_gqa"] and node.kwargs.get("scale") == given.get("scale")
    assert "aten.reshape.default" not in {str(n.target) for n in f.gm.graph.nodes}


def test_kernels_that_are_not_allowed_are_not_taken() -> None:
    given = 4, 2, 1, WIDE, WIDE, torch.float32, torch.device("cpu"), None, False
    assert attention._chosen_kernel(*given) == SDPBackend.FLASH_ATTENTION.value
    for allowed in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):  # the second is none for a CPU: torch raises
        with sdpa_kernel(allowed):
            assert attention._chosen_kernel(*given) <= SDPBackend.MATH.value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_which_kernel_the_device_has(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 8, tokens, 64), torch.randn(2, 2, 64, 64), torch.randn(2, 2, 64, 64)
    given = [t.to("cuda", dtype) for t in (q, k, v, torch.ones(2, 1, tokens, 64))]
    given[3] = given[3].bool()

    def body(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k, 4), repeat(v, 4), mask)

    f = Shared(body, *given)
    assert all((a - b).abs().max() < 2e-2 for a, b in f.pairs[:1])
    (node,) = f.gm.graph.find_nodes(op="call_function", target=attention.ATTENTION)
    if dtype == torch.float32:  # no fused kernel shares heads of float32
        assert "enable_gqa" not in node.kwargs and f.done.changed == (tokens == 1)
    elif torch.cuda.get_device_capability() == (9, 0):
        assert node.kwargs["enable_gqa"] and f.done.changed == 1


MASKS = [(1, LENGTH), (1, 1, LENGTH), (1, 1, 1, LENGTH), (3, 1, 1, LENGTH), (3, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_that_all_heads_share(shape: tuple[int, ...], boolean: bool) -> None:
    mask = torch.randn(shape)
    if boolean:
        mask = mask > -0.5
        mask[..., 0] = True

    def body(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask)

    assert Shared(body, *inputs(), mask).shares()


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        *((s, True) for s in [(), (LENGTH,), *MASKS]),
        *((s, False) for s in [(HEADS, LENGTH), (HEADS, 1, LENGTH), (1, HEADS, 1, LENGTH), (3, 1, HEADS, LENGTH)]),
        ((1, 1, 1, 1, LENGTH), False),
    ],
)
def test_which_masks_are_shared(shape: tuple[int, ...], shared: bool) -> None:
    assert attention._is_shared(shape) == shared


def test_values_may_be_wider_and_one_of_several_keys() -> None:
    q, k, _ = inputs()
    assert Shared(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), q, k, torch.randn(3, GROUPS, LENGTH, 5)
    ).shares()
    assert Shared(lambda q, k, v: F.scaled_dot_product_attention(q, x := repeat(k), x) + v.sum()).shares()


def test_other_readers_keep_what_is_repeated() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k = repeat(k)
        return F.scaled_dot_product_attention(q, k, repeat(v)), k.exp()

    f = Shared(body)
    assert f.done.changed == 1 and f.close()
    assert len(f.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)) == 1


def masked(*shape: int) -> Body:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), q.new_ones(shape).cumsum(-3))


MISSES: dict[str, tuple[str, Body, dict[str, int]]] = {
    "prefill": (
        "its query is longer than one token",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)),
        {"tokens": 5},
    ),
    "causal": (
        "it is causal, and positions of a query would differ",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True),
        {},
    ),
    "dropout": (
        "it drops weights at random",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), dropout_p=0.5),
        {},
    ),
    "grouped": (
        "it shares heads by itself, and those are repeated",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), enable_gqa=True),
        {"heads": 8},
    ),
    "mask of heads": ("its mask is not the same for all heads", masked(1, HEADS, 1, LENGTH), {}),
    "three axes": ("its mask is not the same for all heads", masked(HEADS, 1, LENGTH), {}),
    "keys": (
        "only its keys are repeated",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), torch.cat([v, v], 1)),
        {},
    ),
    "values": (
        "only its values are repeated",
        lambda q, k, v: F.scaled_dot_product_attention(q, torch.cat([k, k], 1), repeat(v)),
        {},
    ),
    "heads": (
        "its query has other heads than its repeated keys",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)),
        {"heads": 1},
    ),
    "times": (
        "its keys are repeated 2 times, its values 4 times",
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v[:, :1], 4)),
        {},
    ),
}


@pytest.mark.parametrize("case", MISSES)
def test_what_is_left_says_why(case: str) -> None:
    why, body, sizes = MISSES[case]
    assert Shared(body, **sizes).stays(why)


@pytest.mark.parametrize("form", [tiled, lambda x: torch.cat([x, x], 1), lambda x: repeat(x, 1).repeat(1, 2, 1, 1)])
def test_what_is_not_repeated_in_a_row_is_no_miss(form: Body) -> None:
    f = Shared(lambda q, k, v: F.scaled_dot_product_attention(q, form(k), form(v)))
    assert f.done.changed == 0 and f.why == [] and f.close()


def step(between: Body, form: Body = repeat, behind: Body = lambda *a: None) -> Body:
    """A step of decoding: the cache is written in place, and repeated; `between` gets it and what is repeated."""

    def body(q: Tensor, keys: Tensor, values: Tensor, new: Tensor, at: Tensor) -> Tensor:
        k, v = keys.index_copy_(2, at, new), values.index_copy_(2, at, new)
        repeated = form(k)
        between(keys, repeated)
        out = F.scaled_dot_product_attention(q, repeated, form(v))
        behind(keys, out)
        return out

    return body


def stepped(body: Body) -> Shared:
    return Shared(body, *inputs(), torch.randn(3, GROUPS, 1, WIDE), torch.tensor([4]))


def test_a_cache_that_is_written_before_is_read_as_it_is() -> None:
    f = stepped(step(lambda *a: None))
    assert f.shares()
    (node,) = f.gm.graph.find_nodes(op="call_function", target=attention.ATTENTION)
    assert [n.target for n in node.args[1:3]] == [torch.ops.aten.index_copy_.default] * 2  # type: ignore[union-attr]


def test_what_is_written_behind_the_attention_is_no_matter() -> None:
    f = stepped(step(lambda *a: None, behind=lambda keys, out: (keys.zero_(), out.mul_(2))))
    assert f.shares()
    (out,) = f.gm.graph.output_node().all_input_nodes
    assert is_written(out) and len(find_writes(f.gm.graph)[out]) == 1  # for the rewrites that follow


WRITES: dict[str, Body] = {
    "cache": lambda keys, k: keys.mul_(2),
    "view": lambda keys, k: keys[:, :, 3].zero_(),
    "flat view": lambda keys, k: torch.ops.aten._unsafe_view(keys, [-1]).mul_(2),
    "out": lambda keys, k: torch.mul(keys, 2, out=keys),
    "list": lambda keys, k: torch._foreach_mul_([keys], 2),
    "repeated": lambda keys, k: k[:, 1:3].mul_(2),
}


@pytest.mark.parametrize("form", [repeat, copied, cloned])
@pytest.mark.parametrize("write", WRITES)
def test_a_cache_that_is_written_in_between_is_left(write: str, form: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    body = step(WRITES[write], form)
    assert stepped(body).stays("its keys or values are written to after they were repeated")
    monkeypatch.setattr(attention, "_is_written_behind", lambda *a: False)
    assert not stepped(body).close()  # or the law would see nothing


def test_a_buffer_with_two_nodes_is_one_memory() -> None:
    graph = fx.Graph()
    read, written, other = (graph.create_node("get_attr", name) for name in ("keys", "keys", "values"))
    zero = graph.call_function(torch.ops.aten.zero_.default, (written,))
    assert find_writes(graph) == {read: [zero], written: [zero], zero: [zero]} and other not in find_writes(graph)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_batch_that_varies(tokens: int) -> None:
    given = dict(zip("qkv", inputs(tokens=tokens), strict=True))
    graph = capture(Attention().eval(), given)
    assert isinstance(graph.fx.find_nodes(op="placeholder")[0].meta["val"].shape[0], torch.SymInt)
    (done,) = [r for r in rewrite(graph.fx) if r.name == "share heads"]
    graph.touch()
    assert done.changed == (tokens == 1) and len(done.misses) == (tokens > 1)
    for batch in (3, 2, 5):
        given = dict(zip("qkv", inputs(batch, tokens), strict=True))
        torch.testing.assert_close(graph.run(given), Attention()(**given), rtol=1e-5, atol=1e-6)


def test_an_open_number_of_tokens_is_left() -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v))

    graph = make_fx(body, pre_dispatch=True, tracing_mode="fake")(*inputs()).graph
    q = graph.find_nodes(op="placeholder")[0]
    env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with torch._subclasses.FakeTensorMode(shape_env=env):
        q.meta["val"] = torch.empty(3, HEADS, env.create_unbacked_symint(), WIDE)
    (done,) = [r for r in rewrite(graph) if r.name == "share heads"]
    assert done.changed == 0 and [m.why for m in done.misses] == ["the number of its query's tokens is not fixed"]
