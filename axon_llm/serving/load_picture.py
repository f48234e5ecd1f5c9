"""A load test as a picture: SVG text, no library.

One run: how TTFT and TPOT are distributed, and every request as a bar over time. Several runs: percentiles against the
load. Colours are legible on light and dark grounds alike, and every line is also told apart by its label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from axon_llm.serving.load import Run
from axon_llm.serving.load_report import percentile

WIDTH, PANEL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 230, 70, 24, 34, 44
INK, FAINT = "#6e7781", "#8b949e55"
COLOURS = ("#1f77b4", "#e07b39", "#2a9d57", "#c0392b")


class Panel:
    """A rectangle with axes; data coordinates in, SVG elements out.

    Args:
        title: above it.
        x: label of the horizontal axis, with unit.
        y: label of the vertical axis, with unit.
        x_limit: right end of the horizontal axis.
        y_limit: top end of the vertical axis.
        index: the how-manieth panel from the top.
    """

    def __init__(self, title: str, x: str, y: str, x_limit: float, y_limit: float, index: int) -> None:
        self._x_limit, self._y_limit = _round_up(x_limit), _round_up(y_limit)
        self._top = index * PANEL_HEIGHT + TOP
        self._height = PANEL_HEIGHT - TOP - BOTTOM
        self._width = WIDTH - LEFT - RIGHT
        self.parts = [_text(LEFT, self._top - 14, title, weight="bold")]
        for tick in range(5):
            share = tick / 4
            across, up = LEFT + share * self._width, self._top + (1 - share) * self._height
            self.parts.append(_line(LEFT, up, LEFT + self._width, up, FAINT))
            self.parts.append(_text(LEFT - 8, up + 4, _number(share * self._y_limit), anchor="end"))
            self.parts.append(_text(across, self._top + self._height + 16, _number(share * self._x_limit), "middle"))
        self.parts.append(_text(LEFT + self._width / 2, self._top + self._height + 34, x, "middle"))
        middle = self._top + self._height / 2
        self.parts.append(
            f'<text x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})">'
            f"{escape(y)}</text>"
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point."""
        return (
            LEFT + min(x / self._x_limit, 1.0) * self._width,
            self._top + (1 - min(y / self._y_limit, 1.0)) * self._height,
        )

    def curve(self, points: Sequence[tuple[float, float]], colour: str, label: str, *, marks: bool = False) -> None:
        """A line through points, named at its end."""
        if not points:
            return
        places = [self.at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if marks:
            self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        x, y = places[-1]
        self.parts.append(_text(min(x, WIDTH - RIGHT) - 6, max(y - 6, self._top + 10), label, "end", colour))

    def upright(self, x: float, colour: str, label: str) -> None:
        """A dashed line at one value of x."""
        if x > self._x_limit:
            return
        across, bottom = self.at(x, 0)
        self.parts.append(_line(across, self._top, across, bottom, colour, dashes="5 4"))
        self.parts.append(_text(across + 4, bottom - 6, label, colour=colour))

    def bar(self, begin: float, end: float, row: float, thickness: float, colour: str) -> None:
        """A horizontal bar, row counted from the bottom."""
        left, top = self.at(begin, row + thickness)
        right, _ = self.at(end, 0)
        height = max(0.5, thickness * self._height / self._y_limit)
        self.parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.4):.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )


def draw_run(run: Run, result: dict[str, Any]) -> str:
    """One run: distributions and time line."""
    good = [sample for sample in run.samples if not sample.error]
    panels = []
    named = (
        ("TTFT", "ttft", [s.ttft_s for s in good]),
        ("TPOT", "tpot", [s.tpot_s for s in good if s.tpot_s is not None]),
    )
    for index, (title, name, values) in enumerate(named):
        in_ms = sorted(value * 1e3 for value in values)
        panel = Panel(
            f"{title}: share of requests within …", f"{title} (ms)", "share", (in_ms or [1.0])[-1] * 1.05, 1.0, index
        )
        panel.curve([(value, (rank + 1) / len(in_ms)) for rank, value in enumerate(in_ms)], COLOURS[index], "")
        for percent, colour in ((50, INK), (99, COLOURS[3])):
            if in_ms:
                value = percentile(in_ms, percent)
                panel.upright(value, colour, f"p{percent} {_number(value)} ms")
        limit = result["objective"].get(f"p99_{name}_ms", {}).get("limit")
        if limit is not None:
            panel.upright(limit, COLOURS[2], f"objective {_number(limit)} ms")
        panels.append(panel)
    bars = Panel(
        "Requests over time: waiting and prefill (orange), then decoding (blue); failed (red)",
        "time (s)",
        "request",
        max(run.duration_s, 1e-3),
        float(max(len(run.samples), 4)),
        2,
    )
    for row, sample in enumerate(run.samples):
        begin, end = sample.due - run.began, sample.ended - run.began
        if sample.error:
            bars.bar(begin, end, row, 0.8, COLOURS[3])
            continue
        first = sample.chunks[0] - run.began
        bars.bar(begin, first, row, 0.8, COLOURS[1])
        bars.bar(first, end, row, 0.8, COLOURS[0])
    panels.append(bars)
    return _document(panels, _headline(result))


def draw_sweep(results: Sequence[dict[str, Any]]) -> str:
    """Several runs: percentiles of TTFT and TPOT, and throughput, against the load."""
    by_rate = len({result["request_rate"] for result in results}) > 1
    label = "arrivals (requests/s)" if by_rate else "requests at once"

    def load_of(result: dict[str, Any]) -> float:
        value = result["request_rate"] if by_rate else result["max_concurrency"]
        return float(value) if value is not None and value != "inf" else float(result["max_concurrent_requests"])

    furthest = max(load_of(result) for result in results)
    panels = []
    for index, name in enumerate(("ttft", "tpot")):
        highest = max(result[f"p99_{name}_ms"] or 0.0 for result in results)
        panel = Panel(f"{name.upper()} against load", label, f"{name.upper()} (ms)", furthest, highest or 1.0, index)
        for percent, colour in ((50, COLOURS[0]), (99, COLOURS[3])):
            points = [
                (load_of(result), result[f"p{percent}_{name}_ms"])
                for result in results
                if result[f"p{percent}_{name}_ms"] is not None
            ]
            panel.curve(points, colour, f"p{percent}", marks=True)
        panels.append(panel)
    highest = max(result["output_throughput"] for result in results)
    panel = Panel("Output against load", label, "tokens/s", furthest, highest or 1.0, 2)
    panel.curve([(load_of(r), r["output_throughput"]) for r in results], COLOURS[2], "output tokens/s", marks=True)
    panels.append(panel)
    return _document(panels, f"{results[0]['model_id']} at {results[0]['base_url']}")


def _headline(result: dict[str, Any]) -> str:
    return (
        f"{result['model_id']}: {result['completed']} of {result['num_prompts']} requests "
        f"in {result['duration']:.1f} s, "
        f"{result['output_throughput']:.0f} output tokens/s, goodput {result['request_goodput']:.2f} requests/s"
    )


def _document(panels: Sequence[Panel], headline: str) -> str:
    height = PANEL_HEIGHT * len(panels) + 30
    body = "\n".join(part for panel in panels for part in panel.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -30 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}">\n{_text(LEFT, -10, headline, weight="bold")}\n{body}\n</svg>\n'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-weight="{weight}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _round_up(value: float) -> float:
    """The next larger number whose quarters are easy to read."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * unit >= value * 0.999)
