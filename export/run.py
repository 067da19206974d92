"""One export from start to end: read, trace, lower, write, and check when asked."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from export import catalogue, sdxl, trace
from export.dialects import DIALECTS
from export.errors import ExportError
from export.graphs import Graph
from export.source import Declared, Source, located, open_source

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
    built = build(checkpoint, dialects)
    if getattr(args, "verify", False):
        from export import verify

        if not verify.check(checkpoint, built):
            return 1
    paths = write_graphs(built, args.out, name)
    entry = sdxl.entry(checkpoint, args.out, paths, args.steps, args.guidance)
    if licence:
        entry = _after(entry, "origin", "licence", licence)
    catalogue.put(args.out / "models.yaml", name, entry)
    print(f"{args.out / 'models.yaml'}: {name}")
    return 0


def build(
    checkpoint: sdxl.Checkpoint, dialects: list[str], graphs: list[Graph] | None = None
) -> dict[str, dict[str, bytes]]:
    """Component -> dialect -> serialised graph, for the graphs given or all."""
    built: dict[str, dict[str, bytes]] = {}
    for graph in checkpoint.graphs() if graphs is None else graphs:
        started = time.monotonic()
        traced = trace.trace(graph)
        resolve = checkpoint.resolve(graph.weights)
        lowered = {name: trace.lower(traced, graph, DIALECTS[name], resolve) for name in dialects}
        built[graph.component] = lowered
        sizes = ", ".join(f"{name} {len(data) / 1024:.0f} KiB" for name, data in lowered.items())
        print(f"{graph.component}: {sizes} in {time.monotonic() - started:.1f} s", flush=True)
    return built


def write_graphs(built: dict[str, dict[str, bytes]], out: Path, name: str) -> dict[str, dict[str, str]]:
    """Writes all graph files; returns the catalogue's `graphs` section."""
    section = {}
    for component, lowered in built.items():
        files = {}
        for dialect, data in lowered.items():
            path = out / "graphs" / name / f"{component}.{dialect}.onnx.gz"
            catalogue.write(path, trace.compress(data))
            files[dialect] = located(path, out)
        section[component] = {"weights": weights_key(component), **files}
    return section


def weights_key(component: str) -> str:
    """Which weights a component reads."""
    return {"kv": "unet", "unet_image": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}.get(component, component)


def _after(entry: dict, key: str, new: str, value: object) -> dict:
    ordered = {}
    for old, content in entry.items():
        ordered[old] = content
        if old == key:
            ordered[new] = value
    return ordered
