"""One export from start to end: read, trace, lower, write, and check when asked."""

from __future__ import annotations

import argparse
from pathlib import Path

from export import add_adapter, build, catalogue, sdxl
from export.dialects import DIALECTS
from export.errors import ExportError
from export.source import Declared, Source, open_source

CONFIGS = Path(__file__).parent / "configs"


def export(args: argparse.Namespace) -> int:
    """`python -m export model` and `graphs`; returns the exit status."""
    name = args.name or args.source
    catalogue.check_name(name)
    if args.steps is not None and args.steps < 1:
        raise ExportError(f"--steps {args.steps}: must be 1 or more")
    if args.command == "graphs":
        source: Source = Declared(CONFIGS / args.source)
        licence = source.licence
    else:
        source, licence = open_source(args.source, args.variant, args.revision), args.licence
    checkpoint = sdxl.read(source)
    checkpoint.weights()
    dialects = list(DIALECTS) if args.dialect == "all" else [args.dialect]
    built = build.all_of(checkpoint, dialects)
    if getattr(args, "verify", False):
        from export import verify

        if not verify.check(checkpoint, built):
            return 1
    paths = build.write(built, args.out, name)
    entry = sdxl.entry(checkpoint, args.out, paths, args.steps, args.guidance)
    if args.command == "graphs" and checkpoint.sees_pictures:
        entry = add_adapter.published(CONFIGS / args.source, entry, dialects, args.out, name)
    if licence:
        entry = _after(entry, "origin", "licence", licence)
    path = args.out / "models.yaml"
    before = catalogue.models(path).get(name, {}) if path.exists() else {}
    catalogue.put(path, name, entry)
    print(f"{path}: {name}")
    # Their graphs may not fit the model any more, so they are left out, and not in silence.
    if lost := [adapter for adapter in before.get("adapters", {}) if adapter not in entry.get("adapters", {})]:
        print(f"{path}: {name}: left out {', '.join(lost)}; add them again with `python -m export adapter`")
    return 0


def _after(entry: dict, key: str, new: str, value: object) -> dict:
    ordered = {}
    for old, content in entry.items():
        ordered[old] = content
        if old == key:
            ordered[new] = value
    return ordered
