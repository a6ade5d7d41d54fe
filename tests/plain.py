"""A module that can be saved without a capture: `.qfx` is all that `qfx.save` asks for."""

import torch
from torch import Tensor, nn

from qfx.core.report import Report
from qfx.package import Quantized
from qfx.recipes import Recipe


class Plain(nn.Module):
    """Parameters of one value, a stored buffer, and one that is made anew."""

    def __init__(self, value: float = 0.0, size: int = 64, buffer: str = "count") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        for p in self.parameters():
            nn.init.constant_(p, value)
        self.register_buffer(buffer, torch.tensor(3))
        self.register_buffer("scratch", torch.full((2,), 1.0), persistent=False)
        self.qfx = Quantized(Report("Plain", Recipe().to_dict(), 16), Recipe(), {"x": [1, size]})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
