"""Draws a portrait as flat shapes. The picture is 2 units wide and high, the head stands around (0, -0.1)."""

from __future__ import annotations

import math

import numpy as np
import skia

from export.demo import people
from export.demo.head import Head
from export.demo.pen import Pen, darker, smooth
from export.demo.people import Portrait
from export.demo.scene import scene

SIDE = 256
"""Pixels along a side before a style reduces them."""


def draw(what: Portrait) -> np.ndarray:
    """The portrait as levels, `[SIDE, SIDE, 3]` u8."""
    surface = skia.Surface(SIDE, SIDE)
    canvas = surface.getCanvas()
    canvas.scale(SIDE / 2, SIDE / 2)
    canvas.translate(1.0, 1.0)
    pen = Pen(canvas)
    scene(pen, what)
    canvas.translate(2 * what.shift[0], 2 * what.shift[1] + 0.06)
    canvas.scale(what.zoom, what.zoom)
    head = Head(what)
    head.behind(pen)
    _body(pen, what)
    canvas.rotate(what.tilt, 0.0, 0.4)
    head.front(pen)
    return np.ascontiguousarray(surface.toarray(colorType=skia.kRGBA_8888_ColorType)[..., :3])


def _body(pen: Pen, what: Portrait) -> None:
    who = what.person
    wide = 0.8 if who.woman else 0.95
    skin = people.SKINS[who.skin]
    neck = 0.17 if who.woman else 0.22
    pen.fill(smooth([(-neck, 0.2), (neck, 0.2), (neck * 1.1, 0.8), (-neck * 1.1, 0.8)]), darker(skin, 0.88))
    cloth = people.COLOURS[what.clothes_colour]
    shoulders = [(-0.22, 0.62), (0.22, 0.62), (wide * 0.95, 0.78), (wide, 1.4), (-wide, 1.4), (-wide * 0.95, 0.78)]
    pen.fill(smooth(shoulders), cloth)
    pen.stroke(smooth([(-0.2, 0.66), (0.0, 0.86), (0.2, 0.66)], closed=False), 0.03, darker(cloth, 0.6))
    if what.tattoo != "none":
        _tattoo(pen, what.tattoo, (0.09, 0.52), 0.075)


def _tattoo(pen: Pen, kind: str, at: tuple[float, float], size: float) -> None:
    x, y = at
    if kind == "star tattoo":
        turns = [(-math.pi / 2 + i * math.pi / 5, size if i % 2 == 0 else size * 0.42) for i in range(10)]
        points = [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in turns]
        pen.fill(skia.Path().addPoly(points, True), (34, 52, 120), 0)
    else:
        heart = skia.Path()
        heart.moveTo(x, y + size)
        heart.cubicTo(x - 1.6 * size, y - 0.2 * size, x - 0.7 * size, y - 1.2 * size, x, y - 0.4 * size)
        heart.cubicTo(x + 0.7 * size, y - 1.2 * size, x + 1.6 * size, y - 0.2 * size, x, y + size)
        pen.fill(heart, (196, 34, 60), 0)
