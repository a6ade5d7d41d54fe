"""Which configuration a kernel runs with: measured tables first, a rule for what nobody measured.

In order: what this process has chosen already; the user's own measurements on disk (one file for each device and
version of Triton); the table that ships for the device; inside `autotune()`, a measurement of all candidates, which is
written to disk; the op's default. Nothing is ever measured while a CUDA graph is being captured.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

C = TypeVar("C")
"""A frozen dataclass of plain values: an op's own configuration."""

_chosen: dict[tuple[Any, ...], Any] = {}
_autotune = False
_failures: list[str] = []


def pick(
    op: str,
    key: tuple[int | str, ...],
    default: C,
    candidates: Callable[[], Sequence[C]],
    run: Callable[[C, Tensor], object],
    weight: Tensor,
) -> C:
    """The configuration for one op at one shape.

    Args:
        op: name of the kernel, the first key of the tables.
        key: all that the choice depends on; last the number of tokens, as `bucket` gives it, and before it, where a
            configuration suits similar weights as well, the weight's shape as `RxC`.
        default: what to take where nothing was measured.
        candidates: what `autotune` tries.
        run: computes the call at hand with a configuration and a weight.
        weight: the largest operand. While measuring, copies of it take turns, so that it comes from memory and not
            from the cache.
    """
    device = weight.device.index or 0
    at = (device, op, key)
    found = _chosen.get(at)
    if found is None:
        found = _find(device, op, key, type(default))
        if found is None and _autotune and weight.is_cuda and not torch.cuda.is_current_stream_capturing():
            found = _measure_all(op, key, candidates(), run, weight)
        if found is None:
            if _autotune:  # do not keep what a later call may measure
                return default
            found = default
        _chosen[at] = found
    return found


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a configuration: 1, up to 8, and powers of two up to 8192."""
    return 1 if tokens <= 1 else min(8192, max(8, 1 << (tokens - 1).bit_length()))


@contextlib.contextmanager
def autotune() -> Iterator[list[str]]:
    """Within it, a call whose shape nobody has measured measures all candidates first (seconds each).

    Yields:
        A list that fills with the candidates that failed, and why.
    """
    global _autotune
    before, _autotune = _autotune, True
    _chosen.clear()
    _failures.clear()
    try:
        yield _failures
    finally:
        _autotune = before
        _chosen.clear()


def table_path() -> Path:
    """Where this device's own measurements are kept (`QFX_CACHE_DIR`, or `~/.cache/qfx`)."""
    root = os.environ.get("QFX_CACHE_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "qfx"
    return folder / f"{_slug(torch.cuda.get_device_name())}-triton-{triton.__version__}.json"


def seconds(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median time of one call, in seconds, of calls that are captured in a CUDA graph one behind the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    graph.replay()
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def _measure_all(
    op: str, key: tuple[int | str, ...], candidates: Sequence[C], run: Callable[[C, Tensor], object], weight: Tensor
) -> C | None:
    size = weight.numel() * weight.element_size()
    few = int(key[-1]) <= 512  # tokens; with more of them, weights are not what takes the time
    copies = [weight] + [weight.clone() for _ in range(min(63, 150_000_000 // max(size, 1)) if few else 0)]
    rounds = -(-8 // len(copies)) if few else 2
    timed: list[tuple[float, int]] = []
    for i, config in enumerate(candidates):
        try:
            timed.append((seconds([partial(run, config, w) for _ in range(rounds) for w in copies], 3), i))
        except Exception as e:  # too much shared memory, or a tile that the compiler does not take
            _failures.append(f"{op} {key} {config}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    if not timed:
        return None
    best, i = min(timed)
    _save(op, key, candidates[i], best)
    return candidates[i]


def _find(device: int, op: str, key: tuple[int | str, ...], kind: type[C]) -> C | None:
    if not torch.cuda.is_available():
        return None
    *rest, tokens = key
    tables = [table.get(op, {}) for table in (_own_table(device), _shipped_table(device))]
    for entry in _choices(tables, rest, int(tokens)):
        with contextlib.suppress(TypeError):  # written by another version of qfx
            return kind(**entry["config"])
    return None


def _choices(tables: Sequence[dict[str, Any]], rest: Sequence[int | str], tokens: int) -> Iterator[Any]:
    """What was measured for this shape and number of tokens, or for what is most like it; the best first.

    Of what is as much alike, that of an earlier table.
    """
    alike = [(0.0, entries.get(_join(rest), {})) for entries in tables]
    if _autotune:
        yield from (exact[str(tokens)] for _, exact in alike if str(tokens) in exact)
        return
    for entries in tables:
        alike += [(distance, entries[name]) for distance, name in _similar(rest, list(entries))]
    more = [
        (distance + math.log2(int(b) / tokens), int(b), entry)
        for distance, measured in alike
        for b, entry in measured.items()
        if int(b) >= tokens
    ]
    yield from (entry for *_, entry in sorted(more, key=lambda found: found[:2]))
    # or, if these are many, as many as there are
    fewer = [(int(b), -i, e) for i, (_, found) in enumerate(alike) for b, e in found.items() if 256 <= int(b) < tokens]
    yield from (entry for *_, entry in sorted(fewer, key=lambda found: found[:2], reverse=True))


def _similar(rest: Sequence[int | str], measured: Sequence[str]) -> list[tuple[float, str]]:
    """How far measured weights of about this shape are from it, and their names; the most similar first."""
    *same, shape = [str(r) for r in rest]
    if "x" not in shape:
        return []
    found = []
    for entry in measured:
        *others, other = entry.split(" ")
        if others == same and other != shape:
            (r, c), (r2, c2) = (map(int, s.split("x")) for s in (shape, other))
            # what decides is the number of tiles, then their length
            found.append((abs(math.log2(r / r2)) + 0.5 * abs(math.log2(c / c2)), entry))
    return [(distance, entry) for distance, entry in sorted(found) if distance <= 2]


def _save(op: str, key: tuple[int | str, ...], config: Any, best: float) -> None:
    path = table_path()
    table = json.loads(path.read_text()) if path.exists() else {}
    entry = {"config": asdict(config), "us": round(best * 1e6, 2)}
    table.setdefault(op, {}).setdefault(_join(key[:-1]), {})[str(key[-1])] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1))
    temporary.replace(path)
    _own_table.cache_clear()


@cache
def _own_table(device: int) -> dict[str, Any]:
    path = table_path()
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:  # half a file of a killed process: measure again
        return {}


@cache
def _shipped_table(device: int) -> dict[str, Any]:
    """Of this device, or of another one of its compute capability."""
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    path = resources.files("qfx.kernels.gpu") / "tables" / f"{capability}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _join(key: Sequence[int | str]) -> str:
    return " ".join(str(k) for k in key)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
