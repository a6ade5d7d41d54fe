"""temporary"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from qfx.core.passes import Result, State
from qfx.core.qtensor import QTensor
from qfx.core.spec import QSpec, Scheme
from qfx.passes.solve._driver import Plan, solve_layers
from qfx.passes.solve._obs import Factor, prepare
from qfx.passes.solve.gptq import gptq
from qfx.passes.solve.rtn import rtn


@dataclass(frozen=True)
class Rtn:
    clip: Literal["minmax", "mse", "output"] = "minmax"
    group_size: int | None = None
    sequential: bool = False
    name = "rtn"

    @property
    def needs_data(self) -> bool:
        return self.clip == "output" or self.sequential

    def __call__(self, state: State) -> Result:
        def round_(w: Tensor, scheme: Scheme, hessian: Tensor | None) -> tuple[QTensor, str]:
            return rtn(w, scheme.weight, hessian, clip=self.clip), ""

        plan = Plan("rtn", hessian=self.clip == "output", sequential=self.sequential)
        return solve_layers(state, plan, round_)


@dataclass(frozen=True)
class Gptq:
    group_size: int | None = None
    act_order: bool = False
    static_groups: bool = True
    damp: float = 0.01
    block_size: int = 128
    clip: Literal["minmax", "mse", "output"] = "minmax"
    keep_better: bool = False
    sequential: bool = True
    true_sequential: bool = True
    name = "gptq"
    needs_data = True

    def __call__(self, state: State) -> Result:
        cache: dict[int, tuple[Tensor, Factor]] = {}

        def round_(w: Tensor, scheme: Scheme, hessian: Tensor | None) -> tuple[QTensor, str]:
            assert hessian is not None
            if id(hessian) not in cache:
                cache.clear()
                cache[id(hessian)] = (hessian, prepare(hessian, damp=self.damp, act_order=self.act_order))
            qtensor, report = gptq(
                w,
                scheme.weight,
                hessian,
                factor=cache[id(hessian)][1],
                block_size=self.block_size,
                act_order=self.act_order,
                static_groups=self.static_groups,
                clip=self.clip,
                keep_better=self.keep_better,
            )
            notes = []
            if report.fallback:
                notes.append(report.fallback)
            if report.damp > self.damp:
                notes.append(f"damping raised to {report.damp:g}")
            if report.guard:
                notes.append("kept round-to-nearest, which was better")
            if report.dead:
                notes.append(f"{report.dead} inputs were never active")
            return qtensor, "; ".join(notes)

        plan = Plan("gptq", hessian=True, sequential=self.sequential, true_sequential=self.true_sequential)
        return solve_layers(state, plan, round_)
