"""What a table was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu() -> str:
    """The CPU's name, and whether it has int8 dot products (VNNI)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{name} {'with' if 'vnni' in flags else 'without'} VNNI"
