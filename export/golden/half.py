"""The tiny UNet of the `cuda` dialect with its CUDA-only operators spelt out, for the Rust test `tests/half.rs`.

Made from the committed graph, so `make graphs` makes it anew.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from export import emulate, trace

REPOSITORY = Path(__file__).resolve().parents[2]


def write(out: Path) -> Iterator[Path]:
    """Writes the one graph."""
    data = gzip.decompress((REPOSITORY / "tests" / "models" / "graphs" / "tiny" / "unet.cuda.onnx.gz").read_bytes())
    path = out / "unet.onnx.gz"
    path.write_bytes(trace.compress(emulate.on_cpu(data)))
    yield path
