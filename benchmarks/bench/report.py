"""Results as JSON lines, and as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Key = tuple[str, int, int, int]
"""Name, tokens, out, in (for ops on rows: name, tokens, channels, 0)."""


class Results:
    """Rows of one run, written line by line."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.rows: dict[Key, dict[str, Any]] = {}
        self.notes: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            for line in path.read_text().splitlines():
                self._keep(json.loads(line))
        self._file = path.open("a" if resume else "w")

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._keep(row)

    def note(self, text: str) -> None:
        """A line for the terminal, printed once, now and at the end."""
        if text not in self.notes:
            self.notes.append(text)
            print(text, flush=True)

    def us(self, name: str, tokens: int, out: int, columns: int) -> float | None:
        return self.rows.get((name, tokens, out, columns), {}).get("us")

    def best_peer(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The fastest peer of the row's family at its shape."""
        wanted = ("peer", row["family"], row["M"], row["N"], row["K"])
        same = [r for (_, *at), r in self.rows.items() if (r["role"], r["family"], *at) == wanted and "us" in r]
        return min(same, key=lambda r: r["us"], default=None)

    def _keep(self, row: dict[str, Any]) -> None:
        if "name" in row:
            self.rows[row["name"], row["M"], row["N"], row["K"]] = row


def table(results: Results, name: str) -> str:
    """One op: for each shape and number of tokens µs, ratio to bf16, ratio to the best peer (over 1 is faster)."""
    rows = {k[1:]: r for k, r in results.rows.items() if k[0] == name}
    tokens = sorted({m for m, _, _ in rows})
    shapes = list(dict.fromkeys((n, k) for _, n, k in rows))
    body = [[f"M={m}" for m in tokens], *([_cell(results, rows.get((m, n, k))) for m in tokens] for n, k in shapes)]
    widths = [max(len(line[i]) for line in body) + 2 for i in range(len(tokens))]
    names = ["", *(f"{n}x{k}" if k else str(n) for n, k in shapes)]
    lines = [f"{name}: us, ratio to bf16, ratio to the best peer"]
    for left, line in zip(names, body, strict=True):
        lines.append(f"{left:<10}" + "".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)))
    return "\n".join(lines)


def _cell(results: Results, row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "us" not in row:
        return row.get("failed", "failed").split(":")[0][:18]
    base = results.us("bf16", row["M"], row["N"], row["K"])
    peer = results.best_peer(row)
    wrong = "!" if row.get("wrong") else ""
    us = f"{row['us']:.1f}" if row["us"] < 1000 else f"{row['us']:.0f}"
    return f"{wrong}{us} {_ratio(base, row['us'])} {_ratio(peer and peer['us'], row['us'])}"


def _ratio(other: float | None, own: float) -> str:
    return "-" if other is None else f"{other / own:.2f}"


def peers_table(results: Results) -> str:
    """The peers, one line a peer and shape: µs for each number of tokens."""
    lines = ["peers: us"]
    rows = [r for r in results.rows.values() if r["role"] != "op" and "us" in r]
    for name, n, k in dict.fromkeys((r["name"], r["N"], r["K"]) for r in rows):
        own = sorted((r for r in rows if (r["name"], r["N"], r["K"]) == (name, n, k)), key=lambda r: r["M"])
        lines.append(f"{name} {n}x{k}: " + ", ".join(f"{r['M']}: {r['us']:.1f}" for r in own))
    return "\n".join(lines)
