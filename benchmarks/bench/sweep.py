"""What a run measures, and what else is done with the same calls: compiling, tuning, eager timing."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ops, peers, timing
from bench.cases import Linear
from qfx.core.qtensor import encode_minmax
from qfx.core.spec import parse_scheme
from qfx.modules.kernels import KERNELS, choose_kernel
from qfx.modules.linear import QLinear

SHAPES = [(8192, 8192), (4096, 4096), (28672, 8192), (8192, 28672), (28672, 4096), (4096, 14336)]
"""N x K; those first that matter most if time runs out."""
TOKENS = [1, 4, 16, 64, 256, 2048, 8192]
TUNED = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
"""Tokens of each bucket that a configuration is chosen for."""
ROWS = [(8192, 8192), (2048, 4096), (256, 8192), (16, 4096), (1, 4096)]
"""Tokens x channels for ops on rows; as above."""
MODELS = {
    "llama-3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-2-7b": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "opt-13b": [(15360, 5120), (5120, 5120), (20480, 5120), (5120, 20480)],
    "opt-30b": [(21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672)],
}
"""N x K of the linears of models, those that read the same value merged."""
MODULES = {f"module {scheme}": scheme for scheme in ("W8A8", "FP8_DYNAMIC", "W4A16", "W4A8", "W4AFP8", "NF4")}
"""Whole linears, as a model calls them."""
DEVICE = "cuda"


def shapes(names: list[str]) -> list[tuple[int, int]]:
    """From `NxK` and names of models, each once."""
    found: list[tuple[int, int]] = []
    for name in names:
        if name in MODELS:
            found += MODELS[name]
        else:
            n, k = map(int, name.split("x"))
            found.append((n, k))
    return list(dict.fromkeys(found))


def weight(n: int, k: int) -> Tensor:
    """A random weight, the same in every process."""
    generator = torch.Generator(DEVICE).manual_seed(n * 7919 + k)
    return (torch.randn(n, k, device=DEVICE, generator=generator) * 0.02).bfloat16()


def activation(m: int, k: int) -> Tensor:
    return torch.randn(m, k, device=DEVICE).bfloat16()


def lowered(w: Tensor, name: str) -> QLinear:
    """A linear of a scheme, with the kernel that `qfx.lower` gives it."""
    scheme = parse_scheme(name)
    module = QLinear.from_qtensor(encode_minmax(w, scheme.weight), None, scheme, dtype=w.dtype)
    kernel, _ = choose_kernel(scheme, module.in_features, module.out_features)
    if kernel in KERNELS:
        module.use_kernel(kernel)
    return module


def selected(table: dict[str, Any], a: argparse.Namespace) -> list[tuple[str, Any]]:
    """What `--ops` names, or begins with one of its names."""
    return [(name, value) for name, value in table.items() if not a.ops or any(name.startswith(o) for o in a.ops)]


def chosen_peers(a: argparse.Namespace) -> Iterator[tuple[str, peers.Peer]]:
    families = {family for _, (family, _) in selected(ops.OPS, a)}
    for name, peer in peers.PEERS.items():
        if peer.family in families and (a.peers or name.startswith(peers.BUILTIN)):
            yield name, peer


def steps(a: argparse.Namespace, start: int = 0) -> Iterator[Callable[[], object]]:
    """Every call of qfx's ops in the run, once; from another shape on, so that processes need memory at other times."""
    first = start % len(a.shapes)
    for n, k in a.shapes[first:] + a.shapes[:first]:
        w = weight(n, k)
        for _, (_, make) in selected(ops.OPS, a):
            try:
                linear: Linear = make(w)
            except Exception:  # the measuring process says why
                continue
            for m in a.m:
                x = linear.prepare(activation(m, k))
                yield lambda linear=linear, x=x: linear.call(x, linear.weights)
            del linear
            torch.cuda.empty_cache()
    for tokens, channels in a.rows:
        x, w = activation(tokens, channels), torch.randn(channels, device=DEVICE).bfloat16()
        for _, (_, make_rows) in selected(ops.ROW_OPS, a):
            try:
                case = make_rows()
            except Exception:
                continue
            yield lambda case=case, x=x, w=w: case.call(x, w)


def compile_peers(a: argparse.Namespace, index: int, count: int) -> None:
    """This process's share of the calls of peers that compile many candidates."""
    peers.COMPILE_ONLY = True
    points = [
        (peer, shape, m)
        for name, peer in chosen_peers(a)
        if name.startswith(peers.AUTOTUNED)
        for shape in a.shapes
        for m in a.m
        if shape in (peer.shapes or a.shapes) and m in (peer.tokens or a.m)
    ]
    for peer, shape, m in points[index::count]:
        try:
            linear = peer.make(weight(*shape))
            linear.call(linear.prepare(activation(m, shape[1])), linear.weights)
            torch.cuda.synchronize()
        except Exception:  # the measuring process says why
            continue


def tune_all(a: argparse.Namespace) -> None:
    """Measures every configuration at every shape; the table goes to `--out`."""
    from qfx.kernels.gpu import tune

    budget, done, left = timing.Budget(a.budget), 0, 0
    path = tune.table_path()
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    with tune.autotune() as failures:
        for step in steps(a):
            if budget.left < 0:
                left += 1
                continue
            try:
                step()
                torch.cuda.synchronize()
                done += 1
            except Exception as e:
                failures.append(f"{type(e).__name__}: {str(e)[:200]}")
            if path.exists():  # each time: the run may be stopped from outside
                shutil.copy(path, a.out)
        entries = sum(map(len, json.loads(path.read_text()).values())) if path.exists() else 0
        print(f"{done} calls, {entries} entries in {a.out}")
        for line in dict.fromkeys(failures):
            print("  failed:", line[:240])
    if left:
        print(f"out of time: {left} calls not tuned")


def eager(a: argparse.Namespace) -> None:
    """Host time of an eager call, at a shape whose kernels are short."""
    w, rows = weight(1024, 1024), {}
    cases: list[tuple[str, Any]] = [("bf16", ("", peers.bf16)), *selected(ops.OPS, a)]
    for m in (1, 64):
        for name, (_, make) in cases:
            try:
                linear = make(w)
                inputs = linear.prepare(activation(m, 1024))
                rows[f"{name} M={m}"] = timing.host_time(lambda x=inputs, v=linear: v.call(x, v.weights))
            except Exception as e:
                print(f"skipped {name}: {type(e).__name__}: {str(e)[:200]}")
        for name, scheme in selected(MODULES, a):
            try:
                module, x = lowered(w, scheme), activation(m, 1024)
                rows[f"{name} M={m}"] = timing.host_time(lambda module=module, x=x: module(x))
            except Exception as e:
                print(f"skipped {name}: {type(e).__name__}: {str(e)[:200]}")
                continue
            for why in module._plans.kinds.values() if module._plans else ():
                if isinstance(why, str):
                    print(f"{name} M={m} has no launch plan: {why}")
        for name, (_, make_rows) in selected(ops.ROW_OPS, a):
            try:
                case, x, gain = make_rows(), activation(m, 1024), torch.ones(1024, device=DEVICE).bfloat16()
                rows[f"{name} M={m}"] = timing.host_time(lambda c=case, x=x, g=gain: c.call(x, g))
            except Exception as e:
                print(f"skipped {name}: {type(e).__name__}: {str(e)[:200]}")
    for name, us in rows.items():
        print(f"{name:<32} {us:7.1f} us on the host")
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(timing.environment() | {"host_us": rows}, indent=1) + "\n")
