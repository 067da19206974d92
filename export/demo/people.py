"""Portraits as parameters: who, what they wear, how they look, where they are, in which style; at random from a seed.

An identity is what stays when everything else changes. Its choices and measures make far more than millions of persons;
captions name the choices, pictures show both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

Colour = tuple[int, int, int]

SKINS: dict[str, Colour] = {
    "pale": (250, 226, 208),
    "fair": (240, 202, 172),
    "tanned": (218, 168, 124),
    "olive": (192, 146, 104),
    "brown": (150, 100, 66),
    "dark": (96, 62, 44),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (38, 34, 36),
    "brown": (96, 60, 36),
    "red": (186, 76, 30),
    "blond": (226, 190, 104),
    "grey": (150, 150, 152),
    "white": (232, 230, 226),
    "blue": (52, 96, 190),
    "pink": (232, 120, 166),
}
EYES: dict[str, Colour] = {
    "brown": (92, 56, 30),
    "blue": (62, 120, 190),
    "green": (74, 138, 84),
    "grey": (120, 128, 136),
}
HAIR_STYLES = ("bald", "short", "curly", "long", "bob", "bun", "mohawk", "braids")
BEARDS = ("none", "stubble", "moustache", "goatee", "full beard")
FACES = ("round", "oval", "square", "long", "heart-shaped")
NOSES = ("small", "long", "broad", "pointed")
MARKS = ("none", "freckles", "mole", "scar")

GLASSES = ("none", "round glasses", "square glasses", "sunglasses")
HATS = ("none", "cap", "top hat", "beret", "crown", "headscarf")
EARRINGS = ("none", "hoop earrings", "pearl earrings")
TATTOOS = ("none", "star tattoo", "heart tattoo")
COLOURS: dict[str, Colour] = {
    "red": (206, 46, 46),
    "blue": (44, 84, 190),
    "green": (48, 142, 76),
    "yellow": (238, 198, 48),
    "purple": (124, 64, 160),
    "black": (36, 36, 40),
    "white": (240, 240, 238),
    "orange": (238, 132, 40),
}
EXPRESSIONS = ("smiling", "serious", "surprised", "sad", "laughing")
SCENES = ("a plain wall", "a beach", "mountains", "a city at night", "a forest", "a starry sky", "a sunset")
STYLES = ("flat poster", "ink drawing", "watercolour", "pixel art", "oil painting", "sepia photograph")
LEARNT_STYLE = "chalkboard"
"""The style that the world does not have, for a LoRA to learn."""


@dataclass(frozen=True)
class Person:
    """An identity. Measures are in shares of the head's size around the middle, -1 to 1."""

    woman: bool
    old: bool
    face: str
    skin: str
    hair: str
    hair_colour: str
    eyes: str
    beard: str
    nose: str
    mark: str
    head_width: float
    jaw: float
    eye_gap: float
    eye_size: float
    eye_tilt: float
    brow_weight: float
    brow_tilt: float
    nose_length: float
    mouth_width: float
    lip: float
    ear: float
    mark_side: float


MEASURES = tuple(field.name for field in fields(Person) if field.type == "float" and field.name != "mark_side")
"""What of an identity is a number."""


@dataclass(frozen=True)
class Portrait:
    """A person in a picture. Angles are in degrees, shifts in shares of the picture's side."""

    person: Person
    glasses: str
    glasses_colour: str
    hat: str
    hat_colour: str
    earrings: str
    tattoo: str
    clothes_colour: str
    expression: str
    turn: float
    tilt: float
    shift: tuple[float, float]
    zoom: float
    scene: str
    scene_colour: str
    style: str
    grain: int
    """Seed of what a style draws at random."""


def person(chance: random.Random) -> Person:
    """An identity at random."""
    woman = chance.random() < 0.5
    old = chance.random() < 0.25
    colours = [*HAIR_COLOURS]
    if old:
        colours += ["grey", "white"] * 4
    hair = chance.choice(("short", "curly", "long", "bob", "bun", "braids") if woman else (*HAIR_STYLES[:4], "mohawk"))
    measures = {name: chance.uniform(-1.0, 1.0) for name in MEASURES}
    return Person(
        woman=woman,
        old=old,
        face=chance.choice(FACES),
        skin=chance.choice([*SKINS]),
        hair=hair,
        hair_colour=chance.choice(colours),
        eyes=chance.choice([*EYES]),
        beard="none" if woman else chance.choice(("none", *BEARDS)),
        nose=chance.choice(NOSES),
        mark=chance.choice(("none", "none", *MARKS[1:])),
        mark_side=chance.choice((-1.0, 1.0)),
        **measures,
    )


def portrait(chance: random.Random, who: Person | None = None, style: str | None = None) -> Portrait:
    """A portrait at random, of somebody and in a style where they are given."""
    who = who or person(chance)
    return Portrait(
        person=who,
        glasses=_rare(chance, GLASSES, 0.5),
        glasses_colour=chance.choice([*COLOURS]),
        hat=_rare(chance, HATS, 0.6),
        hat_colour=chance.choice([*COLOURS]),
        earrings=_rare(chance, EARRINGS, 0.4 if who.woman else 0.85),
        tattoo=_rare(chance, TATTOOS, 0.85),
        clothes_colour=chance.choice([*COLOURS]),
        expression=chance.choice(EXPRESSIONS),
        turn=chance.uniform(-1.0, 1.0),
        tilt=chance.uniform(-8.0, 8.0),
        shift=(chance.uniform(-0.04, 0.04), chance.uniform(-0.03, 0.03)),
        zoom=chance.uniform(0.92, 1.1),
        scene=chance.choice(SCENES),
        scene_colour=chance.choice([*COLOURS]),
        style=style or chance.choice(STYLES),
        grain=chance.getrandbits(32),
    )


def plain(who: Person) -> Portrait:
    """A reference picture of somebody: nothing worn, straight on, before a wall."""
    return Portrait(
        person=who,
        glasses="none",
        glasses_colour="black",
        hat="none",
        hat_colour="black",
        earrings="none",
        tattoo="none",
        clothes_colour="blue",
        expression="serious",
        turn=0.0,
        tilt=0.0,
        shift=(0.0, 0.0),
        zoom=1.0,
        scene="a plain wall",
        scene_colour="white",
        style="flat poster",
        grain=0,
    )


def restyled(what: Portrait, style: str) -> Portrait:
    """The same portrait in another style."""
    return replace(what, style=style)


def _rare(chance: random.Random, choices: tuple[str, ...], none: float) -> str:
    """None of it with some probability, else one of the others."""
    return "none" if chance.random() < none else chance.choice(choices[1:])
