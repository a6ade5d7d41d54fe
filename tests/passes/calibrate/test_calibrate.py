"""Each observer's range is the one it is defined by, on the values that reach the layers; the solver takes it."""

import pytest
import torch
from torch import Tensor, nn

from qfx.core.passes import State
from qfx.core.qtensor import fake_quantize, scale_from_range
from qfx.core.spec import parse_scheme
from qfx.passes.calibrate.calibrate import Calibrate
from qfx.passes.solve.rtn import Rtn
from tests.passes.discovered import Discovered, inputs_of, zoo
from tests.zoo import harden
from tests.zoo.user_modules import HIDDEN, FeedForward

ASYMMETRIC = {"*": "W8A8_STATIC_ASYM"}
LAYERS = ("up", "down")


class Scaled(FeedForward):
    """A perceptron without a norm, so that batches differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


def batch(seed: int, size: float) -> dict[str, Tensor]:
    return {"x": size * torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def mlp() -> Discovered:
    model = Scaled()
    harden(model, torch.Generator().manual_seed(0))
    return Discovered(model, [batch(0, 1.0), batch(1, 3.0), batch(2, 0.5)])


def calibrated(found: Discovered, step: Calibrate, scheme: str = "W8A8_STATIC_ASYM") -> State:
    state = found.fresh({"*": scheme})
    step(state)
    assert set(state.ranges) == set(state.plan)
    return state


def by_batch(found: Discovered, name: str) -> list[Tensor]:
    return [inputs_of(found.model, name, [b]) for b in found.batches]


def extremes(x: Tensor) -> tuple[float, float]:
    return x.min().item(), x.max().item()


@pytest.mark.parametrize("name", LAYERS)
def test_minmax_covers_all_batches(mlp: Discovered, name: str) -> None:
    state = calibrated(mlp, Calibrate())
    assert state.ranges[f"{name}.weight"] == pytest.approx(extremes(torch.cat(by_batch(mlp, name))), rel=1e-6)


def test_all_blocks_are_calibrated() -> None:
    found = zoo("block_stack")
    state = calibrated(found, Calibrate())
    assert len(state.ranges) == 9
    for weight, ends in state.ranges.items():
        assert ends == pytest.approx(extremes(inputs_of(found.model, weight.removesuffix(".weight"))), rel=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_average_is_the_mean_of_the_batches_extremes(mlp: Discovered, name: str) -> None:
    state = calibrated(mlp, Calibrate("average"))
    ends = [extremes(x) for x in by_batch(mlp, name)]
    want = (sum(lo for lo, _ in ends) / 3, sum(hi for _, hi in ends) / 3)
    assert state.ranges[f"{name}.weight"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.01, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_moving_average_forgets(mlp: Discovered, name: str, momentum: float) -> None:
    state = calibrated(mlp, Calibrate("moving_average", momentum=momentum))
    first, *others = [torch.tensor(extremes(x)) for x in by_batch(mlp, name)]
    for ends in others:
        first = (1 - momentum) * first + momentum * ends
    assert state.ranges[f"{name}.weight"] == pytest.approx(first.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_percentiles_leave_out_the_tails(mlp: Discovered, name: str) -> None:
    x = torch.cat(by_batch(mlp, name)).flatten()
    wide = calibrated(mlp, Calibrate()).ranges[f"{name}.weight"]
    for percentile in (99.9, 99.0, 90.0):
        found = calibrated(mlp, Calibrate("percentile", percentile=percentile)).ranges[f"{name}.weight"]
        share = percentile / 100
        want = torch.quantile(x, torch.tensor([1 - share, share])).tolist()
        assert found == pytest.approx(want, rel=1 / 64, abs=1e-3)
        assert wide[0] <= found[0] < found[1] < wide[1]
        wide = found


@pytest.mark.parametrize("scheme", ["W4A4_CHANNEL_STATIC", "W4A4_CHANNEL_STATIC_ASYM"])
@pytest.mark.parametrize("name", LAYERS)
def test_mse_is_the_range_of_least_squared_error(mlp: Discovered, name: str, scheme: str) -> None:
    x = torch.cat(by_batch(mlp, name))
    spec = parse_scheme(scheme).input
    assert spec is not None

    def error(lo: float, hi: float) -> float:
        quantized = fake_quantize(x, *scale_from_range(torch.tensor(lo), torch.tensor(hi), spec), spec)
        return (quantized - x).square().mean().item()

    lo, hi = extremes(x)
    if spec.symmetric:
        hi = max(-lo, hi)
        lo = -hi
    found = error(*calibrated(mlp, Calibrate("mse"), scheme).ranges[f"{name}.weight"])
    shares = [i / 50 for i in range(5, 51)]
    tried = [error(a * lo, b * hi) for a in shares for b in ([a] if spec.symmetric else shares)]
    assert found <= 1.02 * min(tried)
    assert found < 0.9 * error(lo, hi)


def test_the_solver_takes_the_ranges(mlp: Discovered) -> None:
    scales = {}
    for observer in ("minmax", "average", "percentile", "mse"):
        state = calibrated(mlp, Calibrate(observer, percentile=99.0), "W4A4_CHANNEL_STATIC_ASYM")  # type: ignore[arg-type]
        Rtn()(state)
        for name in LAYERS:
            lo, hi = state.ranges[f"{name}.weight"]
            solved = state.solved[f"{name}.weight"]
            assert solved.input_scale is not None and solved.input_zero is not None
            assert solved.input_scale.item() == pytest.approx((hi - lo) / 15, rel=1e-5)
            assert solved.input_zero.item() == round(-lo / solved.input_scale.item())
            scales[observer, name] = solved.input_scale.item()
    assert len(set(scales.values())) == 8
    state = mlp.fresh({"*": "W4A4_CHANNEL_STATIC_ASYM"})
    Rtn()(state)  # measures the minimum and maximum itself
    assert state.solved["up.weight"].input_scale.item() == scales["minmax", "up"]  # type: ignore[union-attr]


def test_a_layer_that_is_used_twice_gets_a_range_for_both() -> None:
    found = zoo("shared_linear")
    state = calibrated(found, Calibrate())
    for name in ("linear", "down"):
        x = inputs_of(found.model, name, found.batches)
        assert state.ranges[f"{name}.weight"] == pytest.approx(extremes(x), rel=1e-6)
        assert len({extremes(half) for half in x.chunk(2)}) == 2


def test_a_second_calibration_widens_the_first(mlp: Discovered) -> None:
    state = mlp.fresh(ASYMMETRIC)
    Calibrate("percentile", percentile=90.0)(state)
    state.ranges["down.weight"] = (-100.0, 0.0)
    Calibrate()(state)
    assert state.ranges["up.weight"] == pytest.approx(extremes(torch.cat(by_batch(mlp, "up"))), rel=1e-6)
    assert state.ranges["down.weight"] == (-100.0, pytest.approx(torch.cat(by_batch(mlp, "down")).max().item()))


class Masked(nn.Module):
    """A linear of which the caller reads some tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(x) * attention_mask.unsqueeze(-1)


def test_padding_is_not_measured() -> None:
    x = torch.randn(2, 6, 8)
    x[1, 4:] = 1000.0
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    state = calibrated(Discovered(Masked(), [{"x": x, "attention_mask": mask}]), Calibrate())
    assert state.ranges["linear.weight"] == pytest.approx(extremes(x[mask.bool()]), rel=1e-6)


def test_only_static_inputs_are_calibrated(mlp: Discovered) -> None:
    state = mlp.fresh({"up": "W8A8", "down": "W8A8_STATIC"})
    assert Calibrate()(state).changed == 1 and set(state.ranges) == {"down.weight"}
    result = Calibrate()(mlp.fresh({"up": "W8A8", "down": "W4A16_G16"}))
    assert (result.changed, result.notes) == (0, ["no layer has a static input: nothing to calibrate"])


def test_progress_goes_through_all_segments(mlp: Discovered) -> None:
    seen: list[tuple] = []
    state = mlp.fresh(ASYMMETRIC, progress=lambda *a: seen.append(a))
    Calibrate()(state)
    total = len(state.graph.segments())
    assert seen == [("calibrate", i, total) for i in range(total + 1)]
