"""Writes safetensors files of random tensors chunk by chunk, so that their size is bounded by the disk alone."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

DTYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
# Values drawn at once: 4 MiB. A tensor's values depend on it, since every chunk has a generator of its own.
CHUNK = 1 << 20
_THREADS = 2
# Chunks under way: enough that the threads never wait for the disk's short pauses.
_AHEAD = 4 * _THREADS


@dataclass(frozen=True)
class Normal:
    """One tensor to be: its name in the file, its shape, and the normal distribution of its values."""

    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float

    @property
    def count(self) -> int:
        """How many values it has."""
        return prod(self.shape)


def write(path: Path, tensors: Iterable[Normal], dtype: str, seed: str) -> None:
    """A safetensors file of `tensors`, in order of their names as `safetensors.torch.save_file` has them.

    A tensor's values depend on `seed`, its name and its shape, not on the file it is in; f16 are the f32 ones rounded.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    kind = DTYPES[dtype]
    with path.open("xb") as stream, ThreadPoolExecutor(_THREADS) as threads:
        stream.write(header(ordered, dtype))
        for chunk in _drawn(threads, _chunks(ordered), kind, seed):
            stream.write(chunk)


def header(tensors: Iterable[Normal], dtype: str) -> bytes:
    """Length and JSON, padded so that the data begin at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.count * DTYPES[dtype].itemsize
        entries[tensor.name] = {"dtype": dtype.upper(), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


_Chunk = tuple[Normal, int, int]


def _chunks(tensors: Iterable[Normal]) -> Iterator[_Chunk]:
    """Tensor, number of the chunk in it, values in the chunk."""
    for tensor in tensors:
        for i, start in enumerate(range(0, tensor.count, CHUNK)):
            yield tensor, i, min(CHUNK, tensor.count - start)


def _drawn(threads: ThreadPoolExecutor, chunks: Iterator[_Chunk], kind: np.dtype, seed: str) -> Iterator[np.ndarray]:
    """The chunks' values in order; a few are drawn ahead."""
    ahead: deque[Future[np.ndarray]] = deque()
    for chunk in chunks:
        ahead.append(threads.submit(_draw, chunk, kind, seed))
        if len(ahead) == _AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _draw(chunk: _Chunk, kind: np.dtype, seed: str) -> np.ndarray:
    tensor, number, count = chunk
    key = int.from_bytes(hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([key, number])))
    values = generator.standard_normal(count, np.float32)
    values *= np.float32(tensor.deviation)
    if tensor.mean:
        values += np.float32(tensor.mean)
    return values.astype(kind, copy=False)
