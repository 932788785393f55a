"""Any `nn.Module`: its inputs, copies, outputs, checks, and how its tensors are cut."""

from swan_surgery.models.copies import copy_of, sharing_copy_of, shell_of, without_collection
from swan_surgery.models.inputs import Inputs, as_inputs, doubled


__all__ = [
    "Inputs",
    "as_inputs",
    "copy_of",
    "doubled",
    "sharing_copy_of",
    "shell_of",
    "without_collection",
]
