"""Ranges of a whole activation: averages, percentiles, clipping, and samples of tokens."""

import pytest
import torch
from torch import Tensor

from qfx.core.errors import CalibrationError
from qfx.core.histograms import FACTORS, Histogram, Percentile, clip
from qfx.core.qtensor import fake_quantize, scale_from_range
from qfx.core.ranges import AverageRange, MovingAverage, activation_range
from qfx.core.samples import Inputs, TokenExtremes
from qfx.core.spec import QSpec, parse_scheme
from qfx.core.statistic import Statistic
from qfx.core.stats import AbsMax, Hessian, Mean, MinMax

SYM, ASYM = (parse_scheme(f"W8A8_STATIC{suffix}").input for suffix in ("", "_ASYM"))
SYM4, FP8 = parse_scheme("W4A4_STATIC").input, parse_scheme("FP8").input
RANGED = [MinMax, AbsMax, MovingAverage, AverageRange, Percentile, Histogram, TokenExtremes]


def seen(stat: Statistic, *batches: Tensor) -> Statistic:
    for batch in batches:
        stat.update(batch)
    return stat


def error(x: Tensor, lo: Tensor, hi: Tensor, spec: QSpec) -> float:
    scale, zero = scale_from_range(lo, hi, spec)
    return (fake_quantize(x, scale, zero, spec) - x).double().square().mean().item()


def test_averages_over_batches() -> None:
    batches = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 4.0], [0.0, 6.0]])]
    lo, hi = seen(AverageRange(), *batches).value()
    assert (lo.item(), hi.item()) == (-2, 4)
    lo, hi = seen(MovingAverage(momentum=0.25), *batches).value()
    assert (lo.item(), hi.item()) == (-1.5, 3)


@pytest.mark.parametrize("make", RANGED)
@pytest.mark.parametrize("spec", [SYM, ASYM, SYM4, FP8])
def test_every_range_lies_inside_the_extremes(make: type[Statistic], spec: QSpec) -> None:
    batches = [torch.randn(40, 8) + 0.5, 3 * torch.randn(20, 8)]
    stat = seen(make(), *batches)
    with torch.device("meta"):  # the user's default device is not the statistic's
        lo, hi = activation_range(stat, spec)
    top = max(batch.abs().max() for batch in batches)
    assert lo.dtype == hi.dtype == torch.float32 and lo.dim() == hi.dim() == 0
    assert -top <= lo < 0 < hi <= top


def test_specs_and_statistics_without_a_range_are_refused() -> None:
    x = torch.ones(2, 3)
    for name in ("W8A8", "FP8_DYNAMIC"):
        with pytest.raises(ValueError, match="not static per tensor"):
            activation_range(seen(MinMax(), x), parse_scheme(name).input)
    for stat in (Mean(), Hessian(), Inputs()):
        with pytest.raises(TypeError, match="has none"):
            activation_range(seen(stat, x), SYM)
    with pytest.raises(CalibrationError, match="no token"):
        activation_range(Histogram(), SYM)


@pytest.mark.parametrize("make", [Histogram, Percentile])
@pytest.mark.parametrize("x", [0.0, 1.0, -2.5, 1e-38, 3e38])
def test_a_constant_is_its_own_range(make: type[Statistic], x: float) -> None:
    lo, hi = activation_range(seen(make(), torch.full((4, 3), x)), SYM)
    assert max(-lo, hi) == pytest.approx(abs(x), rel=1e-2)


@pytest.mark.parametrize("bins", [2, 63, 2048])
def test_histogram_counts_what_is_in_its_bins(bins: int) -> None:
    batches = [torch.randn(50, 4) * 10.0**k + k for k in range(-3, 3)]
    counts, edges = seen(Histogram(bins), *batches).value()
    x = torch.cat(batches).double().flatten()
    wanted = torch.histogram(x, edges).hist  # its last bin is closed, ours are never full there
    assert counts.double().equal(wanted) and counts.sum() == x.numel()
    assert len(counts) <= bins and (bins == 2 or len(counts) > bins // 2)


@pytest.mark.parametrize("spec", [SYM, ASYM, SYM4])
def test_clipping_beats_min_max_on_heavy_tails(spec: QSpec) -> None:
    x = torch.distributions.StudentT(torch.tensor(3.0)).sample((4000, 16))
    clipped = error(x, *activation_range(seen(Histogram(), x), spec), spec)
    full = error(x, *activation_range(seen(MinMax(), x), spec), spec)
    assert clipped < 0.9 * full
    found = min(error(x, -x.abs().max() * t, x.abs().max() * t, spec) for t in torch.linspace(0.01, 1, 300))
    assert clipped < 1.02 * found  # of the symmetric ranges; no histogram


@pytest.mark.parametrize("spec", [SYM, ASYM])
def test_clipping_leaves_uniform_data_alone(spec: QSpec) -> None:
    x = torch.rand(4000, 16) * 2 - 1
    stat = Histogram()
    lo, hi = activation_range(seen(stat, x), spec)
    width = stat.value().edges.diff()[0].item()
    # half a step more is inside: what lies there rounds to the last code with no greater error
    assert 1 - hi < width + 1 / 255 and 1 + lo < width + 1 / 255


def test_moving_one_end_never_loses_what_both_gained() -> None:
    spec = parse_scheme("W4A3_STATIC_ASYM").input
    for seed in range(30):  # few points and few codes: the error is jagged
        x = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        lo, hi = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        found = error(x, *clip(x, torch.ones(6, dtype=torch.float64), lo, hi, spec), spec)
        both = min(error(x, lo * share, hi * share, spec) for share in FACTORS)
        assert found <= both * (1 + 1e-6)


def test_clipping_an_offset_range_moves_one_end() -> None:
    x = torch.cat([torch.rand(20000), torch.tensor([20.0])])[:, None]
    lo, hi = activation_range(seen(Histogram(), x), ASYM)
    assert -0.01 <= lo <= 0 and 0.9 < hi < 20


@pytest.mark.parametrize("p", [60, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("outliers", [1.0, 1000.0])
def test_percentile_is_torchs_quantile(p: float, outliers: float) -> None:
    x = torch.randn(20000, 4)
    x[:3] *= outliers
    stat = seen(Percentile(p), *x.split(700))
    lo, hi = stat.value()
    for found, q in ((lo, 1 - p / 100), (hi, p / 100)):
        assert found.item() == pytest.approx(x.quantile(q).item(), rel=1 / 64, abs=1e-6)
    assert p < 100 or (lo == x.min() and hi == x.max())


def test_settings_are_checked() -> None:
    makes = (lambda: Percentile(50), lambda: Percentile(101), lambda: Histogram(1))
    for make in (*makes, lambda: MovingAverage(0), lambda: Inputs(0)):
        with pytest.raises(ValueError, match="use "):
            make()
    with pytest.raises(ValueError, match="share of tokens"):
        seen(TokenExtremes(), torch.ones(2, 2)).clip(0)


def test_inputs_are_bounded_and_deterministic() -> None:
    x = torch.randn(300, 5)
    a, b = seen(Inputs(40), x), seen(Inputs(40), *x.split(17))
    assert a.value().shape == (40, 5) and a.value().equal(b.value())
    assert a.value().equal(x[a.positions]) and a.positions.unique().equal(a.positions)
    assert not seen(Inputs(40, seed=1), x).value().equal(a.value())
    assert seen(Inputs(400), x).value().equal(x)
    assert seen(Inputs(40), x.sin()).positions.equal(a.positions)  # another value, the same tokens


def test_inputs_are_spread_evenly() -> None:
    counts = torch.zeros(10)
    for seed in range(200):
        at = seen(Inputs(100, seed), torch.zeros(1000, 1)).positions
        counts += torch.bincount(at // 100, minlength=10)
    # 2000 expected in each tenth, standard deviation below sqrt(2000)
    assert (counts - 2000).abs().max() < 4 * 2000**0.5


def test_token_extremes_clip_by_tokens() -> None:
    x = torch.randn(1000, 16)
    x[7] *= 100  # one token with all the outliers, as the first token of a sentence
    stat = seen(TokenExtremes(), x)
    assert stat.clip(1.0) == stat.range() == (x.min(), x.max())
    lo, hi = stat.clip(0.99)
    kept = ((x >= lo) & (x <= hi)).all(1).float().mean()
    assert 0.97 <= kept <= 0.99 and hi < 5 and lo > -5
    assert hi in x.amax(1) and lo in x.amin(1)
    assert seen(TokenExtremes(10), x).clip(1.0) == (x.min(), x.max())  # exact beyond the bound
