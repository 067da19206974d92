"""What is behind a person."""

from __future__ import annotations

import random

import skia

from export.demo import people
from export.demo.pen import WHITE, Pen, colour_of, lighter, paint
from export.demo.people import Colour, Portrait


def scene(pen: Pen, what: Portrait) -> None:
    """Paints the whole background."""
    tint = people.COLOURS[what.scene_colour]
    chance = random.Random(what.grain)
    painters = {
        "a plain wall": lambda: pen.canvas.clear(colour_of(lighter(tint, 0.55))),
        "a beach": lambda: _bands(pen, [(-1.0, (150, 206, 240)), (0.0, (64, 140, 190)), (0.35, (238, 216, 160))]),
        "mountains": lambda: _mountains(pen, chance),
        "a city at night": lambda: _city(pen, chance),
        "a forest": lambda: _forest(pen, chance),
        "a starry sky": lambda: _stars(pen, chance),
        "a sunset": lambda: _sunset(pen),
    }
    painters[what.scene]()


def _bands(pen: Pen, bands: list[tuple[float, Colour]]) -> None:
    for top, colour in bands:
        pen.canvas.drawRect(skia.Rect(-1.2, top, 1.2, 1.2), paint(colour))


def _mountains(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(colour_of((186, 214, 236)))
    for base, shade in ((0.0, (130, 144, 170)), (0.35, (92, 110, 126))):
        x = -1.4
        while x < 1.4:
            width, height = chance.uniform(0.35, 0.6), chance.uniform(0.45, 0.8)
            peak = skia.Path().addPoly([(x - width, 1.0), (x, base - height), (x + width, 1.0)], True)
            pen.fill(peak, shade, 0)
            cap = [
                (x - 0.25 * width, base - 0.75 * height),
                (x, base - height),
                (x + 0.25 * width, base - 0.75 * height),
            ]
            pen.fill(skia.Path().addPoly(cap, True), WHITE, 0)
            x += width


def _city(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(colour_of((24, 26, 62)))
    x = -1.05
    while x < 1.0:
        width, top = chance.uniform(0.2, 0.34), chance.uniform(-0.75, -0.1)
        pen.canvas.drawRect(skia.Rect(x, top, x + width - 0.03, 1.2), paint((52, 54, 92)))
        for row in range(9):
            for column in range(3):
                if chance.random() < 0.55:
                    left, up = x + 0.03 + column * 0.075, top + 0.06 + row * 0.13
                    pen.canvas.drawRect(skia.Rect(left, up, left + 0.04, up + 0.06), paint((250, 216, 110)))
        x += width


def _forest(pen: Pen, chance: random.Random) -> None:
    _bands(pen, [(-1.0, (196, 224, 196)), (0.55, (84, 122, 66))])
    for _ in range(9):
        x, base = chance.uniform(-1.1, 1.1), chance.uniform(0.5, 0.75)
        pen.canvas.drawRect(skia.Rect(x - 0.03, base - 0.3, x + 0.03, base), paint((94, 66, 44)))
        for level in range(3):
            y, width = base - 0.25 - 0.28 * level, 0.24 - 0.05 * level
            tree = skia.Path().addPoly([(x - width, y), (x, y - 0.42), (x + width, y)], True)
            pen.fill(tree, (42, 98 + 12 * level, 58), 0)


def _stars(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(colour_of((18, 20, 54)))
    for _ in range(60):
        size = chance.choice((0.008, 0.012, 0.02))
        pen.oval(chance.uniform(-1, 1), chance.uniform(-1, 1), size, size, (248, 244, 214), 0)
    pen.oval(0.68, -0.7, 0.15, 0.15, (246, 238, 196), 0)


def _sunset(pen: Pen) -> None:
    for row in range(20):
        share = row / 19
        colour = tuple(round(a + share * (b - a)) for a, b in zip((96, 58, 130), (252, 168, 74), strict=True))
        pen.canvas.drawRect(skia.Rect(-1.2, -1.1 + 0.08 * row, 1.2, 1.2), paint(colour))
    pen.oval(-0.62, 0.28, 0.22, 0.22, (255, 226, 120), 0)
    _bands(pen, [(0.48, (88, 52, 96))])
