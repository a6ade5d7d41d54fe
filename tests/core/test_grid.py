"""Grids: their ranges, and that codes are the nearest values of the grid."""

import json
import math

import pytest
import torch
from torch import Tensor

from qfx.core.grid import CODEBOOKS, E4M3, E5M2, Codebook, Float, Grid, Int, grid_from_dict, grid_to_dict

INTS = {  # lo, hi, reach
    Int(8): (-128, 127, 127.5),
    Int(8, narrow=True): (-127, 127, 127),
    Int(8, signed=False): (0, 255, 127.5),
    Int(4): (-8, 7, 7.5),
    Int(4, narrow=True): (-7, 7, 7),
    Int(4, signed=False): (0, 15, 7.5),
    Int(3): (-4, 3, 3.5),
    Int(2): (-2, 1, 1.5),
    Int(2, narrow=True): (-1, 1, 1),
    Int(1): (-1, 0, 0.5),
    Int(1, signed=False): (0, 1, 0.5),
}
FLOATS = {E4M3: 448.0, E5M2: 57344.0}
TABLES = {Codebook("nf4"): 1.0, Codebook("fp4_bnb"): 1.0, Codebook("e2m1"): 6.0}
every_grid = pytest.mark.parametrize("grid", [*INTS, *FLOATS, *TABLES], ids=repr)


def codes_of(grid: Grid) -> Tensor:
    """Every code that means a finite number, in order of the numbers."""
    if isinstance(grid, Int):
        return torch.arange(grid.lo, grid.hi + 1).to(grid.dtype)
    codes = torch.arange(2**grid.bits, dtype=torch.uint8).view(grid.dtype)
    values = grid.decode(codes)
    twice = isinstance(grid, Codebook) & (codes == 8) & (values == 0)  # 0 has two codes
    kept = values.isfinite() & ~((values == 0) & values.signbit()) & ~twice
    return codes.view(torch.uint8)[kept][values[kept].argsort()].view(grid.dtype)


@pytest.mark.parametrize("grid", INTS, ids=repr)
def test_ranges_of_integers(grid: Int) -> None:
    assert (grid.lo, grid.hi, grid.reach) == INTS[grid]
    assert grid.dtype == (torch.int8 if grid.signed else torch.uint8)
    assert grid.hi - grid.lo + 1 == 2**grid.bits - grid.narrow


@pytest.mark.parametrize("grid", FLOATS, ids=repr)
def test_ranges_of_floats(grid: Float) -> None:
    assert grid.reach == FLOATS[grid] == grid.decode(codes_of(grid)).max()
    assert grid.bits == 8 and grid.dtype.itemsize == 1


@pytest.mark.parametrize("grid", [*INTS, *FLOATS], ids=repr)
def test_the_smallest_positive_value(grid: Int | Float) -> None:
    values = grid.decode(codes_of(grid))
    positive = values[values > 0]
    assert not len(positive) or positive.min() == grid.least


@pytest.mark.parametrize("grid", TABLES, ids=repr)
def test_codebooks(grid: Codebook) -> None:
    assert len(CODEBOOKS) == len(TABLES) and (grid.bits, grid.dtype) == (4, torch.uint8)
    assert grid.reach == TABLES[grid] and len(codes_of(grid)) == (16 if grid.name == "nf4" else 15)
    exact = torch.tensor(grid.values, dtype=torch.float64)
    assert torch.equal(exact.float().double(), exact) and torch.equal(
        grid.decode(torch.arange(16).byte()), exact.float()
    )


def test_nf4_is_that_of_qlora() -> None:
    """Quantiles of a normal distribution (arXiv 2305.14314, appendix E): seven below 0 and eight above."""
    offset = 0.9677083  # 1 - (1 / 32 + 1 / 30) / 2, with the digits that the authors give, as they give float32 steps
    above, below = (torch.linspace(offset, 0.5, n)[:-1].double() for n in (9, 8))
    values = torch.cat([torch.special.ndtri(above), -torch.special.ndtri(below), torch.zeros(1).double()]).sort().values
    assert (torch.tensor(Codebook("nf4").values).double() - values / values.max()).abs().max() < 1e-7


def test_e2m1_is_the_format_of_its_bits() -> None:
    for code, value in enumerate(Codebook("e2m1").values):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-size if sign else size)


@pytest.mark.parametrize("grid", TABLES, ids=repr)
def test_codes_are_those_of_a_search_through_the_table(grid: Codebook) -> None:
    x = torch.cat(
        [torch.randn(20_000) * grid.reach / 2, torch.randn(2000) * 1e-3, torch.tensor([0.0, -0.0, 1e30, -1e30])]
    )
    table = torch.tensor(grid.values, dtype=torch.float64)
    distance = (x.double()[:, None] - table).abs()
    codes = grid.encode(x)
    found = distance.gather(1, codes.long()[:, None])[:, 0]
    assert torch.equal(found, distance.amin(1))
    unique = (distance == distance.amin(1, keepdim=True)).sum(1) == 1
    assert unique.sum() > 10_000 and torch.equal(codes[unique].long(), distance.argmin(1)[unique])
    assert torch.equal(grid.encode(x.view(2, -1).t()).t().flatten(), codes)  # whatever the strides are
    assert grid.encode(x[:0]).shape == (0,) and grid.decode(codes[:0]).shape == (0,)


@pytest.mark.parametrize("grid", TABLES, ids=repr)
def test_codebooks_are_traced(grid: Codebook) -> None:
    """No constant of a trace is kept for later calls."""
    x = torch.randn(3, 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: grid.decode(grid.encode(t)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), grid.decode(grid.encode(x)))
    with torch.inference_mode():
        grid.decode(grid.encode(x))
    w = grid.decode(grid.encode(x))
    assert not w.is_inference() and torch.ones(3, requires_grad=True).matmul(w).sum().requires_grad


@every_grid
def test_every_code_comes_back(grid: Grid) -> None:
    codes = codes_of(grid)
    for dtype in (torch.float32, torch.float64, torch.float16):
        values = grid.decode(codes, dtype)
        assert values.dtype == dtype and bool((values.diff() > 0).all())
        found = grid.encode(values)
        assert found.dtype == grid.dtype and found.view(torch.uint8).equal(codes.view(torch.uint8))


@every_grid
def test_the_nearest_value_is_chosen(grid: Grid) -> None:
    table = grid.decode(codes_of(grid)).double()
    steps = torch.linspace(1.3 * table.min() - 1, 1.3 * table.max() + 1, 4001, dtype=torch.float64)
    x = torch.cat([steps, steps * 2.0**-8, table, (table[1:] + table[:-1]) / 2]).float()
    values = grid.decode(grid.encode(x)).double()
    wanted = (x.double()[:, None] - table).abs().amin(1)
    assert (x.double() - values).abs().equal(wanted)  # beyond the ends, the nearest is the last: it saturates


@every_grid
def test_ties_go_to_the_even_code(grid: Grid) -> None:
    codes = codes_of(grid)
    table = grid.decode(codes).double()
    half = (table[1:] + table[:-1]) / 2
    half = half[half.float().double() == half].float()
    assert len(half) == len(table) - 1 or (isinstance(grid, Codebook) and len(half) > 1)
    assert bool((grid.encode(half).view(torch.uint8) % 2 == 0).all())


@pytest.mark.parametrize("grid", FLOATS, ids=repr)
def test_floats_saturate_and_keep_nan(grid: Float) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, grid.reach * 1.01])
    assert grid.decode(grid.encode(x)).tolist() == [grid.reach, -grid.reach, grid.reach, -grid.reach, grid.reach]
    assert grid.decode(grid.encode(torch.tensor([math.nan]))).isnan().all()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Int(0), "0 bits; an integer grid has 1 to 8"),
        (lambda: Int(9), "9 bits"),
        (lambda: Int(4, signed=False, narrow=True), "narrow"),
        (lambda: Int(1, narrow=True), "narrow"),
        (lambda: Float(3, 4), "no 8-bit float E3M4; use E4M3 or E5M2"),
        (lambda: Codebook("nf3"), "no codebook 'nf3'; use nf4, fp4_bnb, e2m1"),
        (lambda: grid_from_dict({"type": "codebook"}), "grid: .*'name'"),
        (lambda: grid_from_dict({"type": "table"}), "unknown type 'table'; use 'int', 'float' or 'codebook'"),
        (lambda: grid_from_dict({"bits": 4}), "unknown type None"),
        (lambda: grid_from_dict({"type": "int", "bits": 4, "exp": 2}), "grid: .*'exp'"),
        (lambda: grid_from_dict({"type": "float", "exp": 4}), "grid: .*'man'"),
    ],
)
def test_what_is_no_grid_is_refused(make: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()  # type: ignore[operator]


@every_grid
def test_grids_come_back_from_json(grid: Grid) -> None:
    data = json.loads(json.dumps(grid_to_dict(grid)))
    assert grid_from_dict(data) == grid and data == grid_to_dict(grid)  # and is not changed
