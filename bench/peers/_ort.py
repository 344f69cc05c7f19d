"""ONNX Runtime: a model of one node, run on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from bench.cells import Cell
from bench.peers import Call

OPSET = 23


def session(
    cell: Cell, op: str, domain: str, inputs: Mapping[str, NDArray[Any]], names: list[str], **given: Any
) -> Any:
    """A session of one node; `names` are its inputs in order, "" for one that is left out."""
    onnx, ort = (importlib.import_module(n) for n in ("onnx", "onnxruntime"))
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(inputs["q"].dtype)
    values = {
        n: helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    }
    node = helper.make_node(op, names, ["out"], domain=domain, **given)
    out = helper.make_tensor_value_info("out", kind, inputs["q"].shape)
    graph = helper.make_graph([node], "attention", list(values.values()), [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = cell.threads, 1, 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def call(made: Any, inputs: Mapping[str, NDArray[Any]], read: Callable[[Any], Any]) -> Call:
    """Inputs are bound as they are, without a copy; the output is the session's own."""
    feeds = dict(inputs)
    return Call(lambda: made.run(None, feeds)[0], lambda found: {"out": read(found)})
