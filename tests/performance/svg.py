"""A line plot as an SVG file, over a logarithmic x axis.

Owns the drawing. Does not know what is plotted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


class Series(NamedTuple):
    """points: (x, y), x > 0."""

    name: str
    points: Sequence[tuple[float, float]]


def plot(title: str, x_label: str, y_label: str, lines: Sequence[Series]) -> str:
    """Return the text of an SVG document; the y axis begins at 0, and x is logarithmic."""
    points = [point for line in lines for point in line.points]
    low = math.log10(min(x for x, _ in points))
    high = max(math.log10(max(x for x, _ in points)), low + 1e-9)
    top = 1.2 * max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low) / (high - low)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - y / top * (
            HEIGHT - 2 * MARGIN
        )

    parts = [_text(WIDTH / 2, 24, title), _text(WIDTH / 2, HEIGHT - 12, x_label)]
    parts.append(_text(MARGIN, MARGIN - 12, y_label))
    for step in range(5):
        y = top * step / 4
        _, down = place(points[0][0], y)
        parts.append(_line([(MARGIN, down), (WIDTH - MARGIN, down)], "#ddd", 1))
        parts.append(_text(MARGIN - 24, down + 4, f"{y:.3g}"))
    for x in sorted({x for x, _ in points}):
        across, down = place(x, 0)
        parts.append(_text(across, down + 18, f"{x:g}"))
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_line([place(*point) for point in line.points], colour, 2))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in (place(*point) for point in line.points)
        ]
        parts.append(_text(WIDTH - MARGIN, MARGIN + 16 * index, line.name, colour))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n{body}\n</svg>\n'
    )


def _line(points: Sequence[tuple[float, float]], colour: str, width: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{colour}">{escape(text)}</text>'
    )
