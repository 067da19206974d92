"""What `tronie bench --quality` measures with: prompts, persons and styles, of a world that nothing was trained on."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from export.demo import captions, people, styles
from export.demo.people import Person, Portrait
from export.demo.training.judge import JUDGED
from export.demo.training.train_style import TRIGGER
from export.demo.training.world import World, reference

_WORLD = World(seed=2, persons=10_000)
_PROMPTS, _PERSONS, _PER_STYLE = 200, 100, 10
_COLOURFUL = tuple(style for style in people.STYLES if style not in ("ink drawing", "sepia photograph"))
"""Styles in which the colour of hair can be seen."""
_FACES = ("flat poster", "watercolour", "oil painting")
"""Styles in which persons are to be known again."""


def write(folder: Path) -> None:
    """Writes `quality.json` and the pictures that it names."""
    for part in ("persons", "styles"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    content = {
        "choices": JUDGED,
        "prompts": [_prompt(number) for number in range(_PROMPTS)],
        "persons": [_person(folder, number) for number in range(_PERSONS)],
        "styles": [_style(folder, number) for number in range(_PER_STYLE * len(people.STYLES))],
    }
    content["both"] = [_both(number, style) for number, style in enumerate(content["styles"])]
    content["loras"] = [_learnt(number) for number in range(2 * _PER_STYLE)]
    (folder / "quality.json").write_text(json.dumps(content, indent=1) + "\n")


def _prompt(number: int) -> dict:
    """A prompt that names hair, background, style and, of two in three, glasses; nothing hides the hair."""
    chance = random.Random(f"quality/prompt/{number}")
    shown = _bareheaded(people.portrait(chance, style=people.STYLES[number % len(people.STYLES)]))
    text = captions.named(shown, chance)
    expect = {"style": shown.style, "hair": shown.person.hair, "scene": shown.scene}
    if shown.glasses != "none":
        expect["glasses"] = shown.glasses
    if shown.style in _COLOURFUL and shown.person.hair != "bald":
        expect["hair_colour"] = shown.person.hair_colour
    return {"prompt": text, "seed": number, "expect": expect}


def _person(folder: Path, number: int) -> dict:
    who, chance = _WORLD.person(number), random.Random(f"quality/person/{number}")
    picture = f"persons/{number:03}.png"
    styles.render(reference(who, chance)).save(folder / picture, optimize=True)
    gallery = []
    for view in range(2):
        name = f"persons/{number:03}-{view + 1}.png"
        styles.render(replace(reference(who, chance), style=chance.choice(_FACES))).save(folder / name, optimize=True)
        gallery.append(name)
    text = f"{captions.opening(_FACES[number % len(_FACES)], chance)} {_seen(who, chance)}"
    return {"picture": picture, "gallery": gallery, "prompt": text, "seed": number}


def _style(folder: Path, number: int) -> dict:
    chance, style = random.Random(f"quality/style/{number}"), people.STYLES[number % len(people.STYLES)]
    picture = f"styles/{number:02}.png"
    styles.render(people.portrait(chance, style=style)).save(folder / picture, optimize=True)
    text = captions.caption(_bareheaded(people.portrait(chance)), chance, style=False)
    return {"picture": picture, "style": style, "prompt": text, "seed": number}


def _both(number: int, style: dict) -> dict:
    chance = random.Random(f"quality/both/{number}")
    text = f"a portrait of {_seen(_WORLD.person(number), chance)}"
    named = {"person": number, "style_picture": style["picture"], "style": style["style"]}
    return {**named, "prompt": text, "seed": number}


def _learnt(number: int) -> dict:
    chance = random.Random(f"quality/lora/{number}")
    text = captions.caption(_bareheaded(people.portrait(chance)), chance, style=False)
    named = {"lora": f"demo-{people.LEARNT_STYLE}", "style": people.LEARNT_STYLE}
    return {**named, "prompt": f"{TRIGGER} style, {text}", "seed": number}


def _seen(who: Person, chance: random.Random) -> str:
    """Somebody, of whom a prompt says no looks; nothing hides them."""
    noun, scene = "woman" if who.woman else "man", chance.choice(people.SCENES)
    return f"a {noun}, {chance.choice(('smiling', 'serious', 'laughing'))}, in front of {scene}"


def _bareheaded(shown: Portrait) -> Portrait:
    return replace(shown, hat="none")
