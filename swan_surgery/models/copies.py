"""Copies of a model that are safe to run and to cut: shells on the `meta` device, or full copies."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.errors import ModelError


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


def copy_holding(model: nn.Module, values: Mapping[Tensor, Tensor]) -> nn.Module:
    """A full copy whose parameters hold other values of the same shapes, in any type.

    Raises:
        ModelError: the model cannot be copied.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(value.detach().clone(), requires_grad=False)
        for parameter, value in values.items()
    }
    return _copy(model, memo)


def sharing_copy_of(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters of the model, and nothing else.

    Raises:
        ModelError: the model cannot be copied.
    """
    return _copy(model, {id(parameter): parameter for parameter in model.parameters()})


def _all_tensors(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return found


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for module in model.modules():
        # A dozen empty dicts of hooks for every module: copied one by one they take most of the time.
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as err:
        masked = next(
            (
                f"{name}.{key.removesuffix('_mask')}"
                for name, module in model.named_modules()
                for key, _ in module.named_buffers(recurse=False)
                if hasattr(module, key.removesuffix("_mask") + "_orig")
            ),
            None,
        )
        advice = ""
        if masked is not None:
            advice = (
                f"; {masked!r} is masked by torch.nn.utils.prune: make the mask permanent with "
                f"torch.nn.utils.prune.remove(module, name) first"
            )
        raise ModelError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy, and swan_surgery never "
            f"works on the given model itself: {err}{advice}"
        ) from err
