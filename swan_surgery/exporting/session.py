"""An ONNX file in onnxruntime."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.extras import needed_from
from swan_surgery.models import Inputs


class OnnxSession:
    """An ONNX file in onnxruntime on the CPU."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """Load a file; 0 threads: as many as onnxruntime likes.

        Raises:
            MissingExtraError: onnxruntime is not installed.
        """
        with needed_from("export"):
            onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """Example inputs by the names that the exporter gave them."""
        leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
        tensors = [leaf.cpu().numpy() for leaf in leaves if isinstance(leaf, Tensor)]
        names = [entry.name for entry in self._session.get_inputs()]
        return dict(zip(names, tensors, strict=True))

    def run(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """The outputs as arrays."""
        return list(self._session.run(None, feed))


__all__ = ["OnnxSession"]
