"""What is compared in `full_size.py`: a checkpoint that a catalogue names, and what is painted with it."""

from __future__ import annotations

import json
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

    catalogue: Path
    entry: dict
    # In diffusers' layout; instead of the catalogue's weights where it is given.
    given: Path | None = None

    @staticmethod
    def find(catalogue: Path, name: str, given: Path | None = None) -> Checkpoint:
        """The entry `name`, with the weights in `given` if there are any."""
        if not catalogue.is_file():
            raise RefusedError(f"--models {catalogue}: no such file; `python -m export random --catalogue` writes one")
        models = yaml.safe_load(catalogue.read_text(encoding="utf-8"))["models"]
        if name not in models:
            raise RefusedError(f"{name!r} is not in {catalogue}; there are: {', '.join(models)}")
        if given and not given.is_dir():
            raise RefusedError(f"--checkpoint {given}: no such folder; it wants one in the layout of diffusers")
        return Checkpoint(catalogue, models[name], given)

    def files(self, weights: str) -> list[Path]:
        """The weight files of a network."""
        if self.given:
            return self.found(self.given / weights)
        files = self.entry["weights"][weights]
        if not all(isinstance(file, str) for file in files):
            raise RefusedError(f"weights.{weights} are on the hub; name their copy on disk with --checkpoint FOLDER")
        return [self.catalogue.parent / file for file in files]

    @staticmethod
    def found(folder: Path) -> list[Path]:
        """The weight files in a component's folder: those of its index, or the one that is there."""
        files = sorted(folder.glob("*.safetensors"))
        if indices := sorted(folder.glob("*.safetensors.index.json")):
            shards = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / shard for shard in sorted(set(shards))]
        whole = folder / "diffusion_pytorch_model.safetensors"
        if len(indices) > 1 or (not indices and len(files) != 1 and whole not in files) or not files:
            names = ", ".join(file.name for file in files) or "none"
            raise RefusedError(f"{folder}: wants one weight file or one index of shards; there are: {names}")
        return files if indices or len(files) == 1 else [whole]

    def root(self) -> Path:
        """The checkpoint's own folder, in diffusers layout."""
        root = self.given or self.files("unet")[0].parents[1]
        if not (root / "model_index.json").is_file():
            raise RefusedError(
                f"{root}: no model_index.json; the equality check wants the layout of diffusers, or --no-equality"
            )
        return root
