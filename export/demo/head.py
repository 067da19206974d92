"""A head: face, hair and what is worn on it."""

from __future__ import annotations

import math

import skia

from export.demo import people
from export.demo.pen import WHITE, Pen, darker, ellipse, lighter, mixed, smooth
from export.demo.people import Portrait


class Head:
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
        """The face from the forehead to the chin."""
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
            pen.oval(side * w * 1.0, 0.0, ear * 0.75, ear, darker(self.skin, 0.93))
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
                    pen.oval(sign * (0.22 + dx) + self.look, 0.07 + dy, size, size, darker(self.skin, 0.62), 0)
        elif self.who.mark == "mole":
            pen.oval(side * 0.22 + self.look, 0.2, 0.022, 0.022, darker(self.skin, 0.35), 0)
        elif self.who.mark == "scar":
            x = side * 0.27 + self.look
            pen.stroke(
                smooth([(x, -0.02), (x + 0.03, 0.07), (x + 0.01, 0.14), (x + 0.03, 0.2)], False), 0.022, (172, 84, 84)
            )
        if self.who.old:
            for side in (-1, 1):
                fold = [(side * 0.14, 0.12), (side * 0.2, 0.18), (side * 0.22, 0.24), (side * 0.21, 0.3)]
                pen.stroke(smooth([(x + self.look, y) for x, y in fold], False), 0.012, darker(self.skin, 0.7))
            pen.stroke(
                smooth([(-0.18, -0.33), (-0.05, -0.35), (0.05, -0.35), (0.18, -0.33)], False),
                0.01,
                darker(self.skin, 0.7),
            )

    def _beard(self, pen: Pen) -> None:
        kind, h, look = self.who.beard, self.height, self.look
        if kind in ("stubble", "full beard"):
            colour = self.hair if kind == "full beard" else mixed(self.skin, self.hair, 0.35)
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
                pen.fill(smooth(half), darker(self.hair, 0.9))

    def _eyes(self, pen: Pen) -> None:
        who, mood = self.who, self.what.expression
        wide = {"surprised": 1.3, "laughing": 0.55, "sad": 0.85}.get(mood, 1.0)
        rx, ry = 0.088 * (1 + 0.18 * who.eye_size), 0.058 * (1 + 0.25 * who.eye_size) * wide
        for side in (-1, 1):
            x, y = side * self.eye_x + self.look, self.eye_y
            tilt = side * 0.02 * who.eye_tilt
            ring = [(x - rx, y - tilt), (x - 0.4 * rx, y - 1.5 * ry), (x + 0.4 * rx, y - 1.5 * ry), (x + rx, y + tilt)]
            ring += [(x + 0.4 * rx, y + 1.4 * ry), (x - 0.4 * rx, y + 1.4 * ry)]
            pen.fill(smooth(ring), WHITE)
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
            pen.stroke(smooth(brow, False), 0.03 * (1.2 + 0.6 * who.brow_weight), darker(self.hair, 0.75))

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
        pen.stroke(smooth(line, False), 0.024, darker(self.skin, 0.58))

    def _mouth(self, pen: Pen) -> None:
        who, mood, x = self.who, self.what.expression, self.look
        half, y = 0.15 * (1 + 0.18 * who.mouth_width), 0.31
        lips = (186, 62, 70) if who.woman else mixed(darker(self.skin, 0.7), (160, 60, 60), 0.4)
        weight = 0.03 * (1.15 + 0.4 * who.lip)
        if mood == "surprised":
            pen.oval(x, y + 0.02, 0.07, 0.09, (110, 34, 40), 0)
            pen.stroke(ellipse(x, y + 0.02, 0.07, 0.09), weight, lips)
        elif mood == "laughing":
            ring = [(x - half, y - 0.04), (x + half, y - 0.04), (x + half * 0.7, y + 0.13), (x - half * 0.7, y + 0.13)]
            pen.fill(smooth(ring), (110, 34, 40), 0)
            pen.oval(x, y - 0.005, half * 0.62, 0.026, WHITE, 0)
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
            pen.oval(side * w * 0.8, y + 0.01, w * 0.75, 0.07, darker(colour, 0.8))
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
                pen.oval(w * (-0.8 + 0.4 * i), -h * 0.95 - 0.06 * (i % 2), 0.035, 0.035, lighter(colour, 0.6), 0)
