"""Writes tests/golden/graph/: a small graph with everything that an exported graph may contain.

The onnx package makes it; the Rust tests read it with the engine's own parser. Run `python export/golden/graph.py` from
the repository's root; the result does not change between runs.
"""

import gzip
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parents[2] / "tests" / "golden" / "graph"


def weight(name: str, shape: list[int], key: str) -> TensorProto:
    """An initializer without values, to be found in the weights `key` under its own name."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=key)
    return tensor


def small() -> onnx.ModelProto:
    """A convolution, an attention and a few shape operators: each kind of attribute, constant and dimension once."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["c", "", "scales"], ["r"], mode="nearest"),
        helper.make_node("Reshape", ["r", "shape"], ["q"], allowzero=0),
        helper.make_node("MultiHeadAttention", ["q", "q", "q"], ["m"], domain="com.microsoft", num_heads=2, scale=0.5),
        helper.make_node("Where", ["yes", "m", "one"], ["w"]),
        helper.make_node("Cast", ["ids"], ["i"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["w", "i"], ["y"]),
        helper.make_node(
            "LSTM",
            ["w", "lstm.weight", "lstm.weight"],
            ["", "h"],
            activations=["Tanh", "Relu", "Tanh"],
            activation_alpha=[0.25, 0.5],
            hidden_size=1,
        ),
        helper.make_node("Identity", ["axis"], ["unused"]),
    ]
    initializers = [
        weight("conv.weight", [8, 4, 3, 3], "unet"),
        weight("conv.bias", [8], "unet"),
        weight("lstm.weight", [1, 4, 8], "text_encoder.2"),
        numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), "scales"),
        helper.make_tensor("shape", TensorProto.INT64, [3], [0, -1, 8]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [1.5]),
        numpy_helper.from_array(np.array(3, np.int32), "axis"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, "height", "width"]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 8])],
        initializers,
        doc_string="not read",
        value_info=[helper.make_tensor_value_info("c", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, producer_name="tronie", opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"tronie.component": "unet"})
    model.graph.metadata_props.add(key="tronie.dialect", value="fused")
    return model


def main() -> None:
    """Writes the graph plain and packed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = small().SerializeToString(deterministic=True)
    (FOLDER / "small.onnx").write_bytes(data)
    (FOLDER / "small.onnx.gz").write_bytes(gzip.compress(data, mtime=0))
    (FOLDER / "README.md").write_text(
        "`small.onnx` and `small.onnx.gz` hold the same graph, written by `export/golden/graph.py` with onnx "
        f"{onnx.__version__}.\nThey are read, never run; the comparison in `tests/graph.rs` is exact.\n"
    )


if __name__ == "__main__":
    main()
