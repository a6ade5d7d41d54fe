"""The formats that `qfx.save(format=...)` writes and `qfx.load` reads."""

from __future__ import annotations

from qfx.export.checkpoints._format import Format
from qfx.export.checkpoints.awq import Awq
from qfx.export.checkpoints.bitsandbytes import BitsAndBytes
from qfx.export.checkpoints.compressed_tensors import CompressedTensors
from qfx.export.checkpoints.gptq import V2, Gptq

METHODS: dict[str, Format] = {form.name: form for form in (CompressedTensors(), Gptq(), Awq(), BitsAndBytes())}
"""What `read` is called on, by the `quant_method` of a config."""
FORMATS: dict[str, Format] = {**METHODS, V2: Gptq(V2)}
"""What `save` writes, by name. The second version of gptq has the `quant_method` of the first."""
