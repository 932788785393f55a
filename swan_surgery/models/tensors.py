"""The tensors of a model by name: parameters, buffers, and those that are plain attributes."""

from torch import Tensor, nn


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, buffers, then plain attributes; a tied tensor once, under its first name."""
    found = [*model.named_parameters(), *model.named_buffers()]
    known = {id(tensor) for _, tensor in found}
    for prefix, module in model.named_modules():
        for name, tensor in plain_tensors(module).items():
            if id(tensor) not in known:
                known.add(id(tensor))
                found.append((f"{prefix}.{name}" if prefix else name, tensor))
    return found


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module keeps as plain attributes: a table of positions, a cache."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
