"""What folding methods share: statistics by channel, measuring behind earlier folds, the report, taking folds back."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qfx.core.graph import Graph
from qfx.core.maps import Diagonal, Map, Shift
from qfx.core.passes import State
from qfx.core.report import Miss
from qfx.core.site import Reader, Site
from qfx.core.stats import AbsMax, MinMax
from qfx.passes.transform._driver import difference, fold_sites, reader_stat, wanted_sites, weight_absmax
from qfx.passes.transform.smoothquant import SmoothQuant
from tests.passes.discovered import TOKENS, Discovered, inputs_of, site_of, zoo

BLOCKS = ("model.layers.0", "model.layers.1")
NORMS = [f"{block}.{norm}" for block in BLOCKS for norm in ("input_layernorm", "post_attention_layernorm")]


@pytest.fixture(scope="module")
def llama() -> Discovered:
    return zoo("llama")


@pytest.fixture(scope="module")
def mixtral() -> Discovered:
    return zoo("mixtral")


def halve(site: Site, *_: object) -> list[Map]:
    return [Diagonal(torch.full((site.channels,), 0.5, dtype=torch.float64))]


def fold(state: State, sites: Sequence[Site], choose: Callable = halve, **more: object) -> list[Miss]:
    return fold_sites(state, "test", sites, lambda: [AbsMax()], choose, **more).misses  # type: ignore[arg-type]


def norms(state: State) -> list[Site]:
    return [s for s in state.sites if s.kind == "norm"]


def test_a_statistic_of_a_channel_is_the_largest_of_all_columns_that_hold_it() -> None:
    first, second = SimpleNamespace(x="a"), SimpleNamespace(x="b")
    site = SimpleNamespace(
        channels=4,
        readers=(Reader(first, torch.tensor([0, 1, 0, 1, -1])), Reader(second, torch.tensor([2, 1]))),
    )
    stats = {}
    for linear, columns in ((first, [3.0, 2.0, 1.0, 5.0, 99.0]), (second, [-7.0, 4.0])):
        measured = MinMax()
        measured.update(torch.tensor([columns]))
        stats[linear.x] = {MinMax: measured}
    found = reader_stat(site, stats, MinMax, lambda s: s.value().hi, -torch.inf)  # type: ignore[arg-type]
    assert found.tolist() == [3, 5, -7, -torch.inf]


def test_query_heads_that_share_a_value_head_share_its_statistic(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8"})
    seen = {}

    def choose(site: Site, stats: dict, _: object) -> Miss:
        seen[site.name] = reader_stat(site, stats, AbsMax, lambda s: s.value(), 0.0)
        return Miss(site.name, "only looking")

    fold(state, [s for s in state.sites if s.kind == "value"], choose)
    for block in BLOCKS:
        x = inputs_of(llama.model, f"{block}.self_attn.o_proj").abs().amax(0)
        heads = x.view(2, 2, 8)  # two heads of values of eight channels, each read by two query heads
        torch.testing.assert_close(seen[f"{block}.self_attn.v_proj"], heads.amax(1).flatten())


def test_the_weights_that_read_a_channel(llama: Discovered, mixtral: Discovered) -> None:
    """Of all readers, rows and experts; of a value's channel also the columns of each query head."""
    state = mixtral.fresh({"*": "W8A8"})
    block = mixtral.model.model.layers[0]
    router, experts = block.mlp.gate.weight, block.mlp.experts
    want = torch.maximum(router.abs().amax(0), experts.gate_up_proj.abs().amax((0, 1)))
    found = weight_absmax(state.graph, site_of(state, NORMS[1]))
    assert torch.equal(found, want) and (want > router.abs().amax(0)).any()
    state.graph.module.model.layers[0].mlp.gate.weight[1, 2] = -50.0
    assert weight_absmax(state.graph, site_of(state, NORMS[1]))[2] == 50
    inner = weight_absmax(state.graph, site_of(state, "model.layers.0.mlp.experts.gate_up_proj[96:192]"))
    assert torch.equal(inner, experts.down_proj.abs().amax((0, 1)))
    state = llama.fresh({"*": "W8A8"})
    found = weight_absmax(state.graph, site_of(state, "model.layers.0.self_attn.v_proj"))
    columns = llama.model.model.layers[0].self_attn.o_proj.weight.abs().amax(0)
    assert torch.equal(found, columns.view(2, 2, 8).amax(1).flatten())


def test_all_batches_are_measured(llama: Discovered) -> None:
    tops: list[Tensor] = []

    def choose(site: Site, stats: dict, _: object) -> Miss:
        tops.append(reader_stat(site, stats, AbsMax, lambda s: s.value(), 0.0))
        return Miss(site.name, "only looking")

    state = llama.fresh({"*": "W8A8"})
    fold(state, norms(state), choose)
    for site, found in zip(norms(state), tops, strict=True):
        x = [inputs_of(llama.model, site.readers[0].linear.name, [b]).abs().amax(0) for b in TOKENS]
        torch.testing.assert_close(found, torch.stack(x).amax(0))
        assert any((found > one).any() for one in x)


def test_a_block_is_measured_behind_the_folds_of_the_blocks_before(llama: Discovered) -> None:
    """Only a fold that changes the function can show it, so this one does, and a tolerance lets it."""
    state = llama.fresh({"*": "W8A8"}, tolerance=10.0)
    tops = {}

    def choose(site: Site, stats: dict, _: object) -> Sequence[Map]:
        tops[site.name] = reader_stat(site, stats, AbsMax, lambda s: s.value(), 0.0)
        return halve(site)

    def prepare(graph: Graph, site: Site) -> None:
        if site.name == NORMS[1]:
            graph.module.model.layers[0].mlp.down_proj.weight.mul_(4)

    assert not fold(state, [site_of(state, n) for n in NORMS], choose, prepare=prepare)
    assert len(state.report.folds) == 4
    x = inputs_of(state.graph.module, f"{BLOCKS[1]}.self_attn.q_proj").abs().amax(0) * 2  # since halved
    torch.testing.assert_close(tops[NORMS[2]], x)
    assert not torch.allclose(x, inputs_of(llama.model, f"{BLOCKS[1]}.self_attn.q_proj").abs().amax(0), rtol=0.01)


def test_a_second_step_is_measured_behind_the_first(llama: Discovered) -> None:
    """What SmoothQuant has made equal at alpha 0.5 it leaves alone."""
    state = llama.fresh({"*": "W8A8"})
    step = SmoothQuant()
    step(state)
    once = {k: v.clone() for k, v in state.graph.module.state_dict().items()}
    assert max((v - llama.model.state_dict()[k]).abs().max() for k, v in once.items()) > 0.1
    step(state)
    for name, value in state.graph.module.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-4, atol=1e-6)


def test_the_report_says_what_was_folded_where(llama: Discovered, mixtral: Discovered) -> None:
    state = llama.fresh({"*": "W8A8"})
    wanted = [NORMS[0], "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    fold(state, [site_of(state, n) for n in wanted])
    found = [(f.site, f.kind, f.step, f.map, f.writers, f.readers, f.weights) for f in state.report.folds]
    heads, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    qkv = [f"{heads}.{n}_proj" for n in "qkv"]
    assert found == [
        (NORMS[0], "norm -> 3 linears", "test", "Diagonal", [NORMS[0]], qkv, 64 * (32 + 16 + 16)),
        (f"{heads}.v_proj", "value -> 1 linear", "test", "Diagonal", [f"{heads}.v_proj"], [f"{heads}.o_proj"], 64 * 32),
        (f"{mlp}.up_proj", "inner -> 1 linear", "test", "Diagonal", [f"{mlp}.up_proj"], [f"{mlp}.down_proj"], 64 * 96),
    ]
    assert all(0 <= f.error < 1e-5 and not f.online for f in state.report.folds)
    state = mixtral.fresh({"*": "W8A8"})
    fold(state, [site_of(state, NORMS[1])])
    (only,) = state.report.folds
    assert set(only.readers) == {f"{mlp}.gate", f"{mlp}.experts.gate_up_proj"}
    assert only.weights == 4 * 64 + 4 * 192 * 64


def test_the_kind_of_two_maps() -> None:
    state = zoo("opt").fresh({"*": "W8A8"}, ignore=["@head"])
    ones = torch.ones(64, dtype=torch.float64)
    fold(state, [s for s in state.sites if s.kind == "norm"][:1], lambda *_: [Shift(ones), Diagonal(2 * ones)])
    assert [f.map for f in state.report.folds] == ["Shift+Diagonal"]


def test_a_fold_that_changes_its_block_is_taken_back(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8"}, tolerance=1e-3)
    module = state.graph.module

    def prepare(graph: Graph, site: Site) -> Callable[[], None] | None:
        if site.name != NORMS[1]:
            return None
        weight = module.model.layers[0].mlp.gate_proj.weight
        before = weight[0].clone()
        weight[0] *= 1.5
        return lambda: weight[0].copy_(before)

    misses = fold(state, [site_of(state, n) for n in NORMS], prepare=prepare)
    assert [f.site for f in state.report.folds] == [NORMS[0], NORMS[2], NORMS[3]]
    (miss,) = misses
    assert (miss.where, miss.step, miss.weights) == (NORMS[1], "test", 2 * 96 * 64)
    assert miss.why.startswith("undone: folding Diagonal changed its block by 0.") and "1e-03" in miss.why
    for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        before = llama.model.get_parameter(f"model.layers.0.{name}.weight")
        assert torch.equal(module.get_parameter(f"model.layers.0.{name}.weight"), before)


def test_a_method_s_reason_for_no_map_is_reported(llama: Discovered) -> None:
    state = llama.fresh({"*": "W8A8"})
    misses = fold(state, [site_of(state, NORMS[0])], lambda site, *_: Miss(site.name, "no need", weights=3))
    assert misses == [Miss(NORMS[0], "no need", "test", 3)] and not state.report.folds


def test_progress_goes_through_all_segments(llama: Discovered) -> None:
    seen: list[tuple] = []
    state = llama.fresh({"*": "W8A8"}, progress=lambda *a: seen.append(a))
    fold(state, norms(state))
    total = len(state.graph.segments())
    assert seen == [("test", i, total) for i in range(total + 1)]


def test_which_sites_are_wanted(llama: Discovered) -> None:
    state = llama.fresh({"*.o_proj": "W8A8", "model.layers.1.mlp.up_proj": "W8A8"})
    assert [s.name for s in wanted_sites(state, {"norm", "value"})] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        NORMS[3],
    ]
    assert len(wanted_sites(llama.fresh({}), {"norm", "value", "inner"})) == 9


def test_the_difference_of_two_runs() -> None:
    a = torch.tensor([1.0, -4.0])
    assert difference([[a, 3]], [[a, 5]]) == 0
    assert difference([[a], [a]], [[a], [a + 0.2]]) == pytest.approx(0.05)
    nan = torch.tensor([1.0, torch.nan])
    inf = torch.tensor([1.0, -torch.inf])
    assert difference([[a]], [[nan]]) == difference([[inf]], [[a]]) == torch.inf
    assert difference([[inf]], [[inf]]) == 0  # masks
    assert difference([[inf]], [[inf + 0.5]]) == 0.5
