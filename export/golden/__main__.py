"""Command line: ``python -m export.golden SUBJECT --out FOLDER``; ``--help`` lists the subjects."""

import argparse
import importlib
from pathlib import Path

MAKERS = {
    "tiny": ("parity", "write_tiny"),
    "flops": ("flops", "write"),
    "half": ("half", "write"),
    "image-scales": ("image_scales", "write"),
    "lora": ("lora", "write"),
    "lora-corpus": ("lora_corpus", "write"),
    "noise": ("noise", "write"),
    "parity": ("parity", "write"),
    "pictures": ("pictures", "write"),
    "schedulers": ("schedulers", "write"),
    "tokenizer": ("tokenizer", "write"),
    "zip": ("zip", "write"),
}
"""Module and function of every subject; imported only when asked for, as each has libraries of its own."""


def main() -> None:
    """Write the chosen golden files into a folder."""
    parser = argparse.ArgumentParser(prog="python -m export.golden", description=__doc__)
    parser.add_argument("subject", choices=sorted(MAKERS), help="which numbers to make")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; existing ones are replaced")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    module, function = MAKERS[arguments.subject]
    make = getattr(importlib.import_module(f"export.golden.{module}"), function)
    for path in make(arguments.out):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
