"""The formats that `qfx.save(format=...)` writes and `qfx.load` reads, by the name that `quant_method` has."""

from __future__ import annotations

from qfx.export.checkpoints._format import Format
from qfx.export.checkpoints.awq import Awq
from qfx.export.checkpoints.bitsandbytes import BitsAndBytes
from qfx.export.checkpoints.compressed_tensors import CompressedTensors
from qfx.export.checkpoints.gptq import Gptq

FORMATS: dict[str, Format] = {form.name: form for form in (CompressedTensors(), Gptq(), Awq(), BitsAndBytes())}
