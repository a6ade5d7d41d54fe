"""Tables of a report, for terminals and logs. The data are `qfx.core.report`'s."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qfx.core.lowering import LoweringReport
from qfx.core.report import Layer, Report, general

WORST = 10
"""Layers that are listed unless all are asked for."""
EXAMPLES = 3
"""Places that are named for each reason of a miss."""


def render(report: Report, verbose: bool = False) -> Group:
    """The report as tables; empty ones are left out.

    Args:
        report: what to show.
        verbose: list every layer, fold and miss, not only the worst and some examples.
    """
    tables = [
        _sizes(report),
        _steps(report),
        _folds(report, verbose),
        _misses(report, verbose),
        _layers(report, verbose),
    ]
    warnings = [Text(f"warning: {text}", style="yellow") for text in report.warnings]
    spaced = [item for table in tables if table.row_count for item in (Text(), table)]
    return Group(Text(report.headline(), style="bold"), *warnings, *spaced)


def text(report: Report, width: int = 110, verbose: bool = False) -> str:
    """The same as plain text, no wider than `width` columns."""
    return plain(render(report, verbose), width)


def plain(shown: RenderableType, width: int) -> str:
    """What rich would show, without colours, no wider than `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render_lowering(report: LoweringReport, verbose: bool = False) -> Group:
    """What `qfx.lower` did, as tables: each linear's kernel, and which linears read what others read, but stay alone.

    Args:
        report: what to show.
        verbose: list every linear and miss; otherwise those that differ only in a block's number are one row.
    """
    layers = new_table("Kernels", "layer", ">times", "scheme", "kernel", "merged", "reason")
    rows = [(x.name, x.scheme, x.kernel, ", ".join(_leaves(x.merged)) or "-", x.reason) for x in report.layers]
    for row, times in _counted(rows, verbose):
        add_row(layers, row[0], times, *row[1:])
    misses = new_table("Not merged", "layer", ">times", "why")
    for row, times in _counted([(m.where, m.why) for m in report.misses], verbose):
        add_row(misses, row[0], times, *row[1:])
    notes = [Text(f"note: {text}", style="yellow") for text in report.notes]
    spaced = [item for table in (layers, misses) if table.row_count for item in (Text(), table)]
    return Group(Text(report.headline(), style="bold"), *notes, *spaced)


def _leaves(names: list[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


def _counted(rows: Sequence[tuple[str, ...]], verbose: bool) -> list[tuple[tuple[str, ...], str]]:
    counts = Counter(rows if verbose else (tuple(map(general, row)) for row in rows))
    return [(row, str(count)) for row, count in counts.items()]


def new_table(title: str, *columns: str) -> Table:
    """A table whose columns named with a leading ">" hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        number = column.startswith(">")
        table.add_column(
            column.lstrip(">"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def add_row(table: Table, *cells: str) -> None:
    """Adds cells as they are: "[h, 3, d]" is a name, not markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _sizes(report: Report) -> Table:
    table = new_table("Model", "model", ">before", ">after", ">ratio", ">seconds")
    before, after = report.bytes_before, report.bytes_after
    ratio = f"{before / after:.2f} ×" if after else "-"
    add_row(table, report.model, human_size(before), human_size(after), ratio, f"{report.seconds:.1f}")
    return table


def _steps(report: Report) -> Table:
    table = new_table("Steps", "step", "settings", ">changed", ">seconds", "notes")
    for step in report.steps:
        settings = ", ".join(f"{name}={value}" for name, value in step.settings.items()) or "defaults"
        notes = "; ".join(step.notes)
        add_row(table, step.name, settings, str(step.changed), f"{step.seconds:.1f}", notes)
    return table


def _folds(report: Report, verbose: bool) -> Table:
    if verbose:
        table = new_table("Folds", "site", "kind", "map", "step", "readers", ">error")
        for fold in report.folds:
            kind = f"{fold.kind} (online)" if fold.online else fold.kind
            readers = ", ".join(fold.readers)
            add_row(table, fold.site, kind, fold.map, fold.step, readers, f"{fold.error:.1e}")
        return table
    table = new_table("Folds", "kind", ">count", "maps", "steps", ">worst error")
    for kind, folds in report.folds_by_kind().items():
        maps = ", ".join(sorted({fold.map for fold in folds}))
        steps = ", ".join(sorted({fold.step for fold in folds}))
        worst = max((fold.error for fold in folds), key=_badness)
        add_row(table, kind, str(len(folds)), maps, steps, f"{worst:.1e}")
    return table


def _misses(report: Report, verbose: bool) -> Table:
    table = new_table("Misses", "reason", ">count", ">of weights", "where")
    for why, misses in report.misses_by_reason().items():
        places = list(dict.fromkeys(miss.where for miss in misses))
        shown = places if verbose else places[:EXAMPLES]
        more = f", and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
        weights = sum(miss.weights for miss in misses)
        share = percent(weights / report.linear_weights) if report.linear_weights else "-"
        add_row(table, why, str(len(misses)), share, ", ".join(shown) + more)
    return table


def _layers(report: Report, verbose: bool) -> Table:
    layers = report.layers
    if not verbose:
        measured = [layer for layer in layers if layer.error is not None]
        layers = sorted(measured, key=lambda layer: -_badness(layer.error))[:WORST]
    every = len(layers) == len(report.layers)
    title = "Layers" if every else f"Layers: the worst {len(layers)} of {len(report.layers)}"
    columns = ("layer", "scheme", "shape", "solver", ">bits", ">error", "op", "note")
    table = new_table(title, *columns)
    for layer in layers:
        add_row(table, *_cells(layer))
    return table


def _cells(layer: Layer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.scheme or "float",
        " × ".join(str(size) for size in layer.shape),
        layer.solver or "-",
        f"{layer.bits:.2f}" if layer.bits else "-",
        "-" if layer.error is None else percent(layer.error),
        layer.op or "-",
        layer.note,
    )


def _badness(error: float | None) -> float:
    """Sorts NaN above all numbers: it is the worst error."""
    return math.inf if error is None or math.isnan(error) else error


def percent(share: float) -> str:
    """A share of 1 as percent, in three digits."""
    return f"{100 * share:.3g} %"


def human_size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
