"""`python -m export variants`: enters the published variants and LoRAs of a model that come with this program."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from export import catalogue
from export.errors import ExportError

CONFIGS = Path(__file__).parent / "configs"
FILE = "variants.json"


def described() -> list[str]:
    """Models whose variants are described beside their configs."""
    return sorted(path.parent.name for path in CONFIGS.glob(f"*/{FILE}"))


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    path = args.out / "models.yaml"
    base = catalogue.models(path).get(args.source)
    if base is None:
        raise ExportError(f"{path} has no {args.source}; export it first: python -m export graphs {args.source}")
    for section, name, entry in entries(args.source, base["family"]):
        catalogue.put(path, name, entry, section)
        print(f"{path}: {name}")
    return 0


def entries(model: str, family: str) -> Iterator[tuple[str, str, dict]]:
    """Section, name and entry of everything that is published for a model of a family."""
    for published in json.loads((CONFIGS / model / FILE).read_text(encoding="utf-8")):
        repo, licence = published["repo"], published["licence"]
        for section in ("models", "loras"):
            for name, about in published[section].items():
                file = {"repo": repo, "file": about["file"]}
                if section == "models":
                    entry = {"like": model, "origin": repo, "licence": licence, "weights": {"unet": [file]}}
                else:
                    entry = {"family": family, "file": file, "licence": licence}
                entry["scheduler"] = {**published["scheduler"], **about.get("scheduler", {})}
                entry["defaults"] = {"steps": about["steps"], **published["defaults"]}
                entry["distilled_steps"] = about["steps"]
                yield section, name, entry
