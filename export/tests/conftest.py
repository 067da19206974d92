"""Exports two checkpoints once, through the command line; every test reads the result."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import yaml
from export import sdxl, streaming, tiny, trace
from export.source import Folder, read_header
from export.streaming import Normal

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "models"
"""A catalogue of tiny models with random weights, `tiny` and `tiny-refiner`."""
TRONIE = ROOT / "target/release/tronie"
built = pytest.mark.skipif(not TRONIE.is_file(), reason="wants target/release/tronie; `make build` makes it")
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
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the tiny checkpoints the tests need, each in a folder of its own."""
    folders = {name: tmp_path_factory.mktemp(name) / name for name in (*BOTH, "alpha-refiner")}
    for name, folder in folders.items():
        tiny.write(name, folder)
    return folders


@pytest.fixture(scope="session")
def exports(checkpoints: dict[str, Path]) -> dict[str, Exported]:
    """Every checkpoint of BOTH, exported in both dialects and checked against torch, side by side."""
    running = {}
    for name in BOTH:
        folder = checkpoints[name]
        command = [sys.executable, "-m", "export", "model", folder, "--name", name, "--out", folder.parent, "--verify"]
        running[name] = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return {name: Exported(name, checkpoints[name].parent, process.wait()) for name, process in running.items()}


@pytest.fixture(params=BOTH)
def exported(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param]


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of gamma to damage."""
    return Path(shutil.copytree(checkpoints["gamma"], tmp_path / "copy"))


@pytest.fixture
def checkpoint(exports: dict[str, Exported]) -> sdxl.Checkpoint:
    return sdxl.read(Folder(exports["beta"].folder))


@pytest.fixture
def never_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a test must not write gigabytes."""
    whole = streaming.write

    def small(path: Path, tensors: list[Normal], dtype: str, seed: str) -> None:
        assert sum(tensor.count for tensor in tensors) < 32 << 20, path
        whole(path, tensors, dtype, seed)

    monkeypatch.setattr(streaming, "write", small)
