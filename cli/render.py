"""Everything that is drawn with rich: consoles, tables, sparklines, units."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"


def stderr_console() -> Console:
    """For everything that is not the answer itself. Honours NO_COLOR and a standard error that is not a terminal."""
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """For tables that are the answer; never so narrow that figures are left out: a terminal may break lines instead."""
    return Console(highlight=False, width=max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 120)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> Table:
    """A plain table: the first column to the left, figures to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", header_style="dim", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def sparkline(values: Sequence[float], width: int, top: float | None = None) -> str:
    """The values as bars of eight heights, averaged into at most ``width`` columns; ``top`` is the tallest bar."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(means) if top is None else top
    return "".join(_BARS[min(7, int(8 * value / top))] if top > 0 else _BARS[0] for value in means)


def human_bytes(count: float) -> str:
    """Bytes with a binary unit: 1536 → ``1.50 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def human_count(count: int) -> str:
    """A number of parameters: 1235814400 → ``1.24 B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(count)


def human_seconds(seconds: float | None) -> str:
    """A duration with a fitting unit; ``–`` for none."""
    if seconds is None:
        return "–"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s"
