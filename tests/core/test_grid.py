"""Grids: their ranges, and that codes are the nearest values of the grid."""

import json
import math

import pytest
import torch
from torch import Tensor

from qfx.core.grid import E4M3, E5M2, Float, Grid, Int, grid_from_dict, grid_to_dict

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
every_grid = pytest.mark.parametrize("grid", [*INTS, *FLOATS], ids=repr)


def codes_of(grid: Grid) -> Tensor:
    """Every code that means a finite number, in order of the numbers."""
    if isinstance(grid, Int):
        return torch.arange(grid.lo, grid.hi + 1).to(grid.dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(grid.dtype)
    values = codes.float()
    kept = values.isfinite() & ~((values == 0) & values.signbit())
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
    half = ((table[1:] + table[:-1]) / 2).float()
    chosen = grid.encode(half).view(torch.uint8)
    assert bool((chosen % 2 == 0).all())


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
        (lambda: grid_from_dict({"type": "codebook"}), "unknown type 'codebook'"),
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
