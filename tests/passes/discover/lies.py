"""Discovery made to lie, for tests: wrong readers, channels, gains, and rows; and how to tell that it was found out."""

import importlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.site import Gain, Reader, Site
from qfx.passes.discover._ports import norm_writers

Lie = Callable[[Graph, list[Linear], list[Site]], Site]
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SMOOTH = {"smoothquant": {"smooth_o": True, "smooth_down": True}}
SHIFT = {"outlier_suppression_plus": {"steps": 2, "value": True, "inner": True}}
whole = importlib.import_module("qfx.quantize")


def run(model: nn.Module, inputs: dict[str, Tensor], step: dict = SMOOTH, **more: bool) -> nn.Module:
    return qfx.quantize(model, {"schemes": {}, "steps": [step]}, calibration=[inputs], progress=False, **more)


def plant(monkeypatch: pytest.MonkeyPatch, lie: Lie, *, alone: bool = True) -> None:
    """Makes discovery lie about one site, and, if `alone`, keep all others to itself."""
    real = whole.find_sites

    def find(graph: Graph, linears: list[Linear], env: dict, **more: int) -> tuple:
        found, misses = real(graph, linears, env, **more)
        planted = lie(graph, linears, found)
        return ([planted] if alone else found), misses

    monkeypatch.setattr(whole, "find_sites", find)


def site_at(found: list[Site], writer: str) -> Site:
    (only,) = [s for s in found if s.writer.name == writer]
    return only


def without(writer: str, *left_out: str) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        kept = tuple(r for r in site.readers if r.linear.name not in left_out)
        assert len(kept) == len(site.readers) - len(left_out)
        site.readers = kept
        return site

    return lie


def rotated_heads(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, f"{ATTENTION}.v_proj")
    (reader,) = site.readers
    site.readers = (Reader(reader.linear, reader.index.roll(8)),)
    return site


def through_the_gate(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, f"{MLP}.up_proj")
    site.writer.linear = next(lin for lin in linears if lin.name == f"{MLP}.gate_proj")
    return site


def moved_rows(writer: str, by: int) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        site.writer.rows = site.writer.rows + by
        return site

    return lie


def plain_gain(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, "model.layers.0.input_layernorm")
    assert site.writer.gain.offset == 1
    site.writer.gain = Gain(site.writer.gain.param)
    return site


def forgotten_bias(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
    site = site_at(found, "model.decoder.layers.0.final_layer_norm")
    site.writer.norm_bias = None
    return site


def invented(norm: str, *readers: str) -> Lie:
    """A site whose value somebody else takes as well: a residual, the caller."""

    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        assert not [s for s in found if s.writer.name == norm]
        (at,) = [p for p in norm_writers(graph) if p.writer.name == norm]
        channels = graph.attr(at.writer.gain.param).numel()
        read = tuple(Reader(lin, torch.arange(channels)) for lin in linears if lin.name in readers)
        assert len(read) == len(readers)
        return Site(norm, "norm", at.value, channels, at.writer, read, {"Diagonal"})

    return lie


def claims_shift(writer: str) -> Lie:
    def lie(graph: Graph, linears: list[Linear], found: list[Site]) -> Site:
        site = site_at(found, writer)
        assert "Shift" not in site.folds
        site.folds.add("Shift")
        return site

    return lie


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def undone(model: nn.Module) -> list[tuple[str, float]]:
    """Site and error of everything that was taken back."""
    found = [(m.where, re.search(r"undone: .* by ([\w.+-]+) \(at most", m.why)) for m in model.qfx.report.misses]
    return [(where, float(match[1])) for where, match in found if match]


def assert_as_before(got: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    before, now = dict(model.named_parameters()), dict(got.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())
    assert all(not now[name].any() for name in set(now) - set(before))  # biases that were made for the attempt
    assert torch.equal(outputs(got, inputs), outputs(model, inputs))
    assert not got.qfx.report.folds
