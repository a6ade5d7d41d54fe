"""Capture: what it strips, what stays dynamic, what it restores, and what it says when it cannot."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qfx.core.errors import CalibrationError, CaptureError
from qfx.core.graph import Graph
from qfx.passes.discover.capture import capture, check_feeds, exportable, fixed_size, input_names
from tests.zoo import ZOO
from tests.zoo.captured import captured, distance

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Module(nn.Module):
    """One linear, and a forward that a test brings."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(8, 8), forward
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)  # type: ignore[operator]


def branch(self: Module, x: Tensor) -> Tensor:
    return self.layer(x) if x.sum() > 0 else x


def noisy(self: Module, x: Tensor) -> Tensor:
    return self.dropout(self.layer(x.to(torch.float32).to(x.device)).float())


def in_place(self: Module, x: Tensor) -> Tensor:
    y = self.layer(x)
    y += 1
    return F.relu_(y) + y[..., :1].mul_(2)


def regions(self: Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        a, b = self.layer(x).chunk(2, -1)
    with torch.enable_grad():
        return torch.cat([b, a], -1) * 2


def mixed(self: Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.layer(x).float() + 1


def scratch(self: Module, x: Tensor) -> Tensor:
    return torch.cat([torch.empty_like(x), x.new_empty(x.shape), torch.empty(x.shape), self.layer(x)], -1)[..., 24:]


def targets(graph: Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("forward", [noisy, in_place, regions, mixed, scratch])
def test_the_graph_is_plain_and_computes_the_same(forward: object) -> None:
    module = Module(forward).eval()
    before = copy.deepcopy(module.state_dict())
    graph = capture(module, {"x": X})
    x = X.clone()
    for feeds in ({"x": x}, {"x": torch.randn(1, 2, 8)}):
        found, again = graph.run(feeds), graph.run(feeds)
        assert found.equal(again) and found.equal(module(**feeds))
    assert x.equal(X) and all(v.equal(before[k]) for k, v in module.state_dict().items())
    said = targets(graph)
    assert not any(word in t for t in said for word in ("assert", "dropout", "aten.to.", "empty", "grad"))
    assert ("wrap_with_autocast" in said) == (forward is mixed)  # what it does to dtypes must not get lost
    assert "aten.linear.default" in said or forward is mixed


def test_an_export_has_what_capture_strips() -> None:
    for forward, words in ((noisy, ("dropout", "aten.to.")), (regions, ("set_grad_enabled",)), (scratch, ("empty",))):
        program = torch.export.export(Module(forward).eval(), (), {"x": X}, strict=False)
        said = " ".join(str(n.target) for n in program.graph.nodes)
        assert all(word in said for word in words)


def test_sizes_of_one_stay_dynamic() -> None:
    model, _ = ZOO["block_stack"].load()
    graph = capture(model, {"input_ids": torch.ones(1, 1, dtype=torch.int64)})
    for shape in ((1, 1), (1, 9), (4, 1), (3, 7)):
        ids = torch.randint(128, shape)
        assert graph.run({"input_ids": ids}).equal(model(ids))
    assert [fixed_size(s) for s in graph.inputs[0].meta["val"].shape] == [None, None]


def test_a_mask_is_an_input_and_settings_come_back() -> None:
    model, feeds = ZOO["llama"].load()
    model.config.use_cache = True
    graph = capture(model, {**feeds, "attention_mask": torch.ones(2, 12, dtype=torch.int64)})
    assert model.config.use_cache is True and [str(n.target) for n in graph.inputs] == ["input_ids", "attention_mask"]
    for batch, padded in ((2, 5), (1, 3), (3, 0)):
        ids, mask = torch.randint(8, 128, (batch, 10)), torch.ones(batch, 10, dtype=torch.int64)
        mask[0, :padded] = 0
        with torch.no_grad():
            found, wanted = graph.run({"input_ids": ids, "attention_mask": mask}), model(ids, attention_mask=mask)
            blind = model(ids, attention_mask=torch.ones_like(mask))
        assert found.logits.equal(wanted.logits) and found.past_key_values is None
        assert not padded or not found.logits.equal(blind.logits)


def test_what_a_config_offers_is_set_and_restored() -> None:
    root, inner = SimpleNamespace(use_cache=True, other=1), SimpleNamespace(use_cache=False)
    experts = SimpleNamespace(_experts_implementation_internal="eager")
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for owner, config in zip([module, *module], [root, root, inner, experts], strict=False):
        owner.config = config
    with pytest.raises(ZeroDivisionError), exportable(module):
        assert (root.use_cache, inner.use_cache, root.other) == (False, False, 1)
        assert experts._experts_implementation_internal == "grouped_mm"
        _ = 1 / 0
    assert (root.use_cache, inner.use_cache, root.other) == (True, False, 1)
    assert experts._experts_implementation_internal == "eager"


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_every_form_of_experts_has_their_products(experts: str) -> None:
    model, feeds = ZOO["mixtral"].load()
    model.set_experts_implementation(experts)
    graph = capture(model, feeds)
    assert model.config._experts_implementation == experts
    assert sum("grouped_mm" in t for t in targets(graph)) == 4
    with torch.no_grad():
        assert distance([model(**feeds).logits], [graph.run(feeds).logits]) < 1e-5


def test_what_does_not_export_says_where_and_what_to_try() -> None:
    with pytest.raises(CaptureError) as error:
        capture(Module(branch).eval(), {"x": X})
    text = str(error.value)
    line = branch.__code__.co_firstlineno + 1
    assert text.startswith("capture: Module does not export with torch.export at ") and "\n" not in text
    assert f"{__file__}:{line} in branch: GuardOnDataDependentSymNode" in text
    assert "remove branches that depend on values of tensors" in text and "attn_implementation='sdpa'" in text
    assert error.value.__cause__ is not None


def test_a_failed_capture_leaves_the_settings_too() -> None:
    module = Module(branch).eval()
    module.config = SimpleNamespace(use_cache=True)
    with pytest.raises(CaptureError):
        capture(module, {"x": X})
    assert module.config.use_cache is True


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"^capture: Linear.forward does not take \['y'\]$"):
        capture(nn.Linear(8, 8), {"y": X})
    with pytest.raises(CaptureError, match=r"normalized_shape=\[8\]"):
        capture(nn.LayerNorm(8), {"input": torch.randn(3, 7)})


def test_inputs_of_keyword_arguments() -> None:
    class Keywords(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor, **more: Tensor) -> Tensor:
            return x * scale + more["bias"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Keywords()

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.inner(*args, **kwargs)

    feeds = {"x": X, "scale": X + 1, "bias": X * 2}
    for module in (Keywords(), Wrapper()):
        graph = capture(module, feeds)
        assert sorted(str(n.target) for n in graph.inputs) == ["bias", "scale", "x"]
        for smaller in (feeds, {k: v[:2, :4] for k, v in feeds.items()}, {k: v[:1] for k, v in feeds.items()}):
            check_feeds(graph, smaller, "batch 0")
            assert graph.run(smaller).equal(module(**smaller))
    assert not [name for name in vars(X) if "dynamic" in name]  # the caller's tensors are not marked
    assert input_names(Keywords()) == ["x", "scale"] and input_names(ZOO["mlp"].load()[0]) == ["input"]


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("bert", lambda f: {"input_ids": f["input_ids"]}, "batch 3 lacks the input 'attention_mask' that the first"),
        ("bert", lambda f: {**f, "labels": f["input_ids"]}, "batch 3 has labels, which the first batch had not"),
        (
            "bert",
            lambda f: {**f, "input_ids": f["input_ids"][0]},
            r"'input_ids' of shape \[12\]; .* for \['any', 'any'\]",
        ),
        ("bert", lambda f: {**f, "input_ids": f["input_ids"].int()}, "'input_ids' in torch.int32; .* for torch.int64"),
        (
            "mlp",
            lambda f: {"input": f["input"][..., :60]},
            r"\[2, 12, 60\]; the model was captured for \['any', 'any', 64",
        ),
        ("mlp", lambda f: {"input": f["input"].double()}, "in torch.float64; the model was captured for torch.float32"),
        ("siglip_vision", lambda f: {"pixel_values": f["pixel_values"][:, :, :16]}, r"\['any', 3, 32, 32\]"),
    ],
)
def test_feeds_of_another_form_are_refused(name: str, change: object, why: str) -> None:
    model = captured(name)
    check_feeds(model.graph, model.feeds, "batch 0")
    check_feeds(model.graph, {k: v[:1] for k, v in model.feeds.items()}, "batch 1")
    with pytest.raises(CalibrationError, match=why):
        check_feeds(model.graph, change(model.feeds), "batch 3")  # type: ignore[operator]


def test_a_capture_needs_no_weights() -> None:
    model, feeds = ZOO["mlp"].load()
    graph = capture(copy.deepcopy(model).to("meta"), {k: v.to("meta") for k, v in feeds.items()})
    wanted = [t for t in targets(capture(model, feeds)) if "aten.to." not in t]
    assert targets(graph) == wanted and graph.attr("1.weight").device.type == "meta"
