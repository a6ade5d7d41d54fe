"""Split-K: the parts of a sum that several programs hold, added in a fixed order by the last of them to arrive."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_POOL = 1 << 18
_pools: dict[tuple[int, int], Tensor] = {}
_graphs: dict[int, tuple[Tensor, int]] = {}


@triton.jit
def sum_parts(
    acc, part_ptr, count_ptr, tile, part, live, A: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Adds the `[A, B]` parts of one output tile.

    Returns the total and whether this program is the last one, which alone holds it. Parts are added in their
    order, whatever the order in which programs finish: the result is always the same. `live` `[1, B]` masks columns.
    """
    offsets = tl.arange(0, B)[None, :] * A + tl.arange(0, A)[:, None]
    base = part_ptr + (tile * SPLIT).to(tl.int64) * (A * B)
    tl.store(base + part * (A * B) + offsets, acc, mask=live, cache_modifier=".cg")
    tl.debug_barrier()  # all of this program's stores come before its arrival
    arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
    last = arrived == SPLIT - 1
    total = tl.zeros((A, B), dtype=acc.dtype)
    if last:
        for i in range(SPLIT):
            total += tl.load(base + i * (A * B) + offsets, mask=live, other=0, cache_modifier=".cg")
        tl.store(count_ptr + tile, 0)  # for the next launch
    return total, last


def counters(number: int, device: torch.device) -> Tensor:
    """`number` int32 zeros that a kernel returns to zero when it ends.

    One pool for each stream, since launches of one stream follow each other. A launch that is being captured gets
    counters of its own for ever: its graph may run beside anything else.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32)
    index = device.index or 0
    if torch.cuda.is_current_stream_capturing():
        pool, used = _graphs.get(index, (None, _POOL))
        if pool is None or used + number > pool.numel():
            return torch.zeros(number, dtype=torch.int32, device=device)  # a memset in the graph: right, and slower
        _graphs[index] = pool, used + number
        return pool[used : used + number]
    stream = torch._C._cuda_getCurrentRawStream(index)
    pool = _pools.get((index, stream))
    if pool is None or pool.numel() < number:
        pool = _pools[index, stream] = torch.zeros(max(number, 1 << 14), dtype=torch.int32, device=device)
    if index not in _graphs or _graphs[index][1] > _POOL // 2:  # outside of capture, for the captures to come
        _graphs[index] = torch.zeros(_POOL, dtype=torch.int32, device=device), 0
    return pool
