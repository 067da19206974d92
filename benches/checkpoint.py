"""What is compared in `full_size.py`: a checkpoint that a catalogue names, and what is painted with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

PROMPT = "a tronie of an old sailor with a red cap, oil on panel"
SEED = 1


class RefusedError(Exception):
    """What was asked for cannot be done here; the message says why."""


@dataclass
class Checkpoint:
    """An entry of a catalogue and where its files are."""

    folder: Path
    entry: dict

    @staticmethod
    def find(catalogue: Path, name: str) -> Checkpoint:
        """The entry `name`."""
        if not catalogue.is_file():
            raise RefusedError(f"--models {catalogue}: no such file; `python -m export random --catalogue` writes one")
        models = yaml.safe_load(catalogue.read_text(encoding="utf-8"))["models"]
        if name not in models:
            raise RefusedError(f"{name!r} is not in {catalogue}; there are: {', '.join(models)}")
        return Checkpoint(catalogue.parent, models[name])

    def files(self, weights: str) -> list[Path]:
        """The weight files of a network."""
        files = self.entry["weights"][weights]
        if not all(isinstance(file, str) for file in files):
            raise RefusedError(f"weights.{weights} are on the hub; this comparison wants a checkpoint on disk")
        return [self.folder / file for file in files]

    def every_file(self) -> list[Path]:
        """All weight files."""
        return [path for weights in self.entry["weights"] for path in self.files(weights)]

    def root(self) -> Path:
        """The checkpoint's own folder, in diffusers layout."""
        root = self.files("unet")[0].parents[1]
        if not (root / "model_index.json").is_file():
            raise RefusedError(f"{root}: no model_index.json; the equality check wants the layout of diffusers")
        return root
