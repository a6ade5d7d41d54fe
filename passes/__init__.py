"""The passes: discover, calibrate, transform, solve, lower; one method a file.

`METHODS` is the vocabulary of recipes: a step's name and its class.
"""

from __future__ import annotations

from typing import Any

from qfx.passes.calibrate.calibrate import Calibrate
from qfx.passes.solve.gptq import Gptq
from qfx.passes.solve.rtn import Rtn
from qfx.passes.transform.outlier_suppression import OutlierSuppression
from qfx.passes.transform.outlier_suppression_plus import OutlierSuppressionPlus
from qfx.passes.transform.smoothquant import SmoothQuant

METHODS: dict[str, type[Any]] = {
    "smoothquant": SmoothQuant,
    "outlier_suppression": OutlierSuppression,
    "outlier_suppression_plus": OutlierSuppressionPlus,
    "calibrate": Calibrate,
    "rtn": Rtn,
    "gptq": Gptq,
}
SOLVERS = (Rtn, Gptq)
