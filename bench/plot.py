#!/usr/bin/env python3
"""Draws what gpu_forward.py or gpu_backward.py --json wrote: TFLOP/s against length, a panel for each head dim and mask.

plot.py FILE.json OUT.svg      the ceiling of each panel is a bf16 product by cuBLAS in the same run; needs no package
"""

import argparse
import json
from html import escape
from itertools import groupby
from pathlib import Path

PANEL_WIDTH, PANEL_HEIGHT = 300, 220
LEFT, TOP, GAP = 52, 58, 34
COLOURS = {"Attune": "#0b62a4", "cuDNN": "#c85200", "FA2": "#5f9e33", "xFormers": "#8a8a8a"}


class Panel:
    """One chart: x is the logarithm of the length, y TFLOP/s from 0 to a little over the ceiling."""

    def __init__(self, column, row, lengths, ceiling):
        self.x0 = LEFT + column * (PANEL_WIDTH + GAP)
        self.y0 = TOP + row * (PANEL_HEIGHT + GAP + 20)
        self.lengths, self.top = lengths, ceiling * 1.08

    def x(self, length):
        place = self.lengths.index(length) / max(len(self.lengths) - 1, 1)
        return self.x0 + 12 + place * (PANEL_WIDTH - 24)

    def y(self, tflops):
        return self.y0 + PANEL_HEIGHT * (1 - tflops / self.top)

    def frame(self, title, ceiling):
        yield f'<rect x="{self.x0}" y="{self.y0}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" class="frame"/>'
        yield text(self.x0, self.y0 - 8, title, "title")
        for tick in range(0, int(self.top), 200):
            y = self.y(tick)
            yield f'<line x1="{self.x0}" x2="{self.x0 + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            yield text(self.x0 - 6, y + 4, str(tick), "left")
        y = self.y(ceiling)
        yield f'<line x1="{self.x0}" x2="{self.x0 + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="ceiling"/>'
        for length in self.lengths:
            yield text(self.x(length), self.y0 + PANEL_HEIGHT + 16, str(length), "below")

    def curve(self, name, points):
        """(length, TFLOP/s) in order."""
        colour, width = COLOURS[name], 2.5 if name == "Attune" else 1.5
        path = " ".join(f"{self.x(length):.1f},{self.y(speed):.1f}" for length, speed in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        for length, speed in points:
            yield f'<circle cx="{self.x(length):.1f}" cy="{self.y(speed):.1f}" r="{width + 0.5}" fill="{colour}"/>'


def text(x, y, content, kind):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def picture(report):
    ceiling = report["matmul_tflops"]
    rows = [row for row in report["rows"] if "length" in row]
    lengths = sorted({row["length"] for row in rows})
    head_dims = sorted({row["head_dim"] for row in rows})
    masks = sorted({row["causal"] for row in rows})
    width = LEFT + len(head_dims) * (PANEL_WIDTH + GAP)
    height = TOP + len(masks) * (PANEL_HEIGHT + GAP + 20) + 4
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    yield (
        "<style>.frame{fill:none;stroke:#999}.grid{stroke:#ddd}.ceiling{stroke:#333;stroke-dasharray:5 4}"
        ".title{font-weight:bold}.left{text-anchor:end}.below{text-anchor:middle}</style>"
    )
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    yield text(LEFT, 20, f"{report['direction']}, TFLOP/s against length; {report['device']}", "title")
    x = LEFT + 420
    for name, colour in COLOURS.items():
        yield f'<line x1="{x}" x2="{x + 20}" y1="16" y2="16" stroke="{colour}" stroke-width="3"/>'
        yield text(x + 25, 20, name, "legend")
        x += 95
    yield f'<line x1="{x}" x2="{x + 20}" y1="16" y2="16" class="ceiling"/>'
    yield text(x + 25, 20, "cuBLAS product", "legend")
    key = lambda row: (row["head_dim"], row["causal"])
    for (head_dim, causal), group in groupby(sorted(rows, key=lambda row: (*key(row), row["length"])), key):
        group = list(group)
        panel = Panel(head_dims.index(head_dim), masks.index(causal), lengths, ceiling)
        yield from panel.frame(f"head dim {head_dim}, {'causal' if causal else 'no mask'}", ceiling)
        for peer in (name for name in COLOURS if name in group[0]["peers"]):
            points = [(row["length"], row["peers"][peer]) for row in group if row["peers"][peer] is not None]
            yield from panel.curve(peer, points)
        yield from panel.curve("Attune", [(row["length"], row["tflops"]) for row in group])
    yield "</svg>"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.write_text("\n".join(picture(json.loads(arguments.file.read_text()))) + "\n")


if __name__ == "__main__":
    main()
