"""Laws of all statistics, then what each one of the channels' measures."""

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.core.errors import CalibrationError
from qfx.core.histograms import Histogram, Percentile
from qfx.core.ranges import AverageRange, MovingAverage
from qfx.core.samples import Inputs, TokenExtremes
from qfx.core.statistic import Statistic
from qfx.core.stats import AbsMax, Hessian, Mean, MinMax, full_precision

CHANNELS = 6
STATISTICS: list[tuple[Callable[..., Statistic], bool]] = [  # and whether it takes `start`
    (AbsMax, False),
    (MinMax, False),
    (Mean, False),
    (Hessian, False),
    (lambda: Hessian(precise=True), False),
    (lambda: MovingAverage(momentum=0.2), False),
    (AverageRange, False),
    (lambda: Histogram(bins=64), False),
    (Percentile, False),
    (lambda **k: Inputs(max_tokens=20, seed=3, **k), True),
    (lambda **k: TokenExtremes(max_tokens=20, **k), True),
]
every = pytest.mark.parametrize(("make", "starts"), STATISTICS, ids=[repr(make()) for make, _ in STATISTICS])
EXACT = (AbsMax, MinMax, Histogram, Percentile, Inputs, TokenExtremes)


def draw_batches(count: int = 7) -> list[Tensor]:
    """Heavy-tailed, off-centre batches of different sizes, some of them 3-D, one empty."""
    shapes = [(4, 3), (11,), (0,), (2, 5), (1,), (30,), (3, 9)]
    scale = torch.tensor([1.0, 0.01, 50.0, 1.0, 3.0, 0.5])
    return [torch.randn(*shapes[i % 7], CHANNELS).pow(3) * scale * (1 + i) + 0.3 for i in range(count)]


def measure(make: Callable[[], Statistic], batches: list[Tensor]) -> Statistic:
    stat = make()
    for batch in batches:
        stat.update(batch)
    return stat


def values(stat: Statistic) -> list[Tensor]:
    value: Any = stat.value()
    return [value] if isinstance(value, Tensor) else list(value)


@every
@pytest.mark.parametrize("cuts", range(8))
def test_merged_shards_equal_one_pass(make: Any, starts: bool, cuts: int) -> None:
    batches = draw_batches()
    whole = measure(make, batches)
    edges = [0, *sorted(random.Random(cuts).sample(range(len(batches) + 1), cuts)), len(batches)]
    merged, seen = make(), 0
    for begin, end in itertools.pairwise(edges):
        shard = make(start=seen) if starts else make()
        for batch in batches[begin:end]:
            shard.update(batch)
        before = copy.deepcopy(shard)
        merged.merge(shard)
        seen += shard.count
        if shard.count:
            torch.testing.assert_close(values(shard), values(before), rtol=0, atol=0)
    assert merged.count == whole.count == sum(batch[..., 0].numel() for batch in batches)
    exact = {"rtol": 0, "atol": 0} if isinstance(whole, EXACT) else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(values(merged), values(whole), **exact)


@every
def test_a_merge_that_loses_a_shard_would_be_seen(make: Any, starts: bool) -> None:
    batches = draw_batches()
    whole, part = values(measure(make, batches)), values(measure(make, batches[:-2]))
    assert not all(a.shape == b.shape and a.equal(b) for a, b in zip(whole, part, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_measured_in_float32(make: Any, starts: bool, dtype: torch.dtype) -> None:
    batches = [batch.clamp(-1e4, 1e4).to(dtype) for batch in draw_batches()]
    found = values(measure(make, batches))
    wanted = values(measure(make, [batch.float() for batch in batches]))
    assert all(f.dtype in (torch.float32, torch.float64, torch.int64) for f in found)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@every
def test_a_value_that_is_not_finite_is_refused(make: Any, starts: bool) -> None:
    stat, x = make(), torch.ones(5, CHANNELS)
    x[1, 2], x[3, 0] = float("nan"), float("-inf")
    with pytest.raises(CalibrationError, match=f"{type(stat).__name__}: 2 of 30 calibration values"):
        stat.update(x)
    assert stat.count == 0


@every
def test_nothing_seen_has_no_value(make: Any, starts: bool) -> None:
    stat = make()
    stat.update(torch.empty(0, CHANNELS))
    stat.update(torch.empty(2, 0, CHANNELS))
    stat.merge(make())
    with pytest.raises(CalibrationError, match="no token reached"):
        stat.value()


@every
def test_merging_takes_one_class_and_one_setting(make: Any, starts: bool) -> None:
    with pytest.raises(TypeError, match="cannot merge"):
        make().merge(Percentile(p=75))


@every
def test_what_was_measured_in_inference_mode_merges_outside(make: Any, starts: bool) -> None:
    stats = [make(), make()]
    with torch.inference_mode():
        for stat in stats:
            stat.update(torch.randn(9, CHANNELS))
    stats[0].merge(stats[1])
    stats[0].update(torch.randn(3, CHANNELS, requires_grad=True))
    assert not any(v.requires_grad or v.is_inference() for v in values(stats[0]))


@every
def test_the_default_device_does_not_matter(make: Any, starts: bool) -> None:
    batches = draw_batches()
    with torch.device("meta"):
        stat = measure(make, batches)
        stat.merge(copy.deepcopy(stat))
        found = values(stat)
    assert all(value.device.type == "cpu" for value in found)


@pytest.mark.parametrize("make", [AbsMax, MinMax, Mean, Hessian, Inputs])
def test_another_number_of_channels_is_refused(make: type[Statistic]) -> None:
    stat = measure(make, [torch.ones(3, 4)])
    with pytest.raises(CalibrationError, match=f"{make.__name__}: 1 channels after 4"):
        stat.update(torch.ones(3, 1))
    with pytest.raises(CalibrationError, match="float tensor"):
        stat.update(torch.ones(3, 4, dtype=torch.int64))


def test_channel_statistics_are_their_formulas() -> None:
    batches = draw_batches()
    x = torch.cat([batch.flatten(0, -2) for batch in batches])
    assert measure(AbsMax, batches).value().equal(x.abs().amax(0))
    lo, hi = measure(MinMax, batches).value()
    assert lo.equal(x.amin(0)) and hi.equal(x.amax(0))
    assert measure(MinMax, batches).range() == (x.amin(), x.amax())
    assert measure(AbsMax, batches).range() == (-x.abs().amax(), x.abs().amax())
    mean, absolute = measure(Mean, batches).value()
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(absolute, x.double().abs().mean(0).float())


@pytest.mark.parametrize("precise", [False, True])
def test_hessian_is_its_formula(precise: bool) -> None:
    batches = [torch.randn(500, 16) @ torch.randn(16, 16) for _ in range(4)]
    x = torch.cat(batches).double()
    stat = measure(lambda: Hessian(precise=precise), batches)
    wanted, bound = 2 * x.T @ x / len(x), 1e-12 if precise else 2e-6
    assert (stat.value() - wanted).norm() <= bound * wanted.norm()
    assert (stat.mu - x.mean(0)).norm() <= bound * x.mean(0).norm() + bound
    assert stat.value().dtype == (torch.float64 if precise else torch.float32)


def test_the_users_choice_of_precision_is_kept() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
