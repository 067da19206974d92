"""Noise as torch's CPU generator draws it in f32 and f16, and as its CUDA generator does.

Of the CPU's, digests of large tensors and values of small ones. CUDA's is written out here in numpy's f32 after
torch's kernel, with a thread for every value, because it has to be made without a GPU; the web UI's documentation has
torch's own values for seed 0, which `tests/noise.rs` knows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

SEEDS = [0, 1, 7, 42, 1234567890, 2**32 - 1, 2**63 + 5]

LARGE = [1, 4, 128, 128]
"""SDXL's latents at 1024 x 1024."""

RUNS = {
    "small-then-large": [[1, 1, 1, 3], [1, 4, 2, 2], [1, 1, 1, 1], [1, 4, 1, 1], [1, 1, 1, 15], [1, 4, 8, 8]],
    "uneven": [[1, 4, 3, 5], [2, 4, 7, 9], [1, 1, 1, 17], [1, 1, 1, 16], [1, 4, 5, 5]],
    "steps": [[1, 4, 16, 24]] * 4,
}
"""Shapes drawn one after the other from one generator."""


def record(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, digest of the little-endian f32 bytes, and the first values' bits."""
    array = tensor.contiguous().numpy().astype("<f4")
    return {
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "first_bits": array.ravel()[:16].view("<u4").tolist(),
    }


def draw(seed: int, shapes: list[list[int]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Draw tensors in sequence from one seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return {"seed": seed, "draws": [record(tensor.float()) for tensor in drawn]}


def draw_each(seeds: list[int], shapes: list[list[int]]) -> dict[str, Any]:
    """Draw tensors in sequence from a generator for each picture, as diffusers does."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return {"seeds": seeds, "draws": [record(randn_tensor(tuple(shape), generator=generators)) for shape in shapes]}


def philox(seed: int, call: int, count: int) -> np.ndarray:
    """The words of Philox4x32-10 for one draw of a CUDA generator, ``[4, count]``."""
    counter = np.zeros((4, count), np.uint64)
    counter[0] = call
    counter[2] = np.arange(count)
    key, word = [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for turn in range(10):
        low, high = (key[0] + turn * 0x9E3779B9) & word, (key[1] + turn * 0xBB67AE85) & word
        even, odd = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = np.stack(
            [
                (odd >> np.uint64(32)) ^ counter[1] ^ np.uint64(low),
                odd & np.uint64(word),
                (even >> np.uint64(32)) ^ counter[3] ^ np.uint64(high),
                even & np.uint64(word),
            ]
        )
    return counter


def draw_cuda(seed: int, counts: list[int]) -> dict[str, Any]:
    """Draw tensors in sequence as a CUDA generator does, the first and last values of each."""
    draws = []
    for call, count in enumerate(counts):
        x, y, _, _ = philox(seed, call, count).astype(np.float32)
        unit = np.float32(2.0**-32)
        turn = np.float32(2 * np.pi * 2.0**-32)
        u, v = x * unit + unit / 2, y * turn + turn / 2
        values = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(v)
        draws.append({"count": count, "first": values[:64].tolist(), "last": values[-64:].tolist()})
    return {"seed": seed, "draws": draws}


def write(out: Path) -> list[Path]:
    """Write ``noise.json``."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise SystemExit(f"torch runs its {capability} kernels here; the golden noise is that of AVX2")
    runs = {f"large-{seed}": draw(seed, [LARGE]) for seed in SEEDS}
    runs |= {f"{name}-{seed}": draw(seed, shapes) for name, shapes in RUNS.items() for seed in (3, 2**32 + 5)}
    half = {f"large-{seed}": draw(seed, [LARGE], torch.float16) for seed in SEEDS}
    half |= {f"{name}-3": draw(3, shapes, torch.float16) for name, shapes in RUNS.items()}
    each = {"three": draw_each([7, 8, 2**40], [[3, 4, 16, 24], [3, 4, 5, 5], [3, 1, 1, 3], [3, 4, 16, 24]])}
    document = {
        "made_by": "python -m export.golden noise",
        "versions": {"torch": torch.__version__, "cpu_capability": capability},
        "tolerance": "none: every bit equal; cuda: 1e-5",
        "runs": runs,
        "half": half,
        "each": each,
        "cuda": {f"seed-{seed}": draw_cuda(seed, [65536, 65536, 12]) for seed in (0, 42, 2**63 + 5)},
    }
    path = out / "noise.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return [path]
