"""What the exporter of torch alone would not export, and what is told where nothing helps."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (it registers its own grouped product)
from torch import Tensor, nn

from qfx.core.errors import CaptureError
from qfx.core.spec import parse_scheme
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.forms import Form
from qfx.export.onnx_graph.lower import lower, plan
from qfx.export.onnx_graph.numerics import run
from qfx.export.onnx_graph.opaque import quantized_linears
from tests.export.onnx_graph.exported import quantized_linear


def form(*inputs: Tensor) -> Form:
    named = {f"x{i}": x for i, x in enumerate(inputs)}
    dims = {k: {0: "rows"} if x.is_floating_point() else {} for k, x in named.items()}
    return Form("model", lambda model: model, named, ["y"], dims)


def ran(model: nn.Module, inputs: Form, folder: Path, *others: Tensor) -> np.ndarray:
    graph = capture(model, inputs, torch.float32, 21)
    ir.save(graph, folder / "model.onnx")
    return run(folder / "model.onnx", dict(zip(inputs.inputs, (t.numpy() for t in others), strict=True)))[0]


class Experts(nn.Module):
    """Rows that are sorted by the matrix they are multiplied with."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 12, 8))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight.transpose(1, 2), ends)


@pytest.mark.parametrize("experts", [1, 4])
def test_rows_are_multiplied_with_the_matrix_of_their_expert(experts: int, tmp_path: Path) -> None:
    model, path = Experts(experts), tmp_path / "model.onnx"
    example = form(torch.randn(6, 8), torch.full((experts,), 6, dtype=torch.int32))
    ir.save(capture(model, example, torch.float32, 21), path)
    for sizes in ([0, 3, 0, 4], [5, 0, 0, 0], [1, 1, 1, 1]):  # an expert may have no rows
        counts = torch.tensor(sizes if experts > 1 else [sum(sizes)])
        x, ends = torch.randn(sum(sizes), 8), counts.cumsum(0).int()
        (got,) = run(path, {"x0": x.numpy(), "x1": ends.numpy()})
        want = torch.einsum("ri,roi->ro", x, model.weight[torch.arange(experts).repeat_interleave(counts)])
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-5)


class Rotation(nn.Module):
    """Pairs as complex numbers, times others that get an axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # [rows, 4, 3]
        turn = torch.polar(torch.ones_like(x[:, 0, :3]), x[:, 1, :3])
        return torch.view_as_real(pairs * turn.unsqueeze(self.dim)).flatten(-2)


@pytest.mark.parametrize("dim", [1, -2])
def test_complex_numbers_get_axes(dim: int, tmp_path: Path) -> None:
    model, x = Rotation(dim), torch.randn(5, 4, 6)
    got = ran(model, form(torch.randn(3, 4, 6)), tmp_path, x)
    np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-5, atol=1e-5)


class Narrow(nn.Module):
    """A product in bfloat16, whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.bfloat16() * (x + 1).bfloat16()
        return (y[:, :, None] - y[:, None, :]).float() + x[:, :, None]


def test_bfloat16_is_computed_in_float_and_rounded(tmp_path: Path) -> None:
    """ONNX Runtime has no product of bfloat16 on a CPU; and each result is rounded."""
    model, x = Narrow(), torch.randn(5, 4)
    got = ran(model, form(torch.randn(3, 4)), tmp_path, x)
    assert (got == model(x).numpy()).all()
    y = x * (x + 1)
    assert not np.allclose(got, y[:, :, None] - y[:, None, :] + x[:, :, None], atol=1e-4)


class Choosy(nn.Module):
    """A model that offers two kinds of attention, of which some do not run."""

    def __init__(self, broken: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.broken = SimpleNamespace(_attn_implementation="sdpa"), broken

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, x: Tensor) -> Tensor:
        kind = self.config._attn_implementation
        if kind in self.broken:
            raise RuntimeError(f"{kind} is broken")
        return x + 1 if kind == "eager" else x + 2


@pytest.mark.parametrize(("broken", "added"), [((), 1), (("eager",), 2)])
def test_the_attention_of_the_model_is_taken_where_the_plain_one_fails(
    broken: tuple[str, ...], added: int, tmp_path: Path
) -> None:
    model, x = Choosy(broken), torch.zeros(3, 4)
    assert (ran(model, form(x), tmp_path, x) == added).all()
    assert model.config._attn_implementation == "sdpa"


def test_the_first_failure_is_told() -> None:
    with pytest.raises(CaptureError, match=r"Choosy.*test_capture\.py:\d+ in forward: RuntimeError: eager is broken"):
        capture(Choosy(("eager", "sdpa")), form(torch.zeros(3, 4)), torch.float32, 21)


class Missing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Heading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("What is wrong:\n  the first thing.\n  the second")


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())] if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Missing(),
            "prims::bessel_j0 has no translation to ONNX. To do: write what calls prims::bessel_j0 with operations",
        ),
        (Heading(), "ValueError: What is wrong: the first thing. To do: check"),
        (Branch(), "To do: remove the branch or loop that depends on values of tensors."),
    ],
)
def test_what_does_not_export_is_told_in_a_line(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, form(torch.randn(3, 4)), torch.float32, 21)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Table(nn.Module):
    """A quantized linear of the input, and of a stored table."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = quantized_linear(torch.randn(16, 64), None, parse_scheme("W8A8"))
        self.table = nn.Parameter(torch.randn(5, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.linear(self.table).t()


def test_products_of_constants_are_not_expected_at_run_time() -> None:
    model = Table()
    graph = capture(model, form(torch.randn(3, 64)), torch.float32, 21)
    done = lower(graph, plan(quantized_linears(model), "ort-cpu", "float32"), "float32")
    assert done.uses == {"linear": 2} and done.expected() == {"MatMulInteger": 1}
