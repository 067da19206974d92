"""Where a checkpoint's files are: a folder in diffusers layout, or a hub repository whose configs are fetched."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from export import hub
from export.errors import ExportError

_STEMS = ("diffusion_pytorch_model", "model")
_SMALL = (".json", ".txt")


@dataclass(frozen=True)
class File:
    """A file by path, or by hub repository."""

    file: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    def reference(self, root: Path) -> object:
        """How the catalogue writes it: relative when it lies inside `root`, absolute otherwise, or repo and file."""
        if self.path is None:
            entry = {"repo": self.repo, "file": self.file}
            return entry if self.revision is None else {**entry, "revision": self.revision}
        return located(self.path, root)


def located(path: Path, root: Path) -> str:
    """The path relative to `root` when it lies inside, absolute otherwise; always with forward slashes."""
    path, root = path.absolute(), root.absolute()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


class Source(ABC):
    """A checkpoint: its listing, its small files, and its weights by reference."""

    def __init__(self, origin: str, files: list[str], variant: str | None = None, revision: str | None = None) -> None:
        self.origin = origin
        self.files = frozenset(files)
        self.variant = variant
        self.revision = revision

    def describe(self, _root: Path) -> str:
        """What the catalogue records as the origin."""
        return self.origin

    @abstractmethod
    def file(self, name: str) -> File:
        """A reference to one file of the listing."""

    @abstractmethod
    def text(self, name: str) -> str:
        """The contents of one small file."""

    def token_ids(self, folder: str) -> dict[str, int]:
        """Token -> id of a tokenizer."""
        if f"{folder}/vocab.json" in self.files:
            ids = self.json(f"{folder}/vocab.json")
        elif f"{folder}/tokenizer.json" in self.files:
            ids = dict(self.json(f"{folder}/tokenizer.json")["model"]["vocab"])
        else:
            raise ExportError(f"{self.origin}: {folder}/ has neither vocab.json (with merges.txt) nor tokenizer.json")
        if f"{folder}/tokenizer.json" in self.files:
            added = self.json(f"{folder}/tokenizer.json").get("added_tokens", [])
            ids = {**{token["content"]: token["id"] for token in added}, **ids}
        if f"{folder}/added_tokens.json" in self.files:
            ids = {**self.json(f"{folder}/added_tokens.json"), **ids}
        return ids

    def json(self, name: str) -> dict:
        """The contents of one JSON file of the listing."""
        if name not in self.files:
            raise ExportError(f"{self.origin}: {name} is missing; SOURCE must be a checkpoint in diffusers layout")
        try:
            value = json.loads(self.text(name))
        except ValueError as error:
            raise ExportError(f"{self.origin}: {name} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ExportError(f"{self.origin}: {name} holds a JSON {type(value).__name__}; expected an object")
        return value

    def weights(self, component: str) -> list[File]:
        """The safetensors files of a component, every shard of them."""
        for variant in dict.fromkeys((self.variant, None)):
            for stem in _STEMS:
                single = f"{component}/{stem}.{variant}.safetensors" if variant else f"{component}/{stem}.safetensors"
                if single in self.files:
                    return [self.file(single)]
                index = f"{component}/{stem}.safetensors.index"
                index = f"{index}.{variant}.json" if variant else f"{index}.json"
                if index in self.files:
                    return [self._shard(index, f"{component}/{shard}") for shard in self._shards(index)]
        raise ExportError(self._no_weights(component))

    def _shards(self, index: str) -> list[str]:
        names = self.json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ExportError(f"{self.origin}: {index} has no `weight_map` of tensor names to files")
        return sorted(set(names.values()))

    def _shard(self, index: str, name: str) -> File:
        if name not in self.files:
            raise ExportError(f"{self.origin}: {index} names {name}, which is missing; download the checkpoint again")
        return self.file(name)

    def _no_weights(self, component: str) -> str:
        here = sorted(name for name in self.files if name.startswith(f"{component}/"))
        other = [name for name in here if name.endswith(".safetensors")]
        if other:
            names = ", ".join(other)
            return f"{self.origin}: {component}/ has only {names}; pass --variant with the part before .safetensors"
        if any(name.endswith((".bin", ".ckpt", ".pt")) for name in here):
            return (
                f"{self.origin}: {component}/ has only pickled weights; convert it first: load the pipeline with "
                "diffusers and call save_pretrained(folder, safe_serialization=True)"
            )
        return f"{self.origin}: {component}/ has no .safetensors weights"

    def header(self, component: str) -> dict[str, tuple[int, ...]] | None:
        """Tensor names and shapes in the component's files, when these can be looked at."""
        tensors: dict[str, tuple[int, ...]] = {}
        for file in self.weights(component):
            header = self._header(file)
            if header is None:
                return None
            tensors.update(header)
        return tensors

    @abstractmethod
    def _header(self, file: File) -> dict[str, tuple[int, ...]] | None:
        """Tensor names and shapes of one file, when it can be looked at."""


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a safetensors header; the data is not read."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return tensors_of(str(path), stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ExportError(f"{path}: not a readable safetensors file: {error}") from error


def tensors_of(name: str, header: bytes) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header of the safetensors file called `name`."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {tensor: tuple(entry["shape"]) for tensor, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ExportError(f"{name}: not a readable safetensors file: its header is damaged ({error!r})") from error


class Folder(Source):
    """A checkpoint on this machine."""

    def __init__(self, root: Path, variant: str | None = None) -> None:
        self.root = root
        files = [path.relative_to(root).as_posix() for path in root.glob("*/*") if path.is_file()]
        super().__init__(str(root), [*files, *(path.name for path in root.iterdir() if path.is_file())], variant)

    def describe(self, root: Path) -> str:
        return located(self.root, root)

    def file(self, name: str) -> File:
        return File(name, path=self.root / name)

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def _header(self, file: File) -> dict[str, tuple[int, ...]] | None:
        return read_header(self.root / file.file)


class Hub(Source):
    """A hub repository: its small files are fetched, and of its weights only the headers."""

    def file(self, name: str) -> File:
        return File(name, repo=self.origin, revision=self.revision)

    def text(self, name: str) -> str:
        if not name.endswith(_SMALL):
            raise ExportError(f"{self.origin}: {name} is not a config; weights are never downloaded to export")
        return hub.download(self.origin, name, self.revision).read_text(encoding="utf-8")

    def _header(self, file: File) -> dict[str, tuple[int, ...]] | None:
        return tensors_of(f"{self.origin}: {file.file}", hub.header(self.origin, file.file, self.revision))


class Declared(Hub):
    """A hub repository known from a folder of configs and a `hub.json`, so that nothing at all is fetched."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict = json.loads((folder / "hub.json").read_text(encoding="utf-8"))
        self._folder = folder
        self._ids: dict[str, dict[str, int]] = self.facts.get("token_ids", {})
        self.licence: str = self.facts["licence"]
        super().__init__(self.facts["repo"], self.facts["files"], self.facts.get("variant"))

    def token_ids(self, folder: str) -> dict[str, int]:
        return self._ids[folder]

    def text(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8")

    def _header(self, file: File) -> dict[str, tuple[int, ...]] | None:  # noqa: ARG002
        return None


def open_source(source: str, variant: str | None = None, revision: str | None = None) -> Source:
    """SOURCE of the command line: a folder, else a hub id. The hub is told by HF_ENDPOINT and HF_TOKEN."""
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ExportError(f"--revision {revision}: {source} is a folder, which has none; leave it out")
        return Folder(path, variant)
    if path.is_file():
        raise ExportError(
            f"{source} is a single file; convert it to diffusers layout first: "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ExportError(f"{source}: no such folder; SOURCE is a folder in diffusers layout or a hub id owner/name")
    return Hub(source, hub.listing(source, revision), variant, revision)
