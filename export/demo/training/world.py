"""The pictures to learn from: every person of the world several times, drawn once and kept as bytes."""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from export.demo import people, styles
from export.demo.people import Person, Portrait

PER_PERSON = 4
"""Pictures of one person. The first is a reference: a flat poster of them with nothing worn."""
_CHUNK = 100


@dataclass(frozen=True)
class World:
    """So many persons, the same for the same seed."""

    seed: int
    persons: int

    def person(self, index: int) -> Person:
        """One of them."""
        return people.person(random.Random(f"{self.seed}/person/{index}"))

    def portrait(self, index: int) -> Portrait:
        """Picture `index`, which shows person `index // PER_PERSON`."""
        who, chance = self.person(index // PER_PERSON), random.Random(f"{self.seed}/portrait/{index}")
        return reference(who, chance) if index % PER_PERSON == 0 else people.portrait(chance, who)

    def pairs(self, persons: int, chance: random.Random) -> list[int]:
        """Two pictures of each of some persons; the second ones come after all first ones."""
        firsts = [chance.randrange(self.persons) * PER_PERSON for _ in range(persons)]
        pairs = [chance.sample(range(first, first + PER_PERSON), 2) for first in firsts]
        return [one for pair in zip(*pairs, strict=True) for one in pair]

    @property
    def pictures(self) -> int:
        """Pictures of all persons."""
        return self.persons * PER_PERSON


def reference(who: Person, chance: random.Random) -> Portrait:
    """A picture to know somebody by: nothing worn, a flat poster; pose, expression and background are free."""
    shown = people.portrait(chance, who, "flat poster")
    return replace(shown, glasses="none", hat="none", earrings="none", tattoo="none")


def drawn(world: World, folder: Path) -> np.ndarray:
    """`[pictures, 128, 128, 3]` bytes, mapped from a file in `folder`, which is drawn where it is not whole yet."""
    path, note = folder / "pictures.npy", folder / "pictures.json"
    shape = (world.pictures, styles.SIDE, styles.SIDE, 3)
    done = json.loads(note.read_text()) if note.is_file() else {"seed": world.seed, "pictures": 0}
    if done["seed"] != world.seed:
        raise ValueError(f"{folder}: holds the world of seed {done['seed']}, not {world.seed}; name another folder")
    first = done["pictures"]
    mode = "r+" if path.is_file() and np.load(path, mmap_mode="r").shape == shape else "w+"
    first = first if mode == "r+" else 0
    if first >= world.pictures:
        return np.load(path, mmap_mode="r")
    pictures = np.lib.format.open_memmap(path, mode, np.uint8, shape)
    with multiprocessing.Pool() as pool:
        chunks = [(world, start) for start in range(first, world.pictures, _CHUNK)]
        for (_, start), levels in zip(chunks, pool.imap(_chunk, chunks), strict=True):
            pictures[start : start + len(levels)] = levels
            if start % (20 * _CHUNK) == 0:
                pictures.flush()
                note.write_text(json.dumps({"seed": world.seed, "pictures": start}))
    pictures.flush()
    note.write_text(json.dumps({"seed": world.seed, "pictures": world.pictures}))
    return np.load(path, mmap_mode="r")


def levels(pictures: np.ndarray) -> torch.Tensor:
    """`[n, height, width, 3]` bytes -> `[n, 3, height, width]`, 0 to 1, on the device of training."""
    return torch.tensor(pictures).permute(0, 3, 1, 2) / 255.0


def _chunk(job: tuple[World, int]) -> np.ndarray:
    world, start = job
    indices = range(start, min(start + _CHUNK, world.pictures))
    return np.stack([np.asarray(styles.render(world.portrait(index))) for index in indices])
