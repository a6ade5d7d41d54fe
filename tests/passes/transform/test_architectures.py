"""The law of folds on every architecture: what a fold leaves is the same function, and nothing is skipped in silence.

One capture serves all steps. SmoothQuant meets the model as it is; then random maps at every site (also of both signs,
also shifts) make outliers and channels that are off-centre, the work that Outlier Suppression+ is there to undo.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qfx
from qfx.core.errors import CaptureError
from qfx.core.maps import Diagonal, Map, Shift
from qfx.core.passes import Result, State
from qfx.core.report import Report
from qfx.core.site import Site
from qfx.passes.transform._driver import fold_sites
from tests.zoo import KINDS, ZOO
from tests.zoo.layers import layers

BOUND = 1e-4
CI = {
    "decoders": "llama llama_tied llama_bias qwen3 gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj bloom falcon "
    "falcon_grouped opt mpt olmo olmo2 stablelm_parallel cohere granite persimmon glm4 gpt_bigcode nemotron minicpm3 "
    "diffllama lfm2",
    "experts": "mixtral qwen3_moe olmoe deepseek_v2 deepseek_v3 glm4_moe gpt_oss phimoe dbrx minimax",
    "others": "bert roberta albert deberta_v2 modernbert esm vit dinov2_swiglu beit swin siglip_vision clip t5 bart "
    "whisper",
    "a person's own": "mlp block_stack swiglu swiglu_native_norm raw_parameters einsum shared_block shared_linear "
    "norm_to_residual branching_output multihead_attention conv_stem torch_encoder_layer",
}
LISTED = [name for names in CI.values() for name in names.split()]
UNLISTED = [pytest.param(name, marks=pytest.mark.slow) for name in ZOO if name not in LISTED]
NOT_CAPTURED = {"dbrx": "data-dependent"}
"""What does not export, and what its error says of it."""
NO_FOLDS = {"shared_linear"}


@dataclass
class Watch:
    """Looks at the user's module between steps."""

    model: nn.Module
    inputs: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    folds: dict[str, int] = field(default_factory=dict)
    vacuous: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.want = outputs(self.model, self.inputs)
        self.last = values(self.model)

    def __call__(self, step: str, state: State) -> None:
        module, report = state.graph.module, state.report
        self.errors[step] = relative_change(self.want, outputs(module, self.inputs))
        new, now = report.folds[sum(self.folds.values()) :], values(module)
        self.folds[step] = len(new)
        changed = {name for name, v in now.items() if name not in self.last or not torch.equal(v, self.last[name])}
        changed |= {name.removesuffix(".weight") for name in changed}
        self.vacuous += [f"{step} at {f.site}" for f in new if not changed.intersection([*f.writers, *f.readers])]
        self.last = now


@dataclass(frozen=True)
class Look:
    """A step that changes nothing."""

    watch: Watch
    after: str
    name = "look"
    needs_data = False

    def __call__(self, state: State) -> Result:
        self.watch(self.after, state)
        return Result()


@dataclass(frozen=True)
class Roughen:
    """Random maps at every site, of every kind that the site is said to fold."""

    name = "roughen"
    needs_data = True

    def __call__(self, state: State) -> Result:
        generator = torch.Generator().manual_seed(0)

        def choose(site: Site, *_: object) -> Sequence[Map]:
            maps: list[Map] = []
            if "Shift" in site.folds:
                maps.append(Shift(0.5 * torch.randn(site.channels, generator=generator)))
            scale = 2 ** (2 * torch.rand(site.channels, generator=generator) - 1)
            scale[::16] *= 30
            if "SignedDiagonal" in site.folds:
                scale *= torch.where(torch.rand(site.channels, generator=generator) < 0.5, -1, 1)
            return [*maps, Diagonal(scale)]

        return fold_sites(state, self.name, state.sites, list, choose)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def relative_change(want: list[Tensor], got: list[Tensor]) -> float:
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(want, got, strict=True))


def skipped(model: nn.Module, report: Report) -> list[set[str]]:
    """The layers that the report neither folds nor gives a reason for."""
    said = {name for fold in report.folds for name in fold.readers} | {m.where for m in report.misses if m.why}
    return [names for names in layers(model) if not names & said]


@pytest.mark.parametrize("name", [*LISTED, *UNLISTED])
def test_folds_keep_the_function_and_name_every_layer(name: str, record_property) -> None:
    model, inputs = ZOO[name].load()
    untouched = copy.deepcopy(model.state_dict())
    watch = Watch(model, inputs)
    osplus = {"steps": 3, "value": True, "inner": True}
    steps = [
        {"smoothquant": {"smooth_o": True, "smooth_down": True}},
        Look(watch, "smoothquant"),
        Roughen(),
        Look(watch, "roughen"),
        {"outlier_suppression_plus": osplus},
        Look(watch, "os+"),
        {"outlier_suppression_plus": {**osplus, "shift_rmsnorm": True}},
        Look(watch, "os+ with added shifts"),
    ]

    def run() -> nn.Module:
        return qfx.quantize(model, {"schemes": {}, "steps": steps}, calibration=[inputs], progress=False)

    if name in NOT_CAPTURED:
        with pytest.raises(CaptureError, match=NOT_CAPTURED[name]):
            run()
        return
    folded = run()
    report = folded.qfx.report
    record_property("errors", watch.errors)
    assert type(folded) is type(model)
    assert max(watch.errors.values()) < BOUND, watch.errors
    assert relative_change(watch.want, outputs(folded, inputs)) < BOUND
    assert not [miss for miss in report.misses if "undone" in miss.why]
    assert not skipped(model, report)
    assert bool(report.folds) == (name not in NO_FOLDS)
    # the threshold search may find that a site is best left alone, and a second search that all are
    assert not [site for site in watch.vacuous if not site.startswith("os+")]
    assert len([site for site in watch.vacuous if site.startswith("os+ at")]) <= watch.folds["os+"] / 2
    assert set(untouched) == set(model.state_dict())
    assert all(torch.equal(untouched[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "vit"])
def test_low_precision_is_no_reason_to_undo_a_fold(name: str) -> None:
    model, inputs = ZOO[name].load()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    step = {"smoothquant": {"smooth_o": True, "smooth_down": True}}
    report = qfx.quantize(
        model.bfloat16(), {"schemes": {}, "steps": [step]}, calibration=[inputs], progress=False
    ).qfx.report
    assert report.folds
    assert not [m for m in report.misses if "undone" in m.why]
    assert report.output_error < 0.05


def test_the_list_has_every_kind_and_enough_that_captures() -> None:
    assert {ZOO[name].kind for name in LISTED} == set(KINDS)
    assert len(set(LISTED)) == len(LISTED)
    assert len(set(LISTED) - set(NOT_CAPTURED)) >= 60
