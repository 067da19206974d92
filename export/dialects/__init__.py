"""How composite nodes become ONNX operators: `fused` for the CPU and CUDA providers, `plain` for the rest."""

from __future__ import annotations

from export.dialects import fused, plain
from export.dialects.lowering import Dialect

DIALECTS: dict[str, Dialect] = {module.DIALECT.name: module.DIALECT for module in (fused, plain)}
