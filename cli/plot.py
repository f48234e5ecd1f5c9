"""Pictures, with matplotlib: what ``axon compare --plot`` writes."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

ON, OFF, INK, FAINT = "#0b7a75", "#c8553d", "#22252a", "#8a9099"


STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "axon",
}


def draw_comparison(report: dict[str, Any], path: Path) -> None:
    """Two panels: time per token against position, and cumulative time. SVG or PNG by the file's ending.

    Args:
        report: the JSON object of ``axon compare``.
        path: where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patheffects import withStroke

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
        halo = [withStroke(linewidth=4, foreground="white")]  # labels stay legible where they cross a line
        positions, on, off = report["positions"], report["cached"], report["uncached"]
        for side, colour, name in ((off, OFF, "cache off"), (on, ON, "cache on")):
            milliseconds = [1e3 * seconds for seconds in side["per_token_s"]]
            left.plot(positions[1:], milliseconds[1:], ".", color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
            left.plot(positions[1:], smooth(milliseconds[1:]), color=colour, linewidth=2)
            total, running = 0.0, []
            for value in side["per_token_s"]:
                total += value
                running.append(total)
            right.plot(positions, running, color=colour, linewidth=2)
            growth = side["growth_exponent"]
            label = name if growth is None else f"{name}: $\\sim n^{{{growth:.2f}}}$"
            left.annotate(
                label,
                (positions[-1], smooth(milliseconds[1:])[-1] if milliseconds[1:] else milliseconds[0]),
                xytext=(-6, 9),
                textcoords="offset points",
                color=colour,
                ha="right",
                path_effects=halo,
                weight="bold",
            )
            right.annotate(
                f"{name}: {total:.1f} s",
                (positions[-1], total),
                xytext=(-6, 9),
                textcoords="offset points",
                color=colour,
                ha="right",
                path_effects=halo,
                weight="bold",
            )
        values = sorted(1e3 * v for v in off["per_token_s"][1:] + on["per_token_s"][1:]) or [1.0]
        left.set_ylim(
            0, 1.25 * max(values[int(0.99 * (len(values) - 1))], smooth([1e3 * v for v in off["per_token_s"]])[-1])
        )
        right.set_ylim(0, 1.2 * max(off["total_s"], on["total_s"]))
        left.set_title("Time per token", loc="left", weight="bold", color=INK)
        right.set_title("Time so far", loc="left", weight="bold", color=INK)
        left.set_ylabel("milliseconds")
        right.set_ylabel("seconds")
        for axes in (left, right):
            axes.set_xlabel("tokens in the sequence, n")
            axes.set_xlim(left=positions[0])
            axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.suptitle(
            f"{'The same ' if report['identical'] else ''}{report['completion_tokens']} tokens, "
            f"with the KV cache and without: "
            f"{report['speedup_total']:.1f} × faster",
            x=0.01,
            ha="left",
            fontsize=14,
            weight="bold",
            color=INK,
        )
        version = report["commit"] or report["axon"]
        note = f"{report['model']}, {report['dtype']}, {report['hardware']}, torch {report['torch']}, axon {version}"
        figure.supxlabel(note, fontsize=8.5, color=FAINT, x=0.01, ha="left", parse_math=False)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        plt.close(figure)


def smooth(values: list[float], window: int = 9) -> list[float]:
    """A running median, shorter at the ends: what a step usually takes, without the disturbed ones."""
    half = window // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
