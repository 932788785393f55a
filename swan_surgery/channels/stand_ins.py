"""Copies of a model that are safe to run and to cut: shells on the `meta` device, or full copies."""

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swan_surgery.errors import InputError, ModelError


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs, split into positional and keyword arguments of the model's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on_meta(self) -> "Inputs":
        """Floating-point tensors without data; integers stay: they may be positions to look up."""
        return self.map(lambda t: torch.empty_like(t, device="meta") if _has_no_use(t) else t.cpu())

    def map(self, function: Any) -> "Inputs":
        """Apply a function to every tensor inside."""

        def on_tensor(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return Inputs(tree_map(on_tensor, self.args), tree_map(on_tensor, dict(self.kwargs)))


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collector: it scans shells over and over (a quarter of resnet152's map).

    Without it the time grows in proportion to the layers; with it, faster than that.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def doubled(tensor: Tensor) -> Tensor:
    """The tensor twice along its first axis: batch-norm wants two samples in training."""
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def as_inputs(example_inputs: Any) -> Inputs:
    """A tensor is one argument, a tuple or list the arguments, a dict the keyword arguments.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    raise InputError(
        f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; "
        f"got {type(example_inputs).__name__}"
    )


def shell_of(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes but no data (device `meta`).

    Integer buffers and constants keep their values: they may be positions to gather.

    Raises:
        ModelError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _all_tensors(model):
        if not isinstance(tensor, nn.Parameter) and _is_index(tensor):
            memo[id(tensor)] = tensor.detach().cpu().clone()
            continue
        shell: Tensor = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            shell = nn.Parameter(shell, requires_grad=False)
        memo[id(tensor)] = shell
    return _copy(model, memo)


def _has_no_use(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.is_floating_point() or tensor.is_complex()


def _is_index(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.is_floating_point() and not tensor.is_complex()


def copy_of(model: nn.Module) -> nn.Module:
    """A full copy that shares nothing with the model; gradients are left behind.

    Raises:
        ModelError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(
                tensor.detach().clone(memory_format=torch.preserve_format),
                requires_grad=tensor.requires_grad,
            )
    return _copy(model, memo)


def _all_tensors(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return found


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as err:
        raise ModelError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy, and swan_surgery never "
            f"works on the given model itself: {err}"
        ) from err
