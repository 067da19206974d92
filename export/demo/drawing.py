"""Draws a portrait as flat shapes, in units in which the picture is 2 wide and high and the head stands around (0, -0.1)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import skia

from export.demo import people
from export.demo.people import Colour, Portrait

SIDE = 256
"""Pixels along a side before a style reduces them."""
INK: Colour = (40, 32, 34)
_WHITE: Colour = (252, 250, 246)


class Pen:
    """A canvas with the few shapes that a face needs."""

    def __init__(self, canvas: skia.Canvas) -> None:
        self.canvas = canvas

    def fill(self, path: skia.Path, colour: Colour, line: float = 0.012) -> None:
        """A shape with an outline; a line of 0 leaves it out."""
        self.canvas.drawPath(path, _paint(colour))
        if line:
            self.stroke(path, line, _darker(colour, 0.55))

    def stroke(self, path: skia.Path, width: float, colour: Colour = INK) -> None:
        """A line with round ends."""
        paint = _paint(colour)
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(width)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        paint.setStrokeJoin(skia.Paint.kRound_Join)
        self.canvas.drawPath(path, paint)

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
    for point, after in zip(ring[1:-2], ring[2:-1], strict=True):
        path.quadTo(*point, *_middle(point, after))
    path.quadTo(*ring[-2], *ring[-1])
    return path


def draw(what: Portrait) -> np.ndarray:
    """The portrait as levels, `[SIDE, SIDE, 3]` u8."""
    surface = skia.Surface(SIDE, SIDE)
    canvas = surface.getCanvas()
    canvas.scale(SIDE / 2, SIDE / 2)
    canvas.translate(1.0, 1.0)
    pen = Pen(canvas)
    _scene(pen, what)
    canvas.translate(2 * what.shift[0], 2 * what.shift[1] + 0.06)
    canvas.scale(what.zoom, what.zoom)
    head = _Head(what)
    head.behind(pen)
    _body(pen, what)
    canvas.rotate(what.tilt, 0.0, 0.4)
    head.front(pen)
    return np.ascontiguousarray(surface.toarray(colorType=skia.kRGBA_8888_ColorType)[..., :3])


def _scene(pen: Pen, what: Portrait) -> None:
    tint = people.COLOURS[what.scene_colour]
    chance = random.Random(what.grain)
    painters = {
        "a plain wall": lambda: pen.canvas.clear(_colour(_lighter(tint, 0.55))),
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
        pen.canvas.drawRect(skia.Rect(-1.2, top, 1.2, 1.2), _paint(colour))


def _mountains(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(_colour((186, 214, 236)))
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
            pen.fill(skia.Path().addPoly(cap, True), _WHITE, 0)
            x += width


def _city(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(_colour((24, 26, 62)))
    x = -1.05
    while x < 1.0:
        width, top = chance.uniform(0.2, 0.34), chance.uniform(-0.75, -0.1)
        pen.canvas.drawRect(skia.Rect(x, top, x + width - 0.03, 1.2), _paint((52, 54, 92)))
        for row in range(9):
            for column in range(3):
                if chance.random() < 0.55:
                    left, up = x + 0.03 + column * 0.075, top + 0.06 + row * 0.13
                    pen.canvas.drawRect(skia.Rect(left, up, left + 0.04, up + 0.06), _paint((250, 216, 110)))
        x += width


def _forest(pen: Pen, chance: random.Random) -> None:
    _bands(pen, [(-1.0, (196, 224, 196)), (0.55, (84, 122, 66))])
    for _ in range(9):
        x, base = chance.uniform(-1.1, 1.1), chance.uniform(0.5, 0.75)
        pen.canvas.drawRect(skia.Rect(x - 0.03, base - 0.3, x + 0.03, base), _paint((94, 66, 44)))
        for level in range(3):
            y, width = base - 0.25 - 0.28 * level, 0.24 - 0.05 * level
            tree = skia.Path().addPoly([(x - width, y), (x, y - 0.42), (x + width, y)], True)
            pen.fill(tree, (42, 98 + 12 * level, 58), 0)


def _stars(pen: Pen, chance: random.Random) -> None:
    pen.canvas.clear(_colour((18, 20, 54)))
    for _ in range(60):
        size = chance.choice((0.008, 0.012, 0.02))
        pen.oval(chance.uniform(-1, 1), chance.uniform(-1, 1), size, size, (248, 244, 214), 0)
    pen.oval(0.68, -0.7, 0.15, 0.15, (246, 238, 196), 0)


def _sunset(pen: Pen) -> None:
    for row in range(20):
        share = row / 19
        colour = tuple(round(a + share * (b - a)) for a, b in zip((96, 58, 130), (252, 168, 74), strict=True))
        pen.canvas.drawRect(skia.Rect(-1.2, -1.1 + 0.08 * row, 1.2, 1.2), _paint(colour))
    pen.oval(-0.62, 0.28, 0.22, 0.22, (255, 226, 120), 0)
    _bands(pen, [(0.48, (88, 52, 96))])


def _body(pen: Pen, what: Portrait) -> None:
    who = what.person
    wide = 0.8 if who.woman else 0.95
    skin = people.SKINS[who.skin]
    neck = 0.17 if who.woman else 0.22
    pen.fill(smooth([(-neck, 0.2), (neck, 0.2), (neck * 1.1, 0.8), (-neck * 1.1, 0.8)]), _darker(skin, 0.88))
    cloth = people.COLOURS[what.clothes_colour]
    shoulders = [(-0.22, 0.62), (0.22, 0.62), (wide * 0.95, 0.78), (wide, 1.4), (-wide, 1.4), (-wide * 0.95, 0.78)]
    pen.fill(smooth(shoulders), cloth)
    pen.stroke(smooth([(-0.2, 0.66), (0.0, 0.86), (0.2, 0.66)], closed=False), 0.03, _darker(cloth, 0.6))
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


class _Head:
    """What is fixed to a head; `look` moves features to the side that it turns to."""

    def __init__(self, what: Portrait) -> None:
        self.what, self.who = what, what.person
        who = self.who
        base = {"round": (0.47, 0.5), "oval": (0.43, 0.56), "square": (0.46, 0.54), "long": (0.39, 0.6)}
        width, height = base.get(who.face, (0.46, 0.56))
        self.width = width * (1 + 0.09 * who.head_width)
        self.height = height
        self.look = 0.07 * what.turn
        self.skin = people.SKINS[who.skin]
        self.hair = people.HAIR_COLOURS[who.hair_colour]
        self.brow = -0.2
        self.eye_y = -0.1
        self.eye_x = 0.185 * (1 + 0.14 * who.eye_gap)

    def outline(self) -> skia.Path:
        jaw = {"square": 0.86, "round": 0.74, "heart-shaped": 0.5, "long": 0.66}.get(self.who.face, 0.62)
        jaw = self.width * (jaw + 0.08 * self.who.jaw)
        w, h = self.width, self.height
        chin = {"heart-shaped": 0.12, "square": 0.34}.get(self.who.face, 0.2)
        right = [(w * 0.7, -h * 1.08), (w * 1.08, -h * 0.5), (w * 1.04, h * 0.25), (jaw, h * 0.78), (chin, h * 1.04)]
        return smooth([*right, *[(-x, y) for x, y in reversed(right)]])

    def behind(self, pen: Pen) -> None:
        """Hair that falls behind the shoulders."""
        w, h = self.width, self.height
        if self.who.hair == "long":
            pen.fill(
                smooth([(-w * 1.25, -h * 1.2), (w * 1.25, -h * 1.2), (w * 1.4, 1.15), (-w * 1.4, 1.15)]), self.hair
            )
        elif self.who.hair == "bob":
            pen.fill(
                smooth([(-w * 1.3, -h * 1.2), (w * 1.3, -h * 1.2), (w * 1.45, h * 0.9), (-w * 1.45, h * 0.9)]),
                self.hair,
            )
        elif self.who.hair == "curly":
            for i in range(11):
                angle = math.pi * (0.85 + 1.3 * i / 10)
                pen.oval(w * 1.02 * math.cos(angle), h * 0.9 * math.sin(angle) - 0.02, 0.19, 0.19, self.hair)
        elif self.who.hair == "bun":
            pen.oval(0.0, -h * 1.15, 0.2, 0.18, self.hair)
        elif self.who.hair == "braids":
            for side in (-1, 1):
                for i in range(6):
                    pen.oval(side * (w * 1.05 + 0.015 * i), 0.02 + 0.14 * i, 0.085, 0.1, self.hair)

    def front(self, pen: Pen) -> None:
        """The head with everything on it."""
        w, ear = self.width, 0.1 * (1 + 0.3 * self.who.ear)
        for side in (-1, 1):
            pen.oval(side * w * 1.0, 0.0, ear * 0.75, ear, _darker(self.skin, 0.93))
            self._earring(pen, side)
        pen.fill(self.outline(), self.skin)
        self._marks(pen)
        self._beard(pen)
        self._eyes(pen)
        self._nose(pen)
        self._mouth(pen)
        self._hair(pen)
        self._glasses(pen)
        self._hat(pen)

    def _earring(self, pen: Pen, side: int) -> None:
        x, y = side * self.width * 1.02, 0.13
        if self.what.earrings == "hoop earrings":
            pen.stroke(ellipse(x, y + 0.07, 0.06, 0.075), 0.022, (222, 176, 56))
        elif self.what.earrings == "pearl earrings":
            pen.oval(x, y + 0.02, 0.045, 0.045, (244, 240, 232))

    def _marks(self, pen: Pen) -> None:
        side = self.who.mark_side
        if self.who.mark == "freckles":
            for i, (dx, dy) in enumerate(((0, 0), (0.06, 0.03), (-0.05, 0.04), (0.02, 0.08), (0.09, -0.02))):
                for sign in (-1, 1):
                    size = 0.011 + 0.002 * (i % 2)
                    pen.oval(sign * (0.22 + dx) + self.look, 0.07 + dy, size, size, _darker(self.skin, 0.62), 0)
        elif self.who.mark == "mole":
            pen.oval(side * 0.22 + self.look, 0.2, 0.022, 0.022, _darker(self.skin, 0.35), 0)
        elif self.who.mark == "scar":
            x = side * 0.27 + self.look
            pen.stroke(
                smooth([(x, -0.02), (x + 0.03, 0.07), (x + 0.01, 0.14), (x + 0.03, 0.2)], False), 0.022, (172, 84, 84)
            )
        if self.who.old:
            for side in (-1, 1):
                fold = [(side * 0.14, 0.12), (side * 0.2, 0.18), (side * 0.22, 0.24), (side * 0.21, 0.3)]
                pen.stroke(smooth([(x + self.look, y) for x, y in fold], False), 0.012, _darker(self.skin, 0.7))
            pen.stroke(
                smooth([(-0.18, -0.33), (-0.05, -0.35), (0.05, -0.35), (0.18, -0.33)], False),
                0.01,
                _darker(self.skin, 0.7),
            )

    def _beard(self, pen: Pen) -> None:
        kind, h, look = self.who.beard, self.height, self.look
        if kind in ("stubble", "full beard"):
            colour = self.hair if kind == "full beard" else _mixed(self.skin, self.hair, 0.35)
            w, low = self.width, h * (1.12 if kind == "full beard" else 0.98)
            ring = [
                (-w * 0.98, 0.08),
                (-w * 0.8, h * 0.8),
                (-0.18, low),
                (0.18, low),
                (w * 0.8, h * 0.8),
                (w * 0.98, 0.08),
            ]
            inner = [(0.22 + look, 0.2), (0.0 + look, 0.13), (-0.22 + look, 0.2)]
            pen.fill(smooth([*ring, *inner]), colour, 0.012 if kind == "full beard" else 0)
        elif kind == "goatee":
            pen.oval(look, h * 0.88, 0.13, 0.15, self.hair)
        if kind in ("moustache", "full beard"):
            for side in (-1, 1):
                half = [(look, 0.19), (look + side * 0.12, 0.16), (look + side * 0.24, 0.27), (look + side * 0.1, 0.26)]
                pen.fill(smooth(half), _darker(self.hair, 0.9))

    def _eyes(self, pen: Pen) -> None:
        who, mood = self.who, self.what.expression
        wide = {"surprised": 1.3, "laughing": 0.55, "sad": 0.85}.get(mood, 1.0)
        rx, ry = 0.088 * (1 + 0.18 * who.eye_size), 0.058 * (1 + 0.25 * who.eye_size) * wide
        for side in (-1, 1):
            x, y = side * self.eye_x + self.look, self.eye_y
            tilt = side * 0.02 * who.eye_tilt
            ring = [(x - rx, y - tilt), (x - 0.4 * rx, y - 1.5 * ry), (x + 0.4 * rx, y - 1.5 * ry), (x + rx, y + tilt)]
            ring += [(x + 0.4 * rx, y + 1.4 * ry), (x - 0.4 * rx, y + 1.4 * ry)]
            pen.fill(smooth(ring), _WHITE)
            pupil = x + 0.35 * self.look
            pen.oval(pupil, y, 0.046, min(0.046, ry), people.EYES[who.eyes], 0)
            pen.oval(pupil, y, 0.022, min(0.022, ry), (22, 20, 22), 0)
            lift = {"surprised": -0.06, "sad": 0.0, "serious": 0.02}.get(mood, -0.01)
            slope = 0.03 * who.brow_tilt + (0.05 if mood == "sad" else 0.0)
            y = self.brow + lift
            brow = [
                (x - side * 0.11, y - slope),
                (x - side * 0.04, y - 0.03),
                (x + side * 0.04, y - 0.03),
                (x + side * 0.12, y + slope),
            ]
            pen.stroke(smooth(brow, False), 0.03 * (1.2 + 0.6 * who.brow_weight), _darker(self.hair, 0.75))

    def _nose(self, pen: Pen) -> None:
        who, x = self.who, self.look * 1.5
        length = {"long": 0.22, "small": 0.1, "pointed": 0.17}.get(who.nose, 0.15) * (1 + 0.12 * who.nose_length)
        wide = {"broad": 0.1, "small": 0.05, "pointed": 0.045}.get(who.nose, 0.065)
        y = self.eye_y + 0.06
        line = [
            (x - 0.02, y),
            (x - wide, y + length * 0.8),
            (x - wide * 0.6, y + length),
            (x + wide * 0.3, y + length),
            (x + wide, y + length * 0.9),
        ]
        pen.stroke(smooth(line, False), 0.024, _darker(self.skin, 0.58))

    def _mouth(self, pen: Pen) -> None:
        who, mood, x = self.who, self.what.expression, self.look
        half, y = 0.15 * (1 + 0.18 * who.mouth_width), 0.31
        lips = (186, 62, 70) if who.woman else _mixed(_darker(self.skin, 0.7), (160, 60, 60), 0.4)
        weight = 0.03 * (1.15 + 0.4 * who.lip)
        if mood == "surprised":
            pen.oval(x, y + 0.02, 0.07, 0.09, (110, 34, 40), 0)
            pen.stroke(ellipse(x, y + 0.02, 0.07, 0.09), weight, lips)
        elif mood == "laughing":
            ring = [(x - half, y - 0.04), (x + half, y - 0.04), (x + half * 0.7, y + 0.13), (x - half * 0.7, y + 0.13)]
            pen.fill(smooth(ring), (110, 34, 40), 0)
            pen.oval(x, y - 0.005, half * 0.62, 0.026, _WHITE, 0)
            pen.stroke(smooth(ring), weight * 0.8, lips)
        else:
            bend = {"smiling": 0.09, "sad": -0.07}.get(mood, 0.0)
            line = [
                (x - half, y - bend * 0.5),
                (x - half * 0.4, y + bend),
                (x + half * 0.4, y + bend),
                (x + half, y - bend * 0.5),
            ]
            pen.stroke(smooth(line, False), weight * 1.25, lips)

    def _hair(self, pen: Pen) -> None:
        kind, w, h = self.who.hair, self.width, self.height
        if kind == "bald":
            return
        if kind == "mohawk":
            for i in range(5):
                x = -0.12 + 0.06 * i
                spike = [(x - 0.07, -h * 0.78), (x, -h * 1.35), (x + 0.07, -h * 0.78)]
                pen.fill(skia.Path().addPoly(spike, True), self.hair)
            return
        side = 1 if self.who.mark_side > 0 else -1
        low = {"short": -0.22, "bun": -0.28, "curly": -0.24}.get(kind, -0.12)
        top = [(-w * 1.12, low), (-w * 1.12, -h * 0.95), (0.0, -h * 1.42), (w * 1.12, -h * 0.95), (w * 1.12, low)]
        fringe = [(w * 0.85, -h * 0.62), (side * 0.14, -h * 0.72), (-side * 0.1, -h * 0.5), (-w * 0.85, -h * 0.6)]
        pen.fill(smooth([*top, *fringe]), self.hair)
        if kind == "curly":
            for i in range(7):
                x = w * (-0.9 + 0.3 * i)
                pen.oval(x, -h * 0.86 - 0.1 * math.cos(x * 3), 0.13, 0.12, self.hair)

    def _glasses(self, pen: Pen) -> None:
        kind = self.what.glasses
        if kind == "none":
            return
        colour = people.COLOURS[self.what.glasses_colour] if kind != "sunglasses" else (24, 24, 28)
        for side in (-1, 1):
            x, y = side * self.eye_x * 1.04 + self.look, self.eye_y + 0.01
            frame = ellipse(x, y, 0.15, 0.13)
            if kind == "square glasses":
                frame = skia.Path().addRoundRect(skia.Rect(x - 0.15, y - 0.11, x + 0.15, y + 0.11), 0.03, 0.03)
            if kind == "sunglasses":
                pen.fill(frame, (34, 34, 42), 0)
            pen.stroke(frame, 0.04, colour)
            pen.stroke(
                smooth([(x + side * 0.15, y), (x + side * 0.2, y - 0.01), (side * self.width, y - 0.03)], False),
                0.03,
                colour,
            )
        pen.stroke(
            smooth(
                [(-0.05 + self.look, self.eye_y), (self.look, self.eye_y - 0.03), (0.05 + self.look, self.eye_y)], False
            ),
            0.035,
            colour,
        )

    def _hat(self, pen: Pen) -> None:
        kind, w, h = self.what.hat, self.width, self.height
        if kind == "none":
            return
        colour = people.COLOURS[self.what.hat_colour]
        y = -h * 0.62
        if kind == "crown":
            points = [
                (-w, y),
                (-w * 1.05, y - 0.34),
                (-w * 0.5, y - 0.16),
                (0, y - 0.42),
                (w * 0.5, y - 0.16),
                (w * 1.05, y - 0.34),
                (w, y),
            ]
            pen.fill(skia.Path().addPoly(points, True), (236, 190, 60))
        elif kind == "top hat":
            pen.fill(skia.Path().addRect(skia.Rect(-w * 0.85, y - 0.52, w * 0.85, y)), colour)
            pen.oval(0.0, y, w * 1.35, 0.07, colour)
        elif kind == "cap":
            pen.fill(
                smooth([(-w * 1.14, y + 0.04), (-w * 1.1, y - 0.4), (w * 1.1, y - 0.4), (w * 1.14, y + 0.04)]), colour
            )
            side = 1 if self.what.turn >= 0 else -1
            pen.oval(side * w * 0.8, y + 0.01, w * 0.75, 0.07, _darker(colour, 0.8))
        elif kind == "beret":
            pen.fill(
                smooth(
                    [
                        (-w * 1.25, y + 0.02),
                        (-w * 1.3, y - 0.3),
                        (w * 0.9, y - 0.42),
                        (w * 1.5, y - 0.1),
                        (w * 1.0, y + 0.05),
                    ]
                ),
                colour,
            )
            pen.oval(0.05, y - 0.33, 0.035, 0.035, colour)
        else:
            scarf = [(-w * 1.2, 0.05), (-w * 1.2, -h * 1.0), (0.0, -h * 1.42), (w * 1.2, -h * 1.0), (w * 1.2, 0.05)]
            pen.fill(smooth([*scarf, (w * 0.9, -h * 0.55), (0.0, -h * 0.72), (-w * 0.9, -h * 0.55)]), colour)
            for i in range(5):
                pen.oval(w * (-0.8 + 0.4 * i), -h * 0.95 - 0.06 * (i % 2), 0.035, 0.035, _lighter(colour, 0.6), 0)


def _middle(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def _colour(colour: Colour) -> int:
    return skia.Color(*colour)


def _paint(colour: Colour) -> skia.Paint:
    return skia.Paint(Color=_colour(colour), AntiAlias=True)


def _mixed(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


def _darker(colour: Colour, share: float) -> Colour:
    return tuple(round(x * share) for x in colour)


def _lighter(colour: Colour, share: float) -> Colour:
    return _mixed(colour, (255, 255, 255), share)
