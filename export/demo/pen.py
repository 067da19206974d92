"""Shapes and colours that portraits are drawn with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import skia

from export.demo.people import Colour

INK: Colour = (40, 32, 34)
WHITE: Colour = (252, 250, 246)


class Pen:
    """A canvas with the few shapes that a face needs."""

    def __init__(self, canvas: skia.Canvas) -> None:
        self.canvas = canvas

    def fill(self, path: skia.Path, colour: Colour, line: float = 0.012) -> None:
        """A shape with an outline; a line of 0 leaves it out."""
        self.canvas.drawPath(path, paint(colour))
        if line:
            self.stroke(path, line, darker(colour, 0.55))

    def stroke(self, path: skia.Path, width: float, colour: Colour = INK) -> None:
        """A line with round ends."""
        brush = paint(colour)
        brush.setStyle(skia.Paint.kStroke_Style)
        brush.setStrokeWidth(width)
        brush.setStrokeCap(skia.Paint.kRound_Cap)
        brush.setStrokeJoin(skia.Paint.kRound_Join)
        self.canvas.drawPath(path, brush)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour, line: float = 0.012) -> None:
        """An ellipse around (x, y)."""
        self.fill(ellipse(x, y, rx, ry), colour, line)


def ellipse(x: float, y: float, rx: float, ry: float) -> skia.Path:
    """An ellipse around (x, y)."""
    return skia.Path().addOval(skia.Rect(x - rx, y - ry, x + rx, y + ry))


def smooth(points: Iterable[tuple[float, float]], closed: bool = True) -> skia.Path:
    """A curve through the middles of the points' sides, with the points as handles."""
    ring = list(points)
    path = skia.Path()
    if closed:
        middles = [_middle(a, b) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)]
        path.moveTo(*middles[-1])
        for point, middle in zip(ring, middles, strict=True):
            path.quadTo(*point, *middle)
        path.close()
        return path
    path.moveTo(*ring[0])
    for point, after in itertools.pairwise(ring[1:-1]):
        path.quadTo(*point, *_middle(point, after))
    path.quadTo(*ring[-2], *ring[-1])
    return path


def _middle(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def colour_of(colour: Colour) -> int:
    """A colour as skia writes it."""
    return skia.Color(*colour)


def paint(colour: Colour) -> skia.Paint:
    """What fills with a colour."""
    return skia.Paint(Color=colour_of(colour), AntiAlias=True)


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """A colour between two."""
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


def darker(colour: Colour, share: float) -> Colour:
    """A colour with a share of its light."""
    return tuple(round(x * share) for x in colour)


def lighter(colour: Colour, share: float) -> Colour:
    """A colour mixed with white."""
    return mixed(colour, (255, 255, 255), share)
