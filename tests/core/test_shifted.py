"""Norms that are given a shift: nothing changes with a zero one, any shift folds, and it can be taken away."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qfx.core.fold import fold
from qfx.core.maps import Diagonal, Shift
from qfx.core.shifted import Shifted, add_shift, make_shifted
from tests.zoo.captured import Captured, captured, distance


def shifted_sites(model: Captured) -> list:
    return [s for s in model.sites() if "AddedShift" in s.folds]


@pytest.mark.parametrize("name", ["llama", "gemma", "deepseek_v3", "mixtral", "swiglu"])
def test_an_added_shift_folds_and_can_be_taken_away(name: str) -> None:
    model = captured(name, torch.float64)
    wanted, start, sites = model.run(), model.snapshot(), shifted_sites(model)
    keys = set(model.module.state_dict())
    assert sites
    for site in sites:
        path = site.writer.gain.param.rpartition(".")[0]
        module, value = model.module.get_submodule(path), site.value
        cls, near = type(module), [r.linear for r in site.readers if r.linear.x is value]
        remove = add_shift(model.graph, site, model.linears)
        assert all(a.equal(b) for a, b in zip(wanted, model.run(), strict=True))
        assert isinstance(module, Shifted) and isinstance(module, cls) and type(module).__name__ == cls.__name__
        assert set(model.module.state_dict()) - keys == {f"{path}.shift"} and "Shift" in site.folds
        assert all(linear.x is site.value is not value for linear in near)
        undo = [fold(model.graph, site, Shift(torch.randn(site.channels, dtype=torch.float64)))]
        undo.append(fold(model.graph, site, Diagonal(torch.rand(site.channels, dtype=torch.float64) + 0.5)))
        assert module.shift.abs().max() > 0.1
        assert distance(wanted, model.run()) < 1e-9
        assert distance(wanted, model.call()) < 1e-9
        for back in reversed(undo):
            back()
        remove()
        assert model.snapshot() == start and not hasattr(module, "shift")
        assert site.value is value and "Shift" not in site.folds and site.writer.bias is None
    assert all(a.equal(b) for a, b in zip(wanted, model.run(), strict=True))


def test_a_shift_that_the_readers_do_not_make_up_for_changes_the_function() -> None:
    model = captured("swiglu", torch.float64)
    site, wanted = shifted_sites(model)[0], model.run()
    add_shift(model.graph, site, model.linears)
    with torch.no_grad():
        model.graph.attr("norms.0.shift").fill_(0.1)
    assert distance(wanted, model.run()) > 1e-3
    assert distance(model.run(), model.call()) < 1e-12


def test_in_low_precision_the_shift_is_made_in_float32() -> None:
    model = captured("swiglu", torch.bfloat16)
    graph, site, offset = model.graph, shifted_sites(model)[0], torch.randn(64)
    with graph.in_float32(graph.nodes):
        wanted = model.run()
        add_shift(graph, site, model.linears)
        fold(graph, site, Shift(offset))
        assert graph.attr("norms.0.shift").dtype == torch.float32 and distance(wanted, model.run()) < 1e-5
    assert model.module.norms[0].shift.equal(-offset.bfloat16())
    assert distance(model.run(), model.call()) == 0


def test_a_shifted_norm_is_a_module_like_any_other() -> None:
    norm, x = nn.LayerNorm(4), torch.randn(2, 4)
    plain = norm(x)
    make_shifted(norm, torch.arange(4.0))
    make_shifted(norm, 2 * torch.arange(4.0))  # a second time: only the shift is another
    assert norm(x).equal(plain + 2 * torch.arange(4.0)) and not norm.shift.requires_grad
    assert list(norm.state_dict()) == ["weight", "bias", "shift"] and type(norm).__mro__.count(Shifted) == 1
    assert copy.deepcopy(norm)(x).equal(norm(x)) and norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    other = nn.LayerNorm(4)
    make_shifted(other, torch.zeros(4))
    assert type(other) is type(norm) is not nn.LayerNorm and type(nn.LayerNorm(4)) is nn.LayerNorm
    with pytest.raises(pickle.PicklingError):  # its class is made at run time: a state dict is what can be stored
        pickle.dumps(norm)
