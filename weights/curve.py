"""The loss curve as an SVG picture, drawn without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 320, 56, 40


def draw_curve(path: Path, points: Sequence[tuple[float, float]], smooth: int = 20) -> None:
    """Draw loss over millions of tokens.

    Args:
        path: the SVG file to write.
        points: (millions of tokens, loss), in order.
        smooth: points averaged into one.
    """
    blocks = [points[i : i + smooth] for i in range(0, len(points), smooth)]
    line = [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks if block]
    if not line:
        return
    right, top = max(x for x, _ in line), max(1.0, *(y for _, y in line))

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 16) * x / right, (HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - 24) * y / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="14" fill="#333">training loss (nats per token, weighted)</text>',
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 6}" fill="#333" text-anchor="end">million tokens</text>',
    ]
    for i in range(6):
        x, y = at(right * i / 5, top * i / 5)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" fill="#333" text-anchor="end">{top * i / 5:.1f}</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" fill="#333" text-anchor="middle">{right * i / 5:.1f}</text>'
        )
    path_points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
    parts.append(f'<polyline points="{path_points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/></svg>')
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
