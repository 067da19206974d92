"""Mergers of one layer without gradients: the least squares of its outputs, which `src/lora/zip.rs` is the twin of.

With `C` the second moments of a layer's inputs where the content LoRA runs with its prompt (`C_c`) and where the style
LoRA does (`C_s`), the mergers minimise

    (|(dW_m - dW_c) X_c|^2 + |(dW_m - dW_s) X_s|^2) / E
        + ridge * mean((m - 1)^2) + similarity * mean|m_c m_s|

where E is the energy of both updates, `|dW_c X_c|^2 + |dW_s X_s|^2`, so that ridge and similarity mean the same in
every layer. `|a b| <= (a^2 |b0/a0| + b^2 |a0/b0|) / 2`, with equality at `a0, b0`, makes each round a linear system.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from export.errors import ExportError

Array = npt.NDArray[np.float64]

RIDGE = 0.01
SIMILARITY = 0.01
ROUNDS = 5
# A merger below this weighs in the next round as if it were this large.
_SMALLEST = 1e-6


def solve(
    content: Array, style: Array, seen_c: Array, seen_s: Array, ridge: float = RIDGE, similarity: float = SIMILARITY
) -> tuple[Array, Array]:
    """`m_c` and `m_s`, each `[in]`, for updates `[out, in]` and second moments `[in, in]`."""
    width = content.shape[1]
    cc, cs, ss = content.T @ content, content.T @ style, style.T @ style
    energy = float((cc * seen_c).sum() + (ss * seen_s).sum())
    if not np.isfinite(energy):
        raise ExportError("the LoRAs' updates or what they see are not finite")
    if energy <= 0.0:
        return np.ones(width), np.ones(width)
    both = seen_c + seen_s
    normal = np.block([[cc * both, cs * both], [cs.T * both, ss * both]]) / energy
    right = np.concatenate([(cc * seen_c + cs * seen_s).sum(1), (cs.T * seen_c + ss * seen_s).sum(1)]) / energy
    pull = ridge / (2 * width)
    mergers = np.ones(2 * width)
    for _ in range(ROUNDS if similarity > 0 else 1):
        size = np.maximum(np.abs(mergers), _SMALLEST)
        weights = np.concatenate([size[width:] / size[:width], size[:width] / size[width:]])
        diagonal = pull + similarity / (2 * width) * weights
        mergers = np.linalg.solve(normal + np.diag(diagonal), right + pull)
    return mergers[:width], mergers[width:]


def objective(
    mergers: tuple[Array, Array],
    updates: tuple[Array, Array],
    moments: tuple[Array, Array],
    ridge: float = RIDGE,
    similarity: float = SIMILARITY,
) -> float:
    """What `solve` minimises."""

    def energy(update: Array, moment: Array) -> float:
        return float(((update @ moment) * update).sum())

    merged = sum(update * merger for update, merger in zip(updates, mergers, strict=True))
    pairs = list(zip(updates, moments, strict=True))
    apart = sum(energy(merged - update, moment) for update, moment in pairs)
    whole = sum(energy(update, moment) for update, moment in pairs)
    far = np.mean((np.concatenate(mergers) - 1) ** 2)
    return apart / whole + ridge * float(far) + similarity * float(np.mean(np.abs(mergers[0] * mergers[1])))
