"""`python -m export demo`: trained networks become the demo model: files, graphs and entries of the catalogue."""

from __future__ import annotations

import argparse
import copy
import hashlib
import shutil
from pathlib import Path

import numpy as np
from safetensors import safe_open

from export import add_adapter, catalogue, run
from export.errors import ExportError
from export.source import located

LICENCE = "MIT OR Apache-2.0"
FAMILY = "sdxl"
LIMIT = 24_000_000
"""Most bytes of all weights together, because they are compiled into the program."""
ADAPTERS = ("ip-adapter-plus", "ip-adapter-plus-face")
_ENCODER = "demo-adapters/models/image_encoder"
_VOCABULARY = ("vocab.json", "merges.txt")
_PICTURES = ("demo-pictures/face.png", "demo-pictures/style.png", "demo-pictures/sheet.json")
LORAS = {
    "demo-lightning": (
        "demo-loras/lightning_4step_lora.safetensors",
        {
            "scheduler": {"timestep_spacing": "trailing"},
            "defaults": {"steps": 4, "guidance": 0.0, "scheduler": "euler"},
            "distilled_steps": 4,
        },
    ),
    "demo-chalkboard": ("demo-loras/chalkboard_lora.safetensors", {}),
}
"""Name -> its file, and what a request with it gets in place of the model's own."""
_MODELS = ("demo", "demo-refiner")
_FOLDERS = (*_MODELS, "demo-adapters", "demo-loras", "demo-pictures")


def _adapter(name: str) -> str:
    return f"demo-adapters/sdxl_models/{name}_sdxl_vit-h.safetensors"


def run_demo(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    source, out = args.folder, args.out
    _check(source)
    models = out / "models"
    _place(source, models)
    for name in _MODELS:
        shutil.rmtree(out / "graphs" / name, ignore_errors=True)
        _must(run.export(_model(models / name, name, args)), name)
    for name in ADAPTERS:
        _must(add_adapter.run(_adding(models, name, args)), name)
    path = out / "models.yaml"
    for name, (file, more) in LORAS.items():
        entry = {"family": FAMILY, "file": located(models / file, out), "licence": LICENCE, **more}
        catalogue.put(path, name, entry, "loras")
        print(f"{path}: {name}")
    _name_once(path, out)
    size = _size(path, out)
    print(f"{size / 1e6:.2f} MB of weights")
    if size > LIMIT:
        raise ExportError(f"the demo has {size / 1e6:.2f} MB of weights; at most {LIMIT / 1e6:.0f} go into the program")
    return 0


def _must(status: int, what: str) -> None:
    if status != 0:
        raise ExportError(f"{what} differs from torch; see above")


def _check(source: Path) -> None:
    """Refuses a folder that lacks something, or whose weights are not finite f16, before anything is replaced."""
    wanted = [*(file for file, _ in LORAS.values()), *map(_adapter, ADAPTERS), *_PICTURES]
    wanted += ["demo/model_index.json", "demo-refiner/model_index.json", f"{_ENCODER}/config.json"]
    wanted += [f"demo/{tokenizer}/{file}" for tokenizer in ("tokenizer", "tokenizer_2") for file in _VOCABULARY]
    if missing := [file for file in wanted if not (source / file).is_file()]:
        raise ExportError(f"{source}: lacks {', '.join(missing)}")
    for folder in _FOLDERS:
        for path in sorted((source / folder).rglob("*.safetensors")):
            _check_weights(path)


def _check_weights(path: Path) -> None:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if tensor.dtype != np.float16:
                raise ExportError(f"{path}: {name} is {tensor.dtype}; save it as float16")
            if not np.isfinite(tensor).all():
                raise ExportError(f"{path}: {name} holds numbers that are not finite")


def _place(source: Path, models: Path) -> None:
    """Puts the folders under `models`, in place of those that are there."""
    if source.resolve() == models.resolve():
        return
    for name in _FOLDERS:
        part = models / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source / name, part)
        shutil.rmtree(models / name, ignore_errors=True)
        part.rename(models / name)


def _model(folder: Path, name: str, args: argparse.Namespace) -> argparse.Namespace:
    """What `python -m export model` would be told."""
    given = {"variant": None, "revision": None, "licence": LICENCE, "steps": args.steps, "guidance": args.guidance}
    return argparse.Namespace(
        command="model",
        source=str(folder),
        name=name,
        out=args.out,
        dialect=args.dialect,
        verify=args.verify,
        **given,
    )


def _adding(models: Path, name: str, args: argparse.Namespace) -> argparse.Namespace:
    """What `python -m export adapter` would be told."""
    return argparse.Namespace(
        source=str(models / _adapter(name)),
        model="demo",
        name=name,
        image_encoder=str(models / _ENCODER),
        image_encoder_name="image_encoder",
        lora_out=None,
        revision=None,
        verify=args.verify,
        out=args.out,
        dialect=args.dialect,
    )


def _name_once(path: Path, root: Path) -> None:
    """Files of the same content are named by the first of them, so that the program holds them once."""
    first: dict[str, str] = {}

    def known(file: str) -> str:
        return first.setdefault(hashlib.sha256((root / file).read_bytes()).hexdigest(), file)

    for name in _MODELS:
        entry = catalogue.models(path)[name]
        weights = {key: [known(file) for file in files] for key, files in entry["weights"].items()}
        text = copy.deepcopy(entry["text"])
        for encoder in text:
            for key in ("vocab", "merges"):
                encoder["tokenizer"][key] = known(encoder["tokenizer"][key])
        catalogue.put(path, name, {**entry, "weights": weights, "text": text})


def _size(path: Path, root: Path) -> int:
    files = {located(root / "models" / file, root) for file, _ in LORAS.values()}
    for name in _MODELS:
        entry = catalogue.models(path)[name]
        files.update(file for group in entry["weights"].values() for file in group)
    return sum((root / file).stat().st_size for file in files)
