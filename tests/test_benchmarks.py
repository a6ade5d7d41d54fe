"""The benchmarks: every case computes what it says, a wrong one is noticed, tables compare the right rows."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(f"bench.{name}")
    finally:
        sys.path.remove(str(BENCHMARKS))


cases, models, ops, peers = map(module, ("cases", "models", "ops", "peers"))
report, timing, variants = map(module, ("report", "timing", "variants"))


def weight(out: int = 256, columns: int = 384) -> torch.Tensor:
    return (torch.randn(out, columns) * 0.02).bfloat16()


@pytest.mark.parametrize("name", list(ops.OPS))
def test_case_computes_what_it_says(name: str) -> None:
    w, x = weight(), torch.randn(5, 384).bfloat16()
    linear = ops.OPS[name][1](w)
    # where the op finds outliers by itself there are no codes to compare with: the error is that of 8 bits
    limit = cases.LIMIT if linear.values is not None else 2.0**-5
    assert cases.linear_error(linear, x, w) <= limit
    assert linear.call(linear.prepare(x), linear.weights).shape == (5, 256)


@pytest.mark.parametrize("name", ["int8_gemm", "w4a16_linear", "int8_outlier_linear static"])
def test_wrong_result_is_noticed(name: str) -> None:
    w, x = weight(), torch.randn(20, 384).bfloat16()
    linear = ops.OPS[name][1](w)
    one_row = replace(linear, call=lambda i, v: linear.call(i, v).index_fill(0, torch.tensor([19]), 0))
    assert cases.linear_error(one_row, x, w) > cases.LIMIT
    codes = linear.weights[0].clone()
    codes.view(torch.uint8).view(-1)[:256] ^= 0x7F
    assert cases.linear_error(replace(linear, weights=(codes, *linear.weights[1:])), x, w) > cases.LIMIT
    nan = replace(linear, call=lambda i, v: linear.call(i, v) * float("nan"))
    assert not cases.linear_error(nan, x, w) <= cases.LIMIT


@pytest.mark.parametrize("name", list(ops.ROW_OPS))
def test_row_case_computes_what_it_says(name: str) -> None:
    x, gain = torch.randn(3, 256).bfloat16(), torch.randn(256).bfloat16()
    case = ops.ROW_OPS[name][1]()
    # half a step of 8-bit codes: 1/254 of a row's largest value, or 2^-4 of each value in E4M3
    limit = 2.0**-4 if "fp8" in name else 0.04
    assert cases.relative_error(case.dequantize(case.call(x, gain)), case.expected(x, gain)) <= limit


def test_quantized_peers_agree_with_the_weight() -> None:
    w, x = weight(), torch.randn(20, 384).bfloat16()
    for make in (peers.bf16, peers.dynamic(peers.int8_rows, peers._int8_dynamic, False)):
        assert cases.linear_error(make(w), x, w) < 2.0**-5


def test_copies_leave_the_cache() -> None:
    w = torch.empty(1 << 20, dtype=torch.uint8, device="meta")
    assert len(timing.copies([w], 1)) == 32  # at most
    large = torch.empty(1 << 26, dtype=torch.uint8, device="meta")
    assert sum(v[0].numel() for v in timing.copies([large], timing.DECODE)) >= timing.ROTATED
    assert len(timing.copies([large], timing.DECODE + 1)) == 1
    huge = torch.empty(1 << 30, dtype=torch.uint8, device="meta")
    assert len(timing.copies([huge], 1)) == 2


def test_missing_op_says_so() -> None:
    with pytest.raises(cases.Missing, match="no_such_op"):
        ops.op("no_such_op")
    with pytest.raises(cases.Missing, match="not installed"):
        peers.library("no_such_library")


def row(name: str, us: float, role: str, family: str = "f", tokens: int = 16) -> dict[str, Any]:
    return {"name": name, "family": family, "role": role, "M": tokens, "N": 8, "K": 4, "us": us}


def test_table_compares_with_bf16_and_the_fastest_peer(tmp_path: Path) -> None:
    results = report.Results(tmp_path / "r.jsonl", resume=False)
    for r in (
        row("bf16", 30.0, "peer", "bf16"),
        row("slow", 25.0, "peer"),
        row("fast", 15.0, "peer"),
        row("other", 1.0, "peer", "another family"),
        row("ours", 10.0, "op"),
        row("ours", 5.0, "op", tokens=1),
    ):
        results.add(r)
    results.add({"name": "ours", "family": "f", "role": "op", "M": 64, "N": 8, "K": 4, "failed": "ValueError: no"})
    text = report.table(results, "ours")
    assert "10.0 3.00 1.50" in text and "5.0 - -" in text and "ValueError" in text
    again = report.Results(tmp_path / "r.jsonl", resume=True)
    assert again.rows == results.rows


def test_hadamard_peer_is_orthonormal() -> None:
    h = cases.hadamard(64, torch.device("cpu"), torch.float64)
    assert torch.allclose(h @ h.t(), torch.eye(64, dtype=torch.float64))


def test_shapes_by_name_and_by_size() -> None:
    sweep = module("sweep")
    assert sweep.shapes(["4096x4096", "llama-3-8b", "8x16"]) == [
        (4096, 4096),
        (6144, 4096),
        (28672, 4096),
        (4096, 14336),
        (8, 16),
    ]


@pytest.mark.parametrize(("way", "smaller"), [("bf16", False), ("modules:W4A16", True), ("fused:W8A8", True)])
def test_whole_models_are_quantized_and_get_their_kernels(way: str, smaller: bool) -> None:
    plain = variants.Variant("tiny-llama", "bf16", 2, "eager", "cpu")
    made = variants.Variant("tiny-llama", way, 2, "eager", "cpu")
    plain.build()
    made.build()
    found = [(case, tokens) for case, tokens, _ in made.cases([1, 4], [(2, 16)])]  # cases run on a GPU only
    assert found == [("decode 1", 1), ("decode 4", 4), ("prefill 2x16", 32)]
    assert (made.row["weights"] < plain.row["weights"]) == smaller == made.row.get("lowered", "").startswith("lowered")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_layers_alone_have_no_head(name: str) -> None:
    made = variants.Variant(name, "bf16", 1, "eager", "cpu", body=True)
    made.build()
    assert len(list(made.cases([1], [(2, 16)]))) == 2
    body, ids = made.model, torch.zeros(2, 16, dtype=torch.int64)
    assert body is not None and body.get_output_embeddings() is None
    layers = models.stored_bytes(next(m for m in body.modules() if isinstance(m, torch.nn.ModuleList)))
    assert layers <= made.row["weights"] < layers + 256 * 2100 * 2  # and a norm, and OPT's positions
    assert models._result(body(input_ids=ids, use_cache=False)).shape == (2, 16, 256)


@pytest.mark.parametrize("way", ["modules:W4A16", "fused:W8A8"])
def test_a_head_is_quantized_if_the_way_says_so(way: str) -> None:
    sizes = []
    for name in (way, f"{way}+head"):
        made = variants.Variant("tiny-llama", name, 2, "eager", "cpu")
        made.build()
        sizes.append(made.row["weights"])
    assert sizes[0] - sizes[1] > 256 * 256 * 0.9  # bf16 becomes 8 bits or fewer


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(SystemExit, match="no way 'gguf:Q4'"):
        variants.Variant("tiny-llama", "gguf:Q4", 2, "eager", "cpu")
