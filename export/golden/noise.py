"""Noise as torch's CPU generator draws it: digests of large tensors, values of small ones."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

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


def draw(seed: int, shapes: list[list[int]]) -> dict[str, Any]:
    """Draw tensors in sequence from one seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {"seed": seed, "draws": [record(torch.randn(shape, generator=generator)) for shape in shapes]}


def write(out: Path) -> list[Path]:
    """Write ``noise.json``."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise SystemExit(f"torch runs its {capability} kernels here; the golden noise is that of AVX2")
    runs = {f"large-{seed}": draw(seed, [LARGE]) for seed in SEEDS}
    runs |= {f"{name}-{seed}": draw(seed, shapes) for name, shapes in RUNS.items() for seed in (3, 2**32 + 5)}
    document = {
        "made_by": "python -m export.golden noise",
        "versions": {"torch": torch.__version__, "cpu_capability": capability},
        "tolerance": "none: every bit equal",
        "runs": runs,
    }
    path = out / "noise.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return [path]
