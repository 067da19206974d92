"""Checkpoints of full size with random weights, in the hub's layout: made from configs alone, to measure with."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers.utils
import transformers.utils
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export import build, catalogue, graphs, initial, random_adapters, sdxl, streaming, tokens
from export.dialects import DIALECTS
from export.errors import ExportError
from export.models import text_encoder, unet, vae
from export.source import Folder, located
from export.streaming import DTYPES, Normal

CONFIGS = Path(__file__).parent / "configs"
GRAPHS = Path(__file__).resolve().parents[1] / "graphs"

# The hub's name for the weights of each dtype.
_VARIANTS = {"f32": None, "f16": "fp16"}
# Library of the class -> its names of the weights and of the index of their shards.
_FILES = {
    "diffusers": (diffusers.utils.SAFETENSORS_WEIGHTS_NAME, diffusers.utils.SAFE_WEIGHTS_INDEX_NAME),
    "transformers": (transformers.utils.SAFE_WEIGHTS_NAME, transformers.utils.SAFE_WEIGHTS_INDEX_NAME),
}
_NO_LIMIT = sys.maxsize
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*[KMGT]B")


@dataclass(frozen=True)
class Settings:
    """What to write. `shard` is a size such as 5GB; no `components` are all of them, those of `adapters` included."""

    dtype: str = "f32"
    seed: int = 0
    shard: str | None = None
    components: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def run(args: argparse.Namespace) -> None:
    """`python -m export random`."""
    names = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
    if args.config not in names:
        raise ExportError(f"--config {args.config!r} is unknown; allowed: {', '.join(names)}")
    settings = Settings(args.dtype, args.seed, args.shard, _split(args.components), _split(args.adapters))
    if args.catalogue is not None and settings.components:
        raise ExportError("--catalogue needs every component; leave --components out, or --catalogue")
    if args.catalogue is not None:
        catalogue.check(args.catalogue)
    write(CONFIGS / args.config, args.out, settings)
    if args.catalogue is not None:
        enter(args.catalogue, args.config, args.out, settings)


def _split(names: str | None) -> tuple[str, ...]:
    return () if names is None else tuple(name.strip() for name in names.split(","))


def write(configs: Path, out: Path, settings: Settings) -> None:
    """Writes a checkpoint of the configs in the folder `configs` to `out`, which must be empty or absent."""
    checkpoint = sdxl.read(Folder(configs))
    chosen = _chosen(configs, checkpoint, settings)
    plans = plan(checkpoint, settings, chosen.names)
    adapters = {name: tensors for name, tensors in chosen.plan().items() if _wanted(name, settings)}
    size = sum(tensor.count for files in plans.values() for tensors in files.values() for tensor in tensors)
    size = size * DTYPES[settings.dtype].itemsize + random_adapters.size(adapters, settings.dtype)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ExportError(f"--out {out}: exists and is not empty; name a new folder")
        with _whole(out.resolve()) as folder:
            if (free := shutil.disk_usage(folder).free) < size:
                raise ExportError(f"--out {out}: needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there")
            _small_files(checkpoint, configs, folder)
            for component, files in plans.items():
                _weights(folder / component, files, settings, _library(checkpoint, component))
            chosen.write(adapters, folder, settings.dtype, settings.seed)
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written: {error}") from error
    print(f"{out}: {size / 1e9:.2f} GB of weights")


def _chosen(configs: Path, checkpoint: sdxl.Checkpoint, settings: Settings) -> random_adapters.Chosen:
    return random_adapters.choose(configs, settings.adapters, checkpoint.unet.get("attentions", []))


def _wanted(name: str, settings: Settings) -> bool:
    return not settings.components or name in settings.components


def plan(
    checkpoint: sdxl.Checkpoint, settings: Settings, others: Iterable[str] = ()
) -> dict[str, dict[str, list[Normal]]]:
    """Component -> file -> its tensors. Refuses settings that are not possible; `others` are components besides."""
    if settings.dtype not in DTYPES:
        raise ExportError(f"--dtype {settings.dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    if settings.seed < 0:
        raise ExportError(f"--seed {settings.seed}: must be 0 or more")
    if settings.shard is not None and not ((size := _SIZE.fullmatch(settings.shard)) and float(size[1])):
        raise ExportError(f"--shard {settings.shard!r}: must be a number above 0 with its unit, such as 5GB or 500MB")
    every = [*(encoder.component for encoder in checkpoint.encoders), "unet", "vae"]
    for name in settings.components:
        if name not in (*every, *others):
            raise ExportError(f"--components {name!r} is unknown; allowed: {', '.join((*every, *others))}")
    plans = {}
    for component in every:
        if _wanted(component, settings):
            tensors = _tensors(checkpoint, component)
            plans[component] = _files(tensors, settings, _library(checkpoint, component))
    return plans


def _tensors(checkpoint: sdxl.Checkpoint, component: str) -> list[Normal]:
    """Every tensor that `save_pretrained` would write, by its name on the hub; no weight is materialised."""
    encoder = next((encoder for encoder in checkpoint.encoders if encoder.component == component), None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if encoder is not None:
            net: nn.Module = text_encoder.build(encoder.class_name, encoder.config)
        elif component == "unet":
            net = unet.build(checkpoint.unet_config)
        else:
            net = vae.build(checkpoint.vae_config)
    tensors = []
    for name, tensor in net.state_dict().items():
        normal = initial.law(net, name)
        if normal is None:
            raise ExportError(f"{component}: how to draw {name} is not known; see export/initial.py")
        hub = name if encoder is None else graphs.hub_text_name(name)
        tensors.append(Normal(hub, tuple(tensor.shape), *normal))
    return tensors


def _library(checkpoint: sdxl.Checkpoint, component: str) -> str:
    return checkpoint.index[component][0]


def _files(tensors: list[Normal], settings: Settings, library: str) -> dict[str, list[Normal]]:
    """File name -> tensors, cut and named by the function that `save_pretrained` uses."""
    single, _ = _FILES[library]
    stem, extension = single.rsplit(".", 1)
    variant = _VARIANTS[settings.dtype]
    pattern = f"{stem}.{variant}{{suffix}}.{extension}" if variant else f"{stem}{{suffix}}.{extension}"
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.count * DTYPES[settings.dtype].itemsize,
        filename_pattern=pattern,
        max_shard_size=_NO_LIMIT if settings.shard is None else settings.shard,
    )
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def _weights(folder: Path, files: dict[str, list[Normal]], settings: Settings, library: str) -> None:
    started = time.monotonic()
    for file, tensors in files.items():
        streaming.write(folder / file, tensors, settings.dtype, f"{settings.seed}/{folder.name}")
    size = sum(tensor.count for tensors in files.values() for tensor in tensors) * DTYPES[settings.dtype].itemsize
    if len(files) > 1:
        stem, extension = _FILES[library][1].rsplit(".", 1)
        variant = _VARIANTS[settings.dtype]
        index = f"{stem}.{variant}.{extension}" if variant else f"{stem}.{extension}"
        places = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        _json(folder / index, {"metadata": {"total_size": size}, "weight_map": places}, sort=True)
    print(f"{folder.name}: {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s", flush=True)


def _small_files(checkpoint: sdxl.Checkpoint, configs: Path, folder: Path) -> None:
    """All configs as they are, and a tokenizer for each text encoder."""
    encoders = [encoder.component for encoder in checkpoint.encoders]
    names = [f"{component}/config.json" for component in (*encoders, "unet", "vae")]
    for name in ("model_index.json", "scheduler/scheduler_config.json", *names):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(configs / name, folder / name)
    for encoder in checkpoint.encoders:
        name = sdxl.TOKENIZERS[encoder.component]
        config = checkpoint.source.json(f"{name}/tokenizer_config.json")
        size = text_encoder.parse(encoder.config).vocab_size
        length = min(int(config["model_max_length"]), encoder.positions)
        tokens.save(folder / name, tokens.merges_for(size), config["pad_token"], length)


def _json(path: Path, value: dict, sort: bool = False) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=sort) + "\n", encoding="utf-8")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end; after any failure, SIGTERM included, nothing is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        # Not `beside` itself: it is private to its owner.
        folder = beside / out.name
        folder.mkdir()
        yield folder
        folder.replace(out)
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(beside, ignore_errors=True)


def enter(path: Path, name: str, folder: Path, settings: Settings) -> None:
    """Puts the checkpoint in `folder` into the catalogue at `path`, with the repository's own graphs of the config."""
    checkpoint = sdxl.read(Folder(folder, _VARIANTS[settings.dtype]))
    chosen = _chosen(CONFIGS / name, checkpoint, settings)
    section = _committed(name, [graph.component for graph in checkpoint.graphs()], path.parent)
    entry = sdxl.entry(checkpoint, path.parent, section, None, None)
    added = _committed(name, chosen.components(), path.parent)
    catalogue.put(path, name, chosen.entered(entry, folder, added, path.parent))
    print(f"{path}: {name}")


def _committed(name: str, components: list[str], root: Path) -> dict[str, dict]:
    """The catalogue's `graphs` section of graphs that the repository has."""
    section = {}
    for component in components:
        files = {dialect: GRAPHS / name / f"{component}.{dialect}.onnx.gz" for dialect in DIALECTS}
        for file in files.values():
            if not file.is_file():
                raise ExportError(f"{file} is missing; make it with `python -m export graphs {name} --out .`")
        places = {dialect: located(file, root) for dialect, file in files.items()}
        section[component] = {"weights": build.weights_key(component), **places}
    return section
