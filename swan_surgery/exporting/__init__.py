"""A model as ONNX or torch.export file: written, run and compared, under names that people know."""

from swan_surgery.exporting.session import OnnxSession
from swan_surgery.exporting.verified import Exported, export


__all__ = ["Exported", "OnnxSession", "export"]
