"""One rehearsal: some units are closed, a shell is cut and run beside its recording."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from swan_surgery.channels.labels.fields import Fields
from swan_surgery.channels.rehearsal.failures import Failure, failure_of
from swan_surgery.channels.rehearsal.meanings import New
from swan_surgery.channels.rehearsal.numbers import Place, resize_all_
from swan_surgery.channels.rehearsal.rehearsing import Prediction, RehearsalMode
from swan_surgery.channels.rehearsal.skipping import skipping
from swan_surgery.channels.runs.tracing import label_tensors, run_labelled
from swan_surgery.channels.solving.arrays import Flags
from swan_surgery.channels.solving.mapping import Solution, Trace
from swan_surgery.errors import PathError
from swan_surgery.models.attributes import Followers, follow_
from swan_surgery.models.slicing import cut_
from swan_surgery.models.tensors import named_tensors


def rehearse(
    solution: Solution,
    trace: Trace,
    make_shell: Callable[[], nn.Module],
    stays: Flags,
    followers: Followers,
    resizes: Mapping[Place, New],
) -> list[Failure]:
    """Cut a shell to the components that stay and run it; returns what did not follow.

    Where the model's code raises, another run skips the modules that do: what it finds beyond them
    is tentative.
    """

    def once(*, skips: bool) -> tuple[list[Failure], bool]:
        return _run(solution, trace, make_shell(), stays, followers, resizes, skips=skips)

    failures, ended = once(skips=False)
    if ended:
        return failures
    return failures + [failure for failure in once(skips=True)[0] if failure.is_tentative]


def _run(
    solution: Solution,
    trace: Trace,
    shell: nn.Module,
    stays: Flags,
    followers: Followers,
    resizes: Mapping[Place, New],
    *,
    skips: bool,
) -> tuple[list[Failure], bool]:
    """What did not follow, and whether the run came to its end."""
    prediction = _prediction(solution, stays)
    cuts: dict[str, dict[int, Tensor]] = {}
    fields: dict[str, Fields] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(shell)}
    for name, own in solution.labelled.fields.items():
        after = prediction.after(own, shapes[name])
        assert after is not None  # noqa: S101 - starting fields lie along one axis each
        fields[name] = after[0]
    for (name, axis, size), start in zip(
        solution.labelled.axes, solution.labelled.starts, strict=True
    ):
        keep = stays[solution.component[start : start + size]]
        if not keep.all():
            cuts.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(keep))
    cut_(shell, cuts)
    remains = torch.from_numpy(stays[solution.component])
    follow_(shell, followers, remains)
    resize_all_(shell, resizes, remains)
    shell.train(trace.training)
    device = next((p.device for p in shell.parameters()), torch.device("meta"))
    mode = RehearsalMode(trace.recording.ops, prediction, trace.recording.runs, device)
    mode.frames.left = iter(trace.recording.left)
    label_tensors(mode.labels, shell, fields)
    names = {id(module): name for name, module in shell.named_modules()}
    try:
        with skipping(mode, shell, names) if skips else nullcontext():
            run_labelled(mode, shell, shell, trace.inputs.args, trace.inputs.kwargs)
    except PathError as err:
        # At that size the cut model says so itself. At the given one, a number was learned elsewhere.
        if not trace.is_elsewhere:
            mode.note(failure_of(err, mode.next_index, names=names, makers=mode.makers))
        return mode.failures, trace.is_elsewhere
    except Exception as err:  # noqa: BLE001 - the model's own code may raise anything
        mode.note(failure_of(err, mode.next_index, names=names, makers=mode.makers))
        return mode.failures, False
    finally:
        # A cycle, while garbage collection is paused: every rehearsal would stay in memory.
        mode.frames.recover = None
    return mode.failures, True


def _prediction(solution: Solution, stays: Flags) -> Prediction:
    unit_of = torch.cat([torch.tensor([-1]), torch.from_numpy(solution.component)])
    unit_of[1] = 0
    # Units are components + 1, so that 0 and -1 keep their meaning.
    unit_of[2:] += 1
    stays_lut = torch.cat([torch.ones(2, dtype=torch.bool), torch.from_numpy(stays)])
    fixed = torch.zeros(2, dtype=torch.bool)
    prunable = torch.cat([fixed, torch.from_numpy(solution.prunable)])
    return Prediction(unit_of, stays_lut, prunable, solution.units)
