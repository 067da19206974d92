"""How composite nodes become ONNX operators: `fused` for the CPU, `cuda` for CUDA, `plain` for the rest."""

from __future__ import annotations

from export.dialects import cuda, fused, plain
from export.dialects.lowering import Dialect

DIALECTS: dict[str, Dialect] = {module.DIALECT.name: module.DIALECT for module in (fused, cuda, plain)}
