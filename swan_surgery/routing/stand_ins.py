"""Modules that stand for others while a model's own code runs in part: one ends the run, one begins it, others are passed."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swan_surgery.errors import InputError, ModelError
from swan_surgery.models import shell_of
from swan_surgery.routing.blank_reads import BlankReads


INPUTS = ""  # the key of the model's own inputs among what ran before


class ReachedError(Exception):
    """Carries what crosses out of the model's code."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a tensor for any batch: `sizes` where an axis does not follow the batch, `times` where it does."""

    sizes: tuple[int, ...]
    times: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, one: Tensor, two: Tensor, batch: int) -> "Shape":
        """From the same tensor at a batch and at twice that."""
        pairs = list(zip(one.shape, two.shape, strict=True))
        times = tuple(0 if a == b else a // batch for a, b in pairs)
        return cls(tuple(one.shape), times, one.dtype)

    def blank(self, like: Tensor, floating: torch.dtype) -> Tensor:
        """Holds nothing: NaN, or zero. `floating`: the type of what crossed when the model was cut."""
        batch = like.shape[0]
        sizes = [t * batch if t else s for s, t in zip(self.sizes, self.times, strict=True)]
        value = float("nan") if self.dtype.is_floating_point or self.dtype.is_complex else 0
        # Where it had the type of what crosses it goes along with it: the model may have been moved since.
        kind = like.dtype if self.dtype == floating else self.dtype
        return torch.full(sizes, value, dtype=kind, device=like.device)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor has these sizes, for whatever batch."""
        pairs = zip(tensor.shape, self.sizes, self.times, strict=False)
        return tensor.ndim == len(self.sizes) and all(a == b or times for a, b, times in pairs)


class Carry(threading.local):
    """What a rest shares with its modules while it runs, in each thread by itself.

    Attributes:
        value: what crosses.
        calls: how often each module that ran before was called.
        has_crossed: the code has come to the switch.
        blanks: follows what is computed from blanks.
    """

    def __init__(self, floating: torch.dtype = torch.float32) -> None:
        self.floating = floating
        self.value: Tensor | None = None
        self.calls: dict[str, int] = {}
        self.has_crossed = False
        self.blanks: BlankReads | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Carry, (self.floating,)

    def crossing(self) -> Tensor:
        """What crosses in the run that goes on.

        Raises:
            ModelError: none does.
        """
        if self.value is None:
            raise ModelError(
                "code in front of a switch runs outside of its model: the model is cut as it runs, and activation "
                "checkpointing, say, runs it again in backward; switch behind the part that is checkpointed"
            )
        return self.value

    def blank(self, structure: Any, name: str) -> Any:
        """What ran before under a name, without values."""
        like = self.crossing()

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Shape):
                return leaf
            found = leaf.blank(like, self.floating)
            if self.blanks is not None:
                self.blanks.mark(found, frozenset([name]))
            return found

        return tree_map(made, structure)


def _of_another(others: list[nn.Module | None] | None, name: str) -> Any:
    """An attribute of the module stood for: the code around may ask for the type of a weight, or a setting."""
    if not others or others[0] is None or name.startswith("__"):
        raise AttributeError(name)
    return getattr(others[0], name)


class Stand(nn.Module):
    """Stands for a module that ran in the trunk: gives its outputs' shapes, and nothing in them."""

    def __init__(self, name: str, stood_for: nn.Module, outputs: list[Any], carry: Carry) -> None:
        super().__init__()
        self.name, self._outputs, self._carry = name, outputs, carry
        self._stood_for = [shell_of(stood_for)]  # in a list: it is no child

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """As the module that ran, without its values."""
        carry = self._carry
        carry.crossing()
        call = carry.calls.get(self.name, 0)
        carry.calls[self.name] = call + 1
        return carry.blank(self._outputs[call], self.name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _of_another(vars(self).get("_stood_for"), name)


class Entry(Stand):
    """Stands for the module whose output crosses."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """What crosses."""
        self._carry.has_crossed = True
        return self._carry.crossing()


class Exit(nn.Module):
    """Ends the run with a module's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Does not come back."""
        raise ReachedError(self.module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _of_another([vars(self).get("_modules", {}).get("module")], name)


class RunningTrunk(nn.Module):
    """The model's own code up to a module's output.

    Attributes:
        given: shapes of its arguments, (args, kwargs).
    """

    def __init__(self, model: nn.Module, given: Any) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model takes; returns what crosses."""
        try:
            self.model(*args, **kwargs)
        except ReachedError as reached:
            return reached.value
        raise InputError(
            "this input takes a path through the model's code that never reaches the switch"
        )


class RunningRest(nn.Module):
    """The model's own code from a module's output on; on a copy of what crosses, for it may work on it in place."""

    def __init__(self, model: nn.Module, carry: Carry, given: Any, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.carry, self._given, self._sizes = carry, given, sizes

    def forward(self, crossing: Tensor) -> Any:
        """What the model returns."""
        if tuple(crossing.shape[1:]) != self._sizes:
            raise InputError(
                f"a model that is cut as it runs takes inputs of the example's size: {list(self._sizes)} crosses "
                f"per sample there, here {list(crossing.shape[1:])}; add a switch for inputs of this size"
            )
        carry = self.carry
        carry.value, carry.has_crossed = crossing.clone(), False
        carry.calls.clear()
        try:
            args, kwargs = carry.blank(self._given, INPUTS)
            return self.model(*args, **kwargs)
        finally:
            carry.value = None


class Gone(nn.Module):
    """Stands in a trunk for a module that runs behind it."""

    def __init__(self, stood_for: nn.Module) -> None:
        super().__init__()
        self._stood_for = [shell_of(stood_for)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _of_another(vars(self).get("_stood_for"), name)
