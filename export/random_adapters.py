"""Published IP-Adapters of full size with random weights, in the layout of their repository."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export import add_adapter, initial, ip_adapter, streaming
from export.errors import ExportError
from export.ip_adapter import ImageEncoder, IpAdapter
from export.models import image_encoder
from export.models.ip_adapter import KeysValues, Tokens
from export.source import File, Folder, located
from export.streaming import DTYPES, Normal

FOLDER = "adapters"
"""Where their repository's layout begins, in the checkpoint's folder and among the configs."""
_ENCODER_FILE = "model.safetensors"


@dataclass(frozen=True)
class Chosen:
    """Adapters and the encoders that they read. Each is one file, whatever its size, as the published ones are."""

    encoders: tuple[ImageEncoder, ...] = ()
    adapters: tuple[IpAdapter, ...] = ()

    @property
    def names(self) -> list[str]:
        """Their names in the catalogue."""
        return [*(encoder.component for encoder in self.encoders), *(adapter.name for adapter in self.adapters)]

    def write(self, files: dict[str, list[Normal]], out: Path, dtype: str, seed: int) -> None:
        """Writes those of `files`, by their names, and every encoder's config, into the folder of a checkpoint."""
        for encoder in self.encoders:
            place = out / FOLDER / encoder.folder
            place.mkdir(parents=True)
            (place / "config.json").write_text(encoder.source.text(f"{encoder.folder}/config.json"), encoding="utf-8")
        for name, tensors in files.items():
            started, path = time.monotonic(), out / FOLDER / self._file(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            streaming.write(path, tensors, dtype, f"{seed}/{name}")
            print(
                f"{name}: {size({name: tensors}, dtype) / 1e9:.2f} GB in {time.monotonic() - started:.1f} s", flush=True
            )

    def plan(self) -> dict[str, list[Normal]]:
        """Name -> its tensors; no weight is materialised."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            nets: dict[str, list[nn.Module]] = {
                encoder.component: [image_encoder.build(encoder.config)] for encoder in self.encoders
            }
            for adapter in self.adapters:
                layers = KeysValues(adapter.sizes.context, adapter.attentions)
                nets[adapter.name] = [Tokens(adapter.sizes).net, layers.net]
        return {name: [tensor for part in parts for tensor in _tensors(name, part)] for name, parts in nets.items()}

    def entered(self, entry: dict, folder: Path, paths: dict[str, dict], root: Path) -> dict:
        """The catalogue's entry with the files in the folder of a checkpoint, and graphs by component."""
        encoders = [self._here(encoder, folder / FOLDER) for encoder in self.encoders]
        adapters = [
            replace(
                adapter,
                origin=located(folder / FOLDER, root),
                file=File(adapter.file.file, path=folder / FOLDER / adapter.file.file),
            )
            for adapter in self.adapters
        ]
        return add_adapter.with_adapters(entry, encoders, adapters, paths, root) if adapters else entry

    def components(self) -> list[str]:
        """The graphs that they need."""
        graphs = [encoder.graph() for encoder in self.encoders]
        graphs += [graph for adapter in self.adapters for graph in adapter.graphs()]
        return [graph.component for graph in graphs]

    @staticmethod
    def _here(encoder: ImageEncoder, folder: Path) -> ImageEncoder:
        place = folder / encoder.folder
        return ip_adapter.read_encoder(encoder.component, Folder(place.parent), place.name)

    def _file(self, name: str) -> str:
        for encoder in self.encoders:
            if encoder.component == name:
                return f"{encoder.folder}/{_ENCODER_FILE}"
        return next(adapter.file.file for adapter in self.adapters if adapter.name == name)


def choose(configs: Path, names: Iterable[str], attentions: list[dict]) -> Chosen:
    """The adapters called `names` among those described beside the configs of a model."""
    encoders, adapters = ip_adapter.declared(configs, attentions)
    by_name = {adapter.name: adapter for adapter in adapters}
    for name in names:
        if name not in by_name:
            known = ", ".join(by_name) or f"none, as {configs.name} has no adapters"
            raise ExportError(f"--adapters {name!r} is unknown; allowed: {known}")
    chosen = tuple(by_name[name] for name in dict.fromkeys(names))
    read = {adapter.encoder for adapter in chosen}
    return Chosen(tuple(encoder for encoder in encoders if encoder.component in read), chosen)


def size(plans: dict[str, list[Normal]], dtype: str) -> int:
    """Bytes of all tensors."""
    return sum(tensor.count for tensors in plans.values() for tensor in tensors) * DTYPES[dtype].itemsize


def _tensors(name: str, net: nn.Module) -> list[Normal]:
    tensors = []
    for tensor, value in net.state_dict().items():
        normal = initial.law(net, tensor)
        if normal is None:
            raise ExportError(f"{name}: how to draw {tensor} is not known; see export/initial.py")
        tensors.append(Normal(tensor, tuple(value.shape), *normal))
    return tensors
