"""The tables of measured configurations that ship: nothing in them is out of date, or where nobody looks for it."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

pytest.importorskip("triton")

from qfx.kernels.gpu import gemm8_config, tune, w4_config

Entries = dict[str, dict[str, dict[str, Any]]]


def table(op: str) -> Entries:
    text = (resources.files("qfx.kernels.gpu") / "tables" / "sm_90.json").read_text()
    entries: Entries = json.loads(text)[op]
    return entries


def test_8_bit_products_are_among_what_is_tried() -> None:
    for key, found in table("gemm8").items():
        kind, tma, cublas, shape = key.split(" ")
        n, k = map(int, shape.split("x"))
        for tokens, entry in found.items():
            m, config = int(tokens), gemm8_config.Config(**entry["config"])
            flags = kind.startswith("int8"), tma == "True", cublas == "True", not kind.endswith("-general")
            assert config in gemm8_config.candidates(m, n, k, *flags), (key, m)
            assert m == tune.bucket(m)
            # what the keys tell apart matters only with so many tokens
            assert m > gemm8_config.NO_CUBLAS or cublas == "False", (key, m)
            assert m > gemm8_config.SKINNY_ONLY or not kind.endswith("-general"), (key, m)


def test_4_bit_products_are_among_what_is_tried() -> None:
    for key, found in table("w4").items():
        kind, _, shape = key.split(" ")
        n, k = map(int, shape.split("x"))
        for tokens, entry in found.items():
            m, config = int(tokens), w4_config.Config(**entry["config"])
            direct = m <= (16 if kind == "table" else 8)
            tried = w4_config.candidates(m, n, k, kind in ("int4", "table"), True, direct, kind == "multiples")
            assert config in tried and m == tune.bucket(m), (key, m)


@pytest.mark.parametrize("kind", ["int8 True False", "fp8 True False", "fp8 True True"])
def test_8_bit_products_of_the_models_are_there(kind: str) -> None:
    """For every number of tokens that has a configuration of its own, at all shapes that were measured."""
    found = {
        key.rpartition(" ")[2]: set(map(int, e)) for key, e in table("gemm8").items() if key.startswith(kind + " ")
    }
    few, many = {1, 8, 16}, {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}
    wanted = many if kind.endswith("True") else few if kind.startswith("fp8") else few | many
    assert len(found) >= 18 and all(tokens >= wanted for tokens in found.values())
