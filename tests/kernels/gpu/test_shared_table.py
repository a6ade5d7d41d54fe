"""The PTX that fills and reads a table in shared memory, read word by word, and who has room for it."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from qfx.kernels import nf4_linear
from qfx.kernels.gpu import shared_table, w4_config
from qfx.kernels.gpu.decode4 import table16_asm, table_decoder

WORD = 0xFFFFFFFF


class Machine:
    """Runs one thread of straight PTX: the few instructions of 32 bits that these texts have."""

    def __init__(self, memory: dict[int, int], thread: int = 0) -> None:
        self.memory = memory
        self.registers = {"%tid.x": thread, "%laneid": thread % 32, "pairs": 1024}

    def value(self, name: str) -> int:
        return self.registers[name] if name in self.registers else int(name, 0)

    def run(self, text: str) -> Machine:
        for line in re.split(r"[;{}](?![^\[{]*\])", re.sub(r"\{v, v, v, v\}", "v", text)):
            if line.strip():
                self.step(*line.strip().split(None, 1))
        return self

    def step(self, op: str, rest: str) -> None:
        a = [x.strip() for x in rest.split(",")]
        if op.startswith((".reg", ".shared", "barrier")):
            return
        if op.startswith("st.shared"):
            address, v = self.value(a[0].strip("[]")), self.value(a[1])
            assert address % 16 == 0
            for i in range(4):
                assert address + 4 * i not in self.memory, "stored twice"
                self.memory[address + 4 * i] = v
            return
        if op.startswith("ld.shared"):
            self.registers[a[0]] = self.memory[self.value(a[1].strip("[]"))]
            return
        x = [self.value(v) for v in a[1:]]
        kind = op.split(".")[0]
        if kind == "prmt":
            octets = [(w >> (8 * i)) & 255 for w in x[:2] for i in range(4)]
            picked = [(octets[s & 7], s & 8) for s in ((x[2] >> (4 * i)) & 15 for i in range(4))]
            out = sum((255 * (b >> 7) if sign else b) << (8 * i) for i, (b, sign) in enumerate(picked))
        elif kind == "lop3":
            table = x[3]
            bits = (((x[0] >> i & 1) << 2 | (x[1] >> i & 1) << 1 | (x[2] >> i & 1), i) for i in range(32))
            out = sum((table >> place & 1) << i for place, i in bits)
        else:
            out = {
                "mov": lambda v, w=0: v, "add": lambda v, w: v + w, "and": lambda v, w: v & w,
                "shl": lambda v, w: v << w, "shr": lambda v, w: v >> w, "mul": lambda v, w: v * w,
            }[kind](*x)  # fmt: skip
        self.registers[a[0]] = out & WORD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(nf4_linear.TABLES))
@pytest.mark.parametrize("warps", [2, 4, 8, 16])
def test_every_lane_finds_the_pair_of_every_byte(warps: int, name: str, dtype: torch.dtype) -> None:
    table = table_decoder(nf4_linear.TABLES[name], dtype).table
    memory: dict[int, int] = {}
    setup = shared_table.setup_asm(table, warps)
    addresses = [Machine(memory, thread).run(setup).registers["$0"] for thread in range(32 * warps)]
    assert len(memory) == shared_table.BYTES // 4
    for lane in (0, 7, 31):
        assert addresses[lane] == addresses[lane + 32]
        for word in range(0, 256, 4):
            machine = Machine(memory)
            codes = [word, word + 1, word + 2, word + 3]
            machine.registers |= {"$4": sum(c << (8 * i) for i, c in enumerate(codes)), "$5": addresses[lane]}
            machine.run(shared_table.LOOKUP)
            found = [machine.registers[f"${i}"] for i in range(4)]
            assert found == [table[c & 15] | table[c >> 4] << 16 for c in codes]
            assert found == [Machine({}).run(_with(table16_asm(table), machine)).registers[f"${i}"] for i in range(4)]


def _with(text: str, machine: Machine) -> str:
    """The same codes for the lookup by permutations."""
    return text.replace("$4", str(machine.registers["$4"]))


def test_no_two_lanes_read_from_one_bank() -> None:
    table = tuple(range(16))
    memory: dict[int, int] = {}
    setup = shared_table.setup_asm(table, 4)
    addresses = [Machine(memory, thread).run(setup).registers["$0"] for thread in range(128)]
    generator = torch.Generator().manual_seed(0)
    octets = torch.randint(0, 256, (32,), generator=generator).tolist()
    assert len({(a + 128 * b) // 4 % 32 for a, b in zip(addresses, octets, strict=False)}) == 32


@pytest.mark.parametrize("columns", [512, 4096, 28672])
def test_sums_of_16_tokens_fit_beside_a_table(columns: int) -> None:
    found = w4_config.candidates(16, 4096, columns, True, True, True)
    assert found and all(c.direct and 16 * 4 * c.bn * c.warps + shared_table.BYTES <= 48 * 1024 for c in found)
    assert len({(c.bn, c.warps, c.unroll, c.stages) for c in found}) == len(found)
    rule = w4_config.default(16, 4096, columns, direct=True)
    assert rule.direct and rule.bn * rule.warps <= w4_config.MEETING
    assert not any(c.direct for c in w4_config.candidates(16, 4096, columns, True, True))


def test_tiles_for_many_tokens_fit_beside_a_table() -> None:
    w4_large = pytest.importorskip("qfx.kernels.gpu.w4_large", reason="a Triton without Gluon")
    for tokens in (64, 128, 256, 1024):
        for c in w4_config.candidates(tokens, 8192, 8192, True, True):
            if c.specialized < 0:
                continue
            cut = w4_large.beside_table(w4_large.Config(c.bt, c.stages, rows=c.bn))
            stages = cut.stages * (256 * cut.bt + 64 * cut.rows)
            assert 2 <= cut.stages <= 6  # with one, its products would wait for themselves
            assert stages + 2 * cut.bt * cut.rows + shared_table.BYTES <= 226 * 1024
