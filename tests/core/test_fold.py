"""The law of folds, on every site of many models: the function stays, the inverse restores, undo is exact."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qfx.core.fold import fold
from qfx.core.maps import Diagonal, Map, Permute, Shift, random_rotation
from qfx.core.site import Site
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from tests.zoo.captured import Captured, captured, distance
from tests.zoo.user_modules import FusedAttention, feature_inputs

HF = ("llama", "gemma", "phi3", "gpt2", "falcon", "bloom", "mixtral", "deepseek_v3", "gpt_oss", "bert")
USER = ("block_stack", "swiglu", "einsum", "raw_parameters", "mlp", "norm_to_residual", "conv_stem")
every_model = pytest.mark.parametrize("name", HF + USER)


def maps_of(site: Site, generator: torch.Generator) -> Iterator[Map]:
    """A random map of each kind that folds."""
    scale = torch.randn(site.channels, generator=generator, dtype=torch.float64).exp()
    yield Diagonal(scale)
    if "SignedDiagonal" in site.folds:
        yield Diagonal(scale * (torch.randint(2, scale.shape, generator=generator) * 2 - 1))
    if "Shift" in site.folds:
        yield Shift(torch.randn(site.channels, generator=generator, dtype=torch.float64))


def site_of(model: Captured, name: str) -> Site:
    return next(s for s in model.sites() if s.name == name)


@every_model
def test_every_fold_keeps_the_function_and_can_be_undone(name: str) -> None:
    model = captured(name, torch.float64)
    generator, wanted, start = torch.Generator().manual_seed(0), model.run(), model.snapshot()
    sites = model.sites()
    assert sites
    for site in sites:
        for change in maps_of(site, generator):
            undo = fold(model.graph, site, change)
            assert model.snapshot() != start
            assert distance(wanted, model.run()) < 1e-9
            assert distance(wanted, model.call()) < 1e-9  # and not only the graph's
            undo()
            assert model.snapshot() == start


@every_model
def test_all_folds_together_keep_it_and_the_inverses_restore_the_weights(name: str) -> None:
    model = captured(name, torch.float64)
    generator, wanted, start = torch.Generator().manual_seed(1), model.run(), model.snapshot()
    before, done, undo = model.state(), [], []
    for site in model.sites():
        for change in maps_of(site, generator):
            undo.append(fold(model.graph, site, change))
            done.append((site, change))
    assert distance(wanted, model.run()) < 1e-9
    assert distance(wanted, model.call()) < 1e-9
    undo += [fold(model.graph, site, change.inverse()) for site, change in reversed(done)]
    after = model.module.state_dict()
    for key, value in before.items():
        assert (after[key] - value).abs().max() <= 1e-12 * value.abs().max().clamp_min(1)
    assert all(after[key].abs().max() < 1e-12 for key in after if key not in before)  # added biases
    for back in reversed(undo):
        back()
    assert model.snapshot() == start


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "mlp", "einsum"])
def test_a_fold_that_forgets_a_parameter_changes_the_function(name: str) -> None:
    model = captured(name, torch.float64)
    wanted = model.run()
    for site in model.sites():
        change = Diagonal(torch.rand(site.channels, dtype=torch.float64) + 0.5)
        rows = site.writer.rows
        wrong = [replace(site, readers=site.readers[:i] + site.readers[i + 1 :]) for i in range(len(site.readers))]
        wrong.append(replace(site, readers=tuple(replace(r, index=r.index.roll(1)) for r in site.readers)))
        if rows is not None:
            wrong.append(replace(site, writer=replace(site.writer, rows=rows.roll(1))))
        if site.writer.norm_bias is not None:
            wrong.append(replace(site, writer=replace(site.writer, norm_bias=None)))
        for broken in wrong:
            undo = fold(model.graph, broken, change)
            assert distance(wanted, model.run()) > 1e-5
            undo()


@pytest.mark.parametrize(
    ("name", "site", "change", "why"),
    [
        ("mlp", "0", Diagonal(torch.arange(64.0)), "a scale at 0 is zero"),
        ("mlp", "0", Diagonal(torch.full((64,), torch.nan)), "0 takes 64 finite values"),
        ("mlp", "0", Diagonal(torch.full((64,), torch.inf)), "0 takes 64 finite values"),
        ("mlp", "0", Shift(torch.full((64,), -torch.inf)), "0 takes 64 finite values"),
        ("mlp", "0", Diagonal(torch.ones(63)), r"0 takes 64 finite values, not \[63\]"),
        ("mlp", "0", Diagonal(torch.ones(1)), r"0 takes 64 finite values, not \[1\]"),
        ("mlp", "0", Shift(torch.ones(1, 64)), r"0 takes 64 finite values, not \[1, 64\]"),
        (
            "mlp",
            "1",
            Diagonal(-torch.ones(96)),
            "1 does not fold SignedDiagonal: the map does not commute with the ops",
        ),
        ("mlp", "1", Shift(torch.ones(96)), "1 does not fold Shift: the map does not commute with the ops before 3"),
        ("swiglu", "norms.0.gain", Shift(torch.ones(64)), "does not fold Shift: norms.0.gain has no bias"),
        (
            "einsum",
            "norm",
            Shift(torch.ones(64)),
            "does not fold Shift: w_q is a parameter of its module's own forward",
        ),
        ("mlp", "0", Permute(torch.arange(64)), "Permute does not fold"),
        ("mlp", "0", random_rotation(64, torch.Generator()), "Rotate does not fold"),
    ],
)
def test_what_was_not_proved_is_refused(name: str, site: str, change: Map, why: str) -> None:
    model = captured(name)
    start, place = model.snapshot(), site_of(model, site)
    with pytest.raises(ValueError, match=why):
        fold(model.graph, place, change)
    assert model.snapshot() == start


def test_a_kind_without_a_reason_is_refused_too() -> None:
    model = captured("mlp")
    with pytest.raises(ValueError, match="it is not among what the probe proved"):
        fold(model.graph, replace(site_of(model, "0"), folds=set()), Diagonal(torch.ones(64)))


def test_weights_are_rounded_once() -> None:
    model = captured("mlp")
    norm, up, _, down = model.module
    scale, offset = torch.rand(64) + 0.5, torch.randn(64)
    s, z = scale.double(), offset.double()
    old = {k: v.double().clone() for k, v in model.module.state_dict().items()}
    fold(model.graph, site_of(model, "0"), Diagonal(scale))
    assert norm.weight.equal((old["0.weight"] * s).float()) and norm.bias.equal((old["0.bias"] * s).float())
    assert up.weight.equal((old["1.weight"] / s).float()) and up.bias.equal(old["1.bias"].float())
    assert down.weight.equal(old["3.weight"].float())
    undo = fold(model.graph, site_of(model, "0"), Shift(offset))
    assert norm.bias.equal(((old["0.bias"] * s).float().double() - z).float())
    assert up.bias.equal((old["1.bias"] + (old["1.weight"] / s).float().double() @ z).float())
    undo()
    assert up.bias.equal(old["1.bias"].float())


def test_a_shift_gives_plain_linears_a_bias() -> None:
    model = captured("llama")
    site = site_of(model, "model.layers.0.self_attn.v_proj")
    wanted, start, keys = model.run(), model.snapshot(), set(model.module.state_dict())
    undo = fold(model.graph, site, Shift(torch.ones(site.channels)))
    attention = model.module.model.layers[0].self_attn
    added = {f"model.layers.0.self_attn.{name}.bias" for name in ("v_proj", "o_proj")}
    assert set(model.module.state_dict()) - keys == added
    assert attention.v_proj.bias.equal(-torch.ones(16)) and isinstance(attention.o_proj.bias, nn.Parameter)
    assert {lin.bias for lin in model.linears if lin.bias} == added
    assert {str(n.target) for n in model.graph.nodes if n.op == "get_attr"} >= added
    assert distance(wanted, model.run()) < 1e-5 and distance(model.run(), model.call()) == 0
    again = fold(model.graph, site, Shift(torch.ones(site.channels)))  # the biases are there now
    assert attention.v_proj.bias.equal(-2 * torch.ones(16)) and set(model.module.state_dict()) - keys == added
    again()
    undo()
    assert model.snapshot() == start and attention.v_proj.bias is None and model.run()[0].equal(wanted[0])


class HalfGain(nn.Module):
    """A norm whose gain is an affine function of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * self.weight + 2) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class BareAttention(FusedAttention):
    """No linear has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = HalfGain(), nn.Linear(64, 96, bias=False), nn.Linear(32, 64, bias=False)


def bare_attention(dtype: torch.dtype) -> Captured:
    feeds = {"x": feature_inputs()["x"].to(dtype)}
    graph = capture(BareAttention().eval().to(dtype), feeds)
    return Captured(graph, feeds, find_linears(graph)[0], dtype)


def test_gains_that_are_functions_of_a_parameter() -> None:
    for model, name, slope, offset in (
        (captured("gemma"), "model.layers.0.input_layernorm", 1, 1),
        (bare_attention(torch.float32), "norm", 0.5, 2),
    ):
        site = site_of(model, name)
        assert site.writer.gain and (site.writer.gain.slope, site.writer.gain.offset) == (slope, offset)
        weight, scale = model.graph.attr(site.writer.gain.param), torch.rand(64) + 0.5
        wanted, old = model.run(), weight.detach().clone().double()
        fold(model.graph, site, Diagonal(scale))
        assert weight.equal((((slope * old + offset) * scale.double() - offset) / slope).float())
        assert distance(wanted, model.call()) < 1e-5


def test_low_precision_is_folded_on_float32_copies() -> None:
    model = bare_attention(torch.bfloat16)
    site, before, graph = site_of(model, "qkv[64:96]"), model.state(), model.graph
    scale, offset = torch.rand(32) + 0.5, torch.randn(32)
    with graph.in_float32(graph.nodes):
        wanted = model.run()
        undo = [fold(graph, site, Shift(offset)), fold(graph, site, Diagonal(scale))]
        assert graph.attr("qkv.bias").dtype == torch.float32 and distance(wanted, model.run()) < 1e-5
    old, new = before["qkv.weight"].double(), model.state()
    assert new["qkv.weight"].equal(torch.cat([old[:64], old[64:] * scale.double()[:, None]]).bfloat16())
    assert new["qkv.bias"].equal(
        (torch.cat([torch.zeros(64), -offset]) * torch.cat([torch.ones(64), scale])).bfloat16()
    )
    assert new["out.weight"].equal((before["out.weight"].double() / scale.double()).bfloat16())
    with graph.in_float32(graph.nodes):
        undo = [fold(graph, site, Diagonal(-scale)), fold(graph, site, Shift(offset))]
        for back in reversed(undo):
            back()
    assert all(v.equal(new[k]) for k, v in model.module.state_dict().items())


def test_every_expert_is_folded() -> None:
    model = captured("mixtral", torch.float64)
    site = site_of(model, "model.layers.0.mlp.experts.gate_up_proj[96:192]")
    experts, scale = model.module.model.layers[0].mlp.experts, torch.rand(96, dtype=torch.float64) + 0.5
    gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    fold(model.graph, site, Diagonal(scale))
    assert experts.gate_up_proj[:, :96].equal(gate_up[:, :96])
    assert experts.gate_up_proj[:, 96:].equal(gate_up[:, 96:] * scale[:, None])
    assert experts.down_proj.equal(down / scale)
