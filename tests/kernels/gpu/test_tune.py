"""Which configuration is taken: the measured one, or the nearest that suits."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from qfx.kernels.gpu import tune


@dataclass(frozen=True)
class Width:
    """A configuration."""

    width: int


class _Shipped:
    """A package's folder with one file."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __truediv__(self, name: str) -> _Shipped:
        return self

    def is_file(self) -> bool:
        return True

    def read_text(self) -> str:
        return self.text


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Of a device that is not here."""
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Thing 9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 9))
    for cached in (tune._own_table, tune._shipped_table):
        cached.cache_clear()
    tune._chosen.clear()
    yield
    tune._own_table.cache_clear()
    tune._shipped_table.cache_clear()
    tune._chosen.clear()


def choose(tokens: int, *rest) -> Width:
    return tune.pick("op", (*rest, tune.bucket(tokens)), Width(0), lambda: [], lambda c, w: None, torch.empty(1))


def test_buckets() -> None:
    assert [tune.bucket(m) for m in (0, 1, 2, 9, 17, 64, 65, 8192, 100_000)] == [1, 1, 8, 16, 32, 64, 128, 8192, 8192]


def test_measured_then_nearest_then_default(table) -> None:
    for tokens, width in ((16, 1), (64, 2), (1024, 3)):
        tune._save("op", (8, 8, tokens), Width(width), 1e-6)
    found = [choose(m, 8, 8).width for m in (1, 16, 17, 64, 65, 1024, 8192)]
    assert found == [1, 1, 2, 2, 3, 3, 3]
    assert choose(16, 8, 9) == Width(0)


def test_a_similar_weight_serves(table) -> None:
    tune._save("op", ("int8", "4096x4096", 64), Width(1), 1e-6)
    tune._save("op", ("int8", "8192x8192", 64), Width(2), 1e-6)
    tune._save("op", ("fp8", "5120x5120", 64), Width(3), 1e-6)
    shapes = {"4096x4096": 1, "5120x5120": 1, "7168x8192": 2, "28672x8192": 2, "64x64": 0, "8192": 0}
    assert {s: choose(64, "int8", s).width for s in shapes} == shapes


def test_more_tokens_of_a_similar_weight_before_fewer_of_the_same(table) -> None:
    tune._save("op", ("int8", "4096x4096", 256), Width(1), 1e-6)
    tune._save("op", ("int8", "8192x8192", 2048), Width(2), 1e-6)
    assert [choose(m, "int8", "4096x4096").width for m in (200, 1024, 4096)] == [1, 2, 2]


def test_about_as_many_tokens_of_a_similar_weight_before_far_more_of_the_same(table) -> None:
    tune._save("op", ("int8", "4096x4096", 1), Width(1), 1e-6)
    tune._save("op", ("int8", "4096x4096", 8192), Width(2), 1e-6)
    tune._save("op", ("int8", "8192x8192", 16), Width(3), 1e-6)
    assert [choose(m, "int8", "4096x4096").width for m in (1, 4, 16, 64, 2048)] == [1, 3, 3, 2, 2]
    tune._save("op", ("int8", "4096x4096", 64), Width(4), 1e-6)
    tune._chosen.clear()
    assert [choose(m, "int8", "4096x4096").width for m in (16, 32, 64)] == [3, 4, 4]
    tune._save("op", ("int8", "4096x4096", 32), Width(5), 1e-6)  # nearer than 1.5 doublings of the weight
    tune._chosen.clear()
    assert choose(16, "int8", "4096x4096") == Width(5)


def test_what_ships_for_these_tokens_before_own_measurements_of_others(table, monkeypatch) -> None:
    entry = {"config": {"width": 9}, "us": 1.0}
    shipped = {"op": {"int8 4096x4096": {"1": entry, "64": entry}}}
    monkeypatch.setattr(tune.resources, "files", lambda _: _Shipped(json.dumps(shipped)))
    tune._save("op", ("int8", "4096x4096", 16), Width(1), 1e-6)
    tune._save("op", ("int8", "4096x4096", 64), Width(2), 1e-6)
    assert [choose(m, "int8", "4096x4096").width for m in (1, 16, 64)] == [9, 1, 2]


def test_a_small_one_does_not_serve_many_tokens(table) -> None:
    tune._save("op", (4, 4, 16), Width(1), 1e-6)
    assert choose(512, 4, 4) == Width(0)


def test_tables_of_other_versions_and_broken_ones_are_passed_over(table) -> None:
    tune._save("op", (4, 4, 16), Width(1), 1e-6)
    path = tune.table_path()
    content = json.loads(path.read_text())
    content["op"]["4 4"]["16"]["config"] = {"length": 3}
    path.write_text(json.dumps(content))
    tune._own_table.cache_clear()
    assert choose(16, 4, 4) == Width(0)
    path.write_text('{"op": {')
    tune._own_table.cache_clear()
    tune._chosen.clear()
    assert choose(16, 4, 4) == Width(0)
