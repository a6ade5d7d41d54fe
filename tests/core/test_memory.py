"""The estimate of a sweep's memory against what a sweep really keeps."""

import torch

from qfx.core.memory import estimate
from qfx.core.sweep import Sweep
from qfx.passes.discover.capture import capture
from tests.zoo import ZOO


def test_it_is_what_a_sweep_keeps_and_grows_with_the_batches() -> None:
    model, inputs = ZOO["llama"].load()
    graph = capture(model, inputs)
    sweep, kept = Sweep(graph, [inputs] * 3), 0
    while not sweep.done():
        sweep.advance()
        held = [v for env in sweep.boundary for v in env.values() if isinstance(v, torch.Tensor)]
        kept = max(kept, sum(v.numel() * v.element_size() for v in held))
    assert kept == estimate(graph, [inputs] * 3).boundary
    assert estimate(graph, [inputs] * 6).boundary == 2 * kept
    assert estimate(graph, [inputs] * 6).block == estimate(graph, [inputs]).block > 0
    assert estimate(graph, []) == (0, 0)


def test_the_logits_of_all_batches_are_not_kept() -> None:
    model, inputs = ZOO["llama"].load()
    graph = capture(model, inputs)
    sweep = Sweep(graph, [inputs] * 2)
    while not sweep.done():
        sweep.advance()
    assert not any(sweep.boundary)
