"""Gates that act while the base model runs its own Python code.

Closing a unit makes every layer that sums over it read zero. Where that layer's weight is a
parameter W, scaling the columns of W that read the unit does exactly that, wherever and however W
is used: in a module, in a functional call, in code that no tracer can follow.

A gate acts where the parameter's owner is asked for it: the module keeps its class as a base, and its
attribute gives the scaled parameter while the gated model runs. Values are computed from the logits at
each use, so that a part of the model that runs again in the backward pass (activation checkpointing)
computes what it computed before, and that threads share nothing but the logits. Statistics over
channels are weighed in the forward of the module that takes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.calls.mode import CallMode, Change, guard_of
from swan_surgery.gates.bank import GateBank
from swan_surgery.gates.sites import ParameterGate, StatisticGate
from swan_surgery.gates.weighted_statistics import weighing
from swan_surgery.models.subclasses import maker_of, subclass_of, written_class


_OWN = "_swan_gates"  # the attribute of a module that holds its `_Owned`


class _Run:
    """One run of a gated model in one thread, or what one backward pass runs again of it."""

    def __init__(self, bank: GateBank) -> None:
        self._bank = bank
        self._is_open: Tensor | None = None
        self.modes: list[CallMode] = []

    @property
    def is_open(self) -> Tensor:
        """The open mask as numbers, asked for once; without gradients, so that autograd keeps nothing of it."""
        if self._is_open is None:
            with torch.no_grad():
                is_open = self._bank.open_mask().to(self._bank.logits.dtype)
            if torch.compiler.is_compiling():
                return is_open  # branches of torch.cond must set nothing
            self._is_open = is_open
        return self._is_open


class Acting:
    """Whether gates act on a model in place at the moment: while it runs, thread by thread.

    In a backward pass they act too: whatever runs there of the model runs again.
    """

    def __init__(self, bank: GateBank) -> None:
        self._bank = bank
        self._running: dict[int, list[_Run]] = {}
        self._again: dict[int, tuple[int, _Run]] = {}

    @property
    def is_training(self) -> bool:
        """Which mode's statistics are weighed: the gated model's, not that of single modules."""
        return self._bank.training

    def now(self) -> _Run | None:
        """The run that is under way in this thread."""
        if (
            torch.compiler.is_compiling()
        ):  # no thread has a name there; regions are compiled while they run
            return next((runs[-1] for runs in self._running.values() if runs), None)
        thread = get_ident()
        runs = self._running.get(thread)
        if runs:
            return runs[-1]
        task: int = torch._C._current_graph_task_id()  # noqa: SLF001 - as torch.utils.checkpoint does
        if task == -1:
            return None
        known, run = self._again.get(thread, (-1, None))
        if known != task or run is None:
            run = _Run(self._bank)
            self._again[thread] = (task, run)
        return run

    @contextmanager
    def begin(self) -> Iterator[None]:
        """The gates act in this thread inside the block."""
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        runs = self._running.setdefault(thread, [])
        runs.append(_Run(self._bank))
        try:
            yield
        finally:
            runs.pop()
            if not runs:
                self._running.pop(thread, None)
            self._again.pop(thread, None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy runs nowhere yet."""
        return {"_bank": self._bank, "_running": {}, "_again": {}}


@dataclass(slots=True)
class _Owned:
    """The gates of one module.

    Attributes:
        acting: of the gated model.
        parameters: name of an own parameter -> the gates that scale it.
        statistics: the gates that weigh calls in this module's forward.
        forward: of the instance, where it has one of its own.
    """

    acting: Acting
    parameters: dict[str, list[ParameterGate]] = field(default_factory=dict)
    statistics: list[StatisticGate] = field(default_factory=list)
    forward: Callable[..., Any] | None = None


def gate_modules_(model: nn.Module, sites: Mapping[str, nn.Module], bank: GateBank) -> Acting:
    """Let gates act on a private model wherever it runs inside `Acting.begin()`.

    Args:
        model: a copy of the base model.
        sites: parameter gates and statistic gates.
        bank: where their values come from.
    """
    acting = Acting(bank)
    owned: dict[str, _Owned] = {}
    for site in sites.values():
        if isinstance(site, ParameterGate):
            for name in site.names:
                owner, _, leaf = name.rpartition(".")
                entry = owned.setdefault(owner, _Owned(acting))
                entry.parameters.setdefault(leaf, []).append(site)
        elif isinstance(site, StatisticGate):
            owned.setdefault(site.module, _Owned(acting)).statistics.append(site)
    done: dict[int, nn.Module] = {}
    for name, entry in owned.items():
        module = model.get_submodule(name)
        if id(module) in done:  # the same module under another name has the same parameters
            continue
        done[id(module)] = module
        own = vars(module)
        if entry.statistics and "forward" in own:
            entry.forward = own.pop("forward")
        own[_OWN] = entry
        names = tuple(sorted(entry.parameters))
        module.__class__ = subclass_of(type(module), _gated, names, bool(entry.statistics))
    return acting


def ungate_modules_(model: nn.Module) -> nn.Module:
    """Undo `gate_modules_` on a private copy; other models stay as they are."""
    for module in model.modules():
        if maker_of(module) is _gated:
            module.__class__ = written_class(module, _gated)
            owned: _Owned = vars(module).pop(_OWN)
            if owned.forward is not None:
                vars(module)["forward"] = owned.forward
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()  # noqa: SLF001 - as they are now
    return model


def _gated(
    base: type[nn.Module],
    names: tuple[str, ...],
    has_statistics: bool,  # noqa: FBT001 - part of a key
) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The subclass of a module's class whose parameters, and forward, are gated."""
    namespace: dict[str, Any] = {name: property(_reader(name)) for name in names}
    if issubclass(base, nn.RNNBase):
        # Its forward reads a list of the parameters, and makes it anew where they are others.
        namespace["_flat_weights"] = property(_read_flat, _keep_flat)
        namespace["_update_flat_weights"] = lambda _self: None
    if has_statistics:
        namespace["forward"] = _weighed(base)
    return (base,), namespace


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(self: nn.Module) -> Tensor:
        parameter: Tensor = self._parameters[name]  # type: ignore[assignment]
        owned: _Owned = self.__dict__[_OWN]
        run = owned.acting.now()
        if run is None:
            return parameter
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - no call of the model's own code
            for site in owned.parameters[name]:
                parameter = site(site.values(run.is_open), parameter)
        return parameter

    return read


def _read_flat(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _keep_flat(self: nn.RNNBase, value: list[Tensor | None]) -> None:
    vars(self)["_flat_weights"] = value


def _weighed(base: type[nn.Module]) -> Callable[..., Any]:
    @wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        owned: _Owned = self.__dict__[_OWN]
        inner = owned.forward
        run = owned.acting.now()
        training = owned.acting.is_training
        sites = [site for site in owned.statistics if site.in_training == training]
        if run is None or not sites:
            return base.forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - no calls of the model's own code
            weights = [site.values(run.is_open) for site in sites]
        changes = {
            site.call: Change(instead=weighing(site.call[0], own), site=site.site)
            for site, own in zip(sites, weights, strict=True)
        }
        guard = guard_of(changes)
        mode = CallMode(changes, guard, tuple(run.modes))
        run.modes.append(mode)
        try:
            with mode:
                result = (
                    base.forward(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)
                )
        finally:
            run.modes.pop()
        guard.finish()
        return result

    return forward
