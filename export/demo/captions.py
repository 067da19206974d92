"""Captions: varied English from a portrait's parameters, saying some of them and never one that is not there."""

from __future__ import annotations

import random

from export.demo.people import Person, Portrait

_STYLES = {
    "flat poster": ("a flat poster of", "a poster, flat colours, of", "a poster portrait of"),
    "ink drawing": ("an ink drawing of", "a black and white ink drawing of", "ink on paper,"),
    "watercolour": ("a watercolour of", "a watercolour painting of", "a soft watercolour portrait of"),
    "pixel art": ("pixel art of", "a pixel art portrait of", "an 8-bit pixel picture of"),
    "oil painting": ("an oil painting of", "a portrait in oil of", "oil on canvas,"),
    "sepia photograph": ("a sepia photograph of", "an old sepia photo of", "a faded sepia portrait of"),
}
_NO_STYLE = ("a portrait of", "a picture of", "the face of")
_EXPRESSIONS = {
    "smiling": ("smiling", "with a smile"),
    "serious": ("serious", "with a serious look"),
    "surprised": ("surprised", "with open mouth, surprised"),
    "sad": ("sad", "looking sad"),
    "laughing": ("laughing", "with a big laugh"),
}
_HAIR = {
    "short": "short {colour} hair",
    "curly": "curly {colour} hair",
    "long": "long {colour} hair",
    "bob": "a {colour} bob",
    "bun": "{colour} hair in a bun",
    "mohawk": "a {colour} mohawk",
    "braids": "{colour} braids",
}


def caption(what: Portrait, chance: random.Random, style: bool = True, looks: float = 0.75) -> str:
    """One of the many captions of a portrait; each look of the person is named with probability `looks`."""
    who = what.person
    traits = [text for text in _looks(who, chance) if chance.random() < looks]
    traits += [text for text in _worn(what, chance) if chance.random() < 0.75]
    chance.shuffle(traits)
    start = opening(what.style if style else None, chance)
    scene = chance.choice((" before {}", ", {} behind", " in front of {}", ", background: {}")).format(what.scene)
    text = f"{start} {_subject(who, chance)}"
    if traits:
        text += f" with {_joined(traits, chance)}"
    if chance.random() < 0.6:
        text += f", {chance.choice(_EXPRESSIONS[what.expression])}"
    if chance.random() < 0.7:
        text += scene
    return text


def named(what: Portrait, chance: random.Random) -> str:
    """A caption that names hair, glasses, background and style for certain, and a beard; no more."""
    found = _looks(what.person, chance)[: (what.person.hair != "bald") + (what.person.beard != "none")]
    if what.glasses != "none":
        found.append(_glasses(what, shape=True))
    traits = f" with {_joined(found, chance)}" if found else ""
    return f"{opening(what.style, chance)} {_subject(what.person, chance)}{traits} in front of {what.scene}"


def opening(style: str | None, chance: random.Random) -> str:
    """How a caption begins in a style, or in none."""
    return chance.choice(_STYLES[style] if style else _NO_STYLE)


def _glasses(what: Portrait, shape: bool) -> str:
    if what.glasses == "sunglasses":
        return "sunglasses"
    return f"{what.glasses_colour} {what.glasses if shape else 'glasses'}"


def _subject(who: Person, chance: random.Random) -> str:
    noun = chance.choice(("woman", "lady") if who.woman else ("man", "gentleman"))
    words = [word for word, true in (("old", who.old), ("bald", who.hair == "bald")) if true]
    if chance.random() < 0.3:
        words.append({"dark": "dark-skinned", "pale": "pale"}.get(who.skin, f"{who.skin}-skinned"))
    phrase = " ".join([*words, noun])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _looks(who: Person, chance: random.Random) -> list[str]:
    found = []
    if who.hair != "bald":
        found.append(_HAIR[who.hair].format(colour=who.hair_colour))
    if who.beard != "none":
        colour = f"{who.hair_colour} " if chance.random() < 0.4 else ""
        found.append(who.beard if who.beard == "stubble" else f"a {colour}{who.beard}")
    if who.mark != "none":
        found.append(who.mark if who.mark == "freckles" else f"a {who.mark}")
    if chance.random() < 0.3:
        found.append(f"{who.eyes} eyes")
    return found


def _worn(what: Portrait, chance: random.Random) -> list[str]:
    found = []
    if what.glasses != "none":
        found.append(_glasses(what, shape=chance.random() < 0.75))
    if what.hat != "none":
        found.append(f"a {what.hat_colour} {what.hat}" if what.hat != "crown" else "a golden crown")
    if what.earrings != "none":
        found.append(what.earrings if chance.random() < 0.5 else "earrings")
    if what.tattoo != "none":
        found.append(f"a {what.tattoo}")
    if chance.random() < 0.5:
        found.append(f"{_article(what.clothes_colour)} {chance.choice(('shirt', 'sweater', 'coat'))}")
    return found


def _article(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def _joined(parts: list[str], chance: random.Random) -> str:
    last = chance.choice((" and ", ", "))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{last}{parts[-1]}"
