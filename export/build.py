"""Traces and lowers graphs, and writes their files."""

from __future__ import annotations

import time
from pathlib import Path

from export import catalogue, sdxl, trace
from export.dialects import DIALECTS
from export.graphs import Graph
from export.source import located


def all_of(
    checkpoint: sdxl.Checkpoint, dialects: list[str], graphs: list[Graph] | None = None
) -> dict[str, dict[str, bytes]]:
    """Component -> dialect -> serialised graph, for the graphs given or all."""
    built: dict[str, dict[str, bytes]] = {}
    for graph in checkpoint.graphs() if graphs is None else graphs:
        built[graph.component] = one(graph, dialects, checkpoint.resolve(graph.weights))
    return built


def one(graph: Graph, dialects: list[str], resolve: trace.Resolve) -> dict[str, bytes]:
    """Dialect -> one graph, serialised."""
    started = time.monotonic()
    traced = trace.trace(graph)
    lowered = {name: trace.lower(traced, graph, DIALECTS[name], resolve) for name in dialects}
    sizes = ", ".join(f"{name} {len(data) / 1024:.0f} KiB" for name, data in lowered.items())
    print(f"{graph.component}: {sizes} in {time.monotonic() - started:.1f} s", flush=True)
    return lowered


def write(built: dict[str, dict[str, bytes]], out: Path, name: str) -> dict[str, dict[str, str]]:
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
    own, _, part = component.rpartition(".")
    if own and part in ("projection", "kv"):
        return own
    return {"kv": "unet", "unet_image": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}.get(component, component)
