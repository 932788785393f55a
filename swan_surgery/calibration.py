"""Batch-norm statistics under hard gates (Eq. 7)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError, SwanWarning
from swan_surgery.models.batches import batches_in, run_on_batch
from swan_surgery.models.checks import check_data, check_is_module
from swan_surgery.models.modes import evaluating


class Moments:
    """Sum, sum of squared deviations and count over everything seen, in float64 (Chan et al.)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in activations [B, C, ...]."""
        rows = x.detach().transpose(0, 1).reshape(x.shape[1], -1).double()
        count = rows.shape[1]
        mean = rows.mean(dim=1)
        squares = (rows - mean[:, None]).square().sum(dim=1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def calibrate(model: nn.Module, loader: Iterable[Any], num_batches: int | None = None) -> int:
    """Replace batch-norm running statistics by those of the data, under hard gates.

    Mean and biased variance over all samples and positions (Eq. 7), accumulated in float64. Every
    layer but batch-norm runs in eval mode; no weight and no gate changes. Use shuffled batches
    with the training augmentation: class-sorted data costs several points of accuracy.

    Args:
        model: a gated model, or any other; changed in place.
        loader: yields inputs, or tuples whose first element is the input, or dicts of keyword
            arguments.
        num_batches: how many batches to use at most; all of them by default.

    Returns:
        The number of batches used.

    Raises:
        ModelError: `model` is not an `nn.Module`, or lies on the meta device.
        InputError: the loader yields no batch, its batches give NaN statistics, or `num_batches`
            is below 1.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> swan.calibrate(net, [torch.randn(16, 3, 8, 8) for _ in range(4)])  # batches used
        4
        >>> bool(net[1].running_var.ne(1).all())
        True
    """
    check_is_module(model)
    for own in model.modules():
        if isinstance(how := getattr(own, "calibrated_by", None), str):
            raise ModelError(f"{type(own).__name__} has statistics of its own: {how}")
    return measure_norms_(model, loader, num_batches)


def measure_norms_(model: nn.Module, loader: Iterable[Any], num_batches: int | None = None) -> int:
    """`calibrate` of any model, whatever else has statistics in it."""
    check_data(model, to="calibrate")
    batches = batches_in(loader, num_batches)
    norms = norms_of(model)
    if not norms:
        warnings.warn(
            f"{type(model).__name__} has no batch-norm that keeps statistics, so there is nothing to "
            f"calibrate; cut without it",
            SwanWarning,
            stacklevel=3,
        )
    moments = {norm: Moments() for norm in norms}
    with _observing(model, moments):
        used = _run(model, batches)
    if not used:
        raise InputError("the loader yielded no batch; batch-norm statistics are unchanged")
    if any(m.mean is not None and not m.count for m in moments.values()):
        raise InputError("the batches hold no samples; batch-norm statistics are unchanged")
    if not all(m.squares is None or bool(m.squares.isfinite().all()) for m in moments.values()):
        raise InputError("the batches give NaN or infinite statistics; they are unchanged")
    for norm, own in moments.items():
        if own.mean is not None and own.squares is not None:
            assert norm.running_mean is not None  # noqa: S101 - selected above
            assert norm.running_var is not None  # noqa: S101 - selected above
            norm.running_mean.copy_(own.mean)
            norm.running_var.copy_(own.squares / own.count)
    return used


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _observing(model: nn.Module, moments: Mapping[_BatchNorm, Moments]) -> Iterator[None]:
    """Everything in eval mode but the norms, which are watched; all as before afterwards."""
    kept = [(norm, _statistics(norm)) for norm in moments]
    handles = [
        norm.register_forward_pre_hook(_observe(own), with_kwargs=True)
        for norm, own in moments.items()
    ]
    try:
        with evaluating(model):
            for norm in moments:
                norm.train()  # normalises by the batch, so that what follows sees what it will see
            yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, before in kept:
            _restore(norm, before)


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    used = 0
    with torch.no_grad(), streams_kept():
        for batch in batches:
            run_on_batch(model, batch)
            used += 1
    return used


def _observe(moments: Moments) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        moments.update(args[0] if args else kwargs["input"])

    return hook


def _statistics(norm: _BatchNorm) -> list[Tensor | None]:
    own = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return [None if t is None else t.clone() for t in own]


def _restore(norm: _BatchNorm, before: list[Tensor | None]) -> None:
    own = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    for tensor, value in zip(own, before, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)
