"""`python -m export adapter`: adds an IP-Adapter to a model's entry, with the graphs it needs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from export import adapter_lora, build, catalogue, ip_adapter, sdxl, trace
from export.dialects import DIALECTS
from export.errors import ExportError
from export.graphs import Graph
from export.ip_adapter import ImageEncoder, IpAdapter
from export.source import Declared, Folder, Source, open_source

CONFIGS = Path(__file__).parent / "configs"
_SHARD = re.compile(r"-\d+-of-\d+$")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    path = args.out / "models.yaml"
    catalogue.check_name(args.name)
    if args.lora_out is not None:
        adapter_lora.check(args.lora_out)
    entry = _entry(path, args.model, args.name)
    dialects = list(DIALECTS) if args.dialect == "all" else [args.dialect]
    checkpoint = None if _sees_pictures(entry, dialects) else sdxl.read(_source(entry, args.out))
    facts = entry["unet"] if checkpoint is None else checkpoint.unet
    origin, file, shapes = ip_adapter.open_file(args.source, args.revision, args.out)
    sizes = ip_adapter.recognise(file.file, shapes, lora=args.lora_out is not None)
    ip_adapter.check_model(file.file, shapes, sizes, args.model, facts)
    lora = _lora(args, file.file, shapes, facts["attentions"])
    encoder = _encoder(args, entry)
    ip_adapter.check_encoder(file.file, sizes, encoder)
    name = None if encoder is None else encoder.component
    tokens = ip_adapter.token_count(sizes, encoder)
    adapter = IpAdapter(args.name, origin, file, sizes, facts["attentions"], name, tokens)
    missing = _missing(entry, encoder, adapter, dialects)
    built = {graph.component: build.one(graph, dialects, resolve) for graph, resolve in missing}
    seeing = {} if checkpoint is None else build.all_of(checkpoint, dialects, _denoiser(checkpoint))
    if args.verify and not _verified(checkpoint, seeing, encoder, adapter, built):
        return 1
    if checkpoint is not None:
        entry = _with_denoiser(entry, checkpoint, build.write(seeing, args.out, args.model))
    paths = build.write(built, args.out, args.model)
    encoders = [] if encoder is None or encoder.component not in paths else [encoder]
    for known in encoders:
        # Of the same files, in other dialects perhaps.
        paths[known.component] = {**entry["graphs"].get(known.component, {}), **paths[known.component]}
    entry = with_adapters(entry, encoders, [adapter], paths, args.out)
    if lora:
        adapter_lora.write(file, lora, args.lora_out)
        print(f"{args.lora_out}: {args.name}'s LoRA; give it with --lora whenever {args.name} is used")
    catalogue.put(path, args.model, entry)
    print(f"{path}: {args.model}: {args.name}")
    return 0


def published(configs: Path, entry: dict, dialects: list[str], out: Path, model: str) -> dict:
    """The entry with the published adapters that are described beside the model's configs; writes their graphs."""
    encoders, adapters = ip_adapter.declared(configs, entry["unet"]["attentions"])
    graphs = [encoder.graph() for encoder in encoders]
    graphs += [graph for adapter in adapters for graph in adapter.graphs()]
    built = {graph.component: build.one(graph, dialects, _as_declared) for graph in graphs}
    return with_adapters(entry, encoders, adapters, build.write(built, out, model), out)


def with_adapters(
    entry: dict, encoders: list[ImageEncoder], adapters: list[IpAdapter], paths: dict[str, dict], root: Path
) -> dict:
    """The entry with encoders, adapters and their graphs added."""
    weights, rules, known = (
        dict(entry["weights"]),
        dict(entry.get("image_encoders", {})),
        dict(entry.get("adapters", {})),
    )
    for encoder in encoders:
        weights[encoder.component] = [file.reference(root) for file in encoder.files]
        rules[encoder.component] = encoder.rule()
    for adapter in adapters:
        weights[adapter.name] = [adapter.file.reference(root)]
        known[adapter.name] = adapter.entry()
    added = {"weights": weights, "graphs": {**entry["graphs"], **paths}}
    new: dict = {}
    for key, value in entry.items():
        if key in ("image_encoders", "adapters"):
            continue
        new[key] = added.get(key, value)
        if key == "vae":
            new |= {"image_encoders": rules} if rules else {}
            new["adapters"] = known
    return new


def _entry(path: Path, model: str, name: str) -> dict:
    models = catalogue.models(path)
    if model not in models:
        known = ", ".join(models) or "none"
        raise ExportError(f"--for {model}: {path} has no such model; it has: {known}")
    entry = models[model]
    if like := entry.get("like"):
        raise ExportError(f"--for {model}: is a variant of {like}; add the adapter to that, and both have it")
    if entry["role"] != "base":
        raise ExportError(f"--for {model}: is a {entry['role']}; IP-Adapters are for base models")
    if name in entry["weights"] and name not in entry.get("adapters", {}):
        raise ExportError(f"--name {name}: {model} has weights of that name already; choose another")
    return entry


def _lora(args: argparse.Namespace, name: str, shapes: ip_adapter.Shapes, attentions: list[dict]) -> dict[str, str]:
    """The tensors of the LoRA inside and their names in diffusers; none where none is to be written."""
    if args.lora_out is None:
        return {}
    if not any(map(adapter_lora.is_lora, shapes)):
        raise ExportError(f"--lora-out {args.lora_out}: {name} holds no LoRA; leave it out")
    try:
        return adapter_lora.names(shapes, attentions)
    except ExportError as error:
        raise ExportError(f"{name}: {error}") from error


def _sees_pictures(entry: dict, dialects: list[str]) -> bool:
    graphs = entry["graphs"].get("unet_image", {})
    return "attentions" in entry["unet"] and all(dialect in graphs for dialect in dialects)


def _source(entry: dict, root: Path) -> Source:
    """Where the model's configs are: its origin, with the variant and revision that its weights have."""
    reference = entry["weights"]["unet"][0]
    revision = reference.get("revision") if isinstance(reference, dict) else None
    name = Path(reference["file"] if isinstance(reference, dict) else reference).name.removesuffix(".safetensors")
    variant = _SHARD.sub("", name).partition(".")[2] or None
    origin = entry["origin"]
    if (root / origin).is_dir():
        return Folder(root / origin, variant)
    for folder in sorted(CONFIGS.iterdir()):
        if (declared := Declared(folder)).origin == origin:
            return declared
    return open_source(origin, variant, revision)


def _denoiser(checkpoint: sdxl.Checkpoint) -> list[Graph]:
    found = [graph for graph in checkpoint.graphs() if graph.component == "unet_image"]
    if not found:
        raise ExportError(f"{checkpoint.source.origin}: is a {checkpoint.role}; IP-Adapters are for base models")
    return found


def _with_denoiser(entry: dict, checkpoint: sdxl.Checkpoint, paths: dict[str, dict]) -> dict:
    """The entry with the UNet that sees pictures, beside the one that does not."""
    graphs: dict[str, dict] = {}
    for component, section in entry["graphs"].items():
        if component != "unet_image":
            graphs[component] = section
        if component == "unet":
            graphs["unet_image"] = {**entry["graphs"].get("unet_image", {}), **paths["unet_image"]}
    unet = {**entry["unet"], "attentions": checkpoint.unet["attentions"]}
    return {**entry, "graphs": graphs, "unet": unet}


def _encoder(args: argparse.Namespace, entry: dict) -> ImageEncoder | None:
    """The encoder under the name that the entry has for its files, or under the one wanted."""
    if args.image_encoder is None:
        return None
    encoder = ip_adapter.open_encoder(args.image_encoder_name, args.image_encoder, args.revision)
    files = [file.reference(args.out) for file in encoder.files]
    for component in entry.get("image_encoders", {}):
        if entry["weights"][component] == files:
            return replace(encoder, component=component)
    catalogue.check_name(encoder.component)
    if encoder.component == args.name:
        raise ExportError(f"--image-encoder-name {args.name}: is the adapter's own name; choose another name")
    if encoder.component in entry["weights"]:
        raise ExportError(
            f"--image-encoder-name {encoder.component}: {args.model} has other weights of that name; choose "
            "another name"
        )
    return encoder


def _missing(
    entry: dict, encoder: ImageEncoder | None, adapter: IpAdapter, dialects: list[str]
) -> Iterator[tuple[Graph, trace.Resolve]]:
    """The graphs to make, with what finds their tensors; an encoder that is there already is not made again."""
    if encoder is not None and not entry["graphs"].get(encoder.component, {}).keys() >= set(dialects):
        yield encoder.graph(), encoder.resolve()
    for graph in adapter.graphs():
        yield graph, _as_declared


def _as_declared(name: str, _shape: tuple[int, ...]) -> str:
    """Names that have been checked already."""
    return name


def _verified(
    checkpoint: sdxl.Checkpoint | None,
    seeing: dict[str, dict[str, bytes]],
    encoder: ImageEncoder | None,
    adapter: IpAdapter,
    built: dict[str, dict[str, bytes]],
) -> bool:
    from itertools import chain

    from export import verify, verify_adapter

    rows = [] if checkpoint is None else verify.compare(checkpoint, seeing)
    return verify.report(chain(rows, verify_adapter.compare(encoder, adapter, built)))
