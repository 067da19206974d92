"""Exports two checkpoints once, through the command line; every test reads the result."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import yaml
from export import sdxl, tiny, trace
from export.__main__ import main
from export.source import Folder, read_header

BOTH = ("beta", "gamma")


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the folder it was exported to and the command's exit status."""

    name: str
    out: Path
    status: int

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def entry(self) -> dict:
        return yaml.safe_load((self.out / "models.yaml").read_text(encoding="utf-8"))["models"][self.name]

    def data(self, component: str, dialect: str) -> bytes:
        return gzip.decompress((self.out / self.entry["graphs"][component][dialect]).read_bytes())

    def graph(self, component: str, dialect: str) -> onnx.ModelProto:
        return onnx.load_from_string(self.data(component, dialect))

    def wanted(self, component: str, dialect: str = "fused") -> dict[str, tuple[int, ...]]:
        return dict(trace.initializers(self.data(component, dialect)))

    def stored(self, component: str) -> dict[str, tuple[int, ...]]:
        tensors: dict[str, tuple[int, ...]] = {}
        for path in (self.folder / component).glob("*.safetensors"):
            tensors.update(read_header(path))
        return tensors


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints the tests need."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in (*BOTH, "alpha-refiner"):
        tiny.write(name, root / name)
    return root


@pytest.fixture(scope="session")
def exports(checkpoints: Path) -> dict[str, Exported]:
    """Every checkpoint of BOTH, exported in both dialects and checked against torch."""
    done = {}
    for name in BOTH:
        source = str(checkpoints / name)
        status = main(["model", source, "--name", name, "--out", str(checkpoints), "--verify"])
        done[name] = Exported(name, checkpoints, status)
    return done


@pytest.fixture(params=BOTH)
def exported(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param]


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of gamma to damage."""
    return Path(shutil.copytree(checkpoints / "gamma", tmp_path / "copy"))


@pytest.fixture
def checkpoint(exports: dict[str, Exported]) -> sdxl.Checkpoint:
    return sdxl.read(Folder(exports["beta"].folder))
