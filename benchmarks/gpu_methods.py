"""The methods of figure 5, each from the same dense network through the same number of epochs.

A run is: learn or score, cut, note the accuracy right after the cut (`cut_uncalibrated_*`, and
`cut_*` with batch-norm statistics measured anew or, where the method's name says so, compensated), train
the rest of the epochs, note the end.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from _measure import commit, source_hash
from gpu_runs import DENSE, Run
from gpu_training import Task, accuracy, train
from quality_peers import as_units, nearest_cut, pruner
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.environment.machine import device_name


_OPEN, _CLOSED = 3.0, -3.0
_GATE_LR = 0.2
_HALVINGS = 16


def measured(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """The row of a run.

    Raises:
        OutOfTimeError: the clock ended; there is no row.
    """
    torch.manual_seed(1000 + run.seed)
    start = time.monotonic()
    facts: dict[str, Any] = {**asdict(run), "dense_test": accuracy(dense, task.splits.test)}
    facts |= _METHODS[run.method](run, task, dense)
    return facts | {
        "seconds": round(time.monotonic() - start, 2),
        "num_train": len(task.splits.train),
        "settings": asdict(task.settings),
        "device": device_name(task.device),
        "date": datetime.now(UTC).date().isoformat(),
        "source": source_hash(),
        "commit": commit(),
    }


def _no_change(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """The dense network itself: what the others are compared with."""
    del run
    found = _accuracies(dense, task, "")
    return {"macs_share": 1.0, "params": swan.count_params(dense), **found}


def _longer(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """The dense network, trained as long as the pruned ones are."""
    return _finished(copy.deepcopy(dense), run, task, dense, 0)


def _gates(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """Weights and gates together, then the cut."""
    joint = round(task.settings.joint * run.epochs * task.steps)
    gated = swan.swanify(dense, task.example())
    options: dict[str, Any] = {"preset": "paper"} if run.method == "paper" else {}
    ramp = swan.CosineRamp(length=task.settings.ramp * joint)
    objective = swan.Objective(gated, macs=run.budget, ramp=ramp, **options)
    groups = swan.parameter_groups(
        gated, lr=task.settings.lr, gate_lr=_GATE_LR, weight_decay=task.settings.weight_decay
    )
    _train(gated, run, task, (0, joint), groups=groups, objective=objective)
    objective(joint)
    return _finished(swan.prune(gated, macs=run.budget), run, task, dense, joint)


def _fisher(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """One shot by the Fisher score per MAC."""
    return _finished(_cut_by_fisher(dense, run.budget, run, task), run, task, dense, 0)


def _staged(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """Several cuts within the same epochs, each scored and compensated anew, with training in between."""
    steps = run.epochs * task.steps
    plan = swan.stages(run.budget, steps=steps)
    model = dense
    for stage, following in pairwise(plan):
        small = _cut_by_fisher(model, stage.share, run, task)
        _compensate(small, model, run, task)
        _train(small, run, task, (stage.step, following.step))
        model = small
    small = _cut_by_fisher(model, run.budget, run, task)
    return _finished(small, run, task, dense, plan[-1].step, reference=model)


def _cut_by_fisher(model: nn.Module, share: float, run: Run, task: Task) -> nn.Module:
    gated = swan.swanify(model, task.example())
    scores = swan.importance(
        gated,
        "fisher",
        batches=task.some(task.settings.score_batches, 64, 77 + run.seed),
        loss=lambda own, batch: F.cross_entropy(own(batch[0]), batch[1]),
    )
    return swan.prune_by_score(gated, scores, macs=share, of="original")


def _torch_pruning(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """Torch-Pruning's L2 with the same ratio in every layer: the usual channel pruning."""
    score, example = tp.importance.GroupMagnitudeImportance(p=2), task.example()
    small = nearest_cut(
        dense,
        lambda trial, ratio: pruner(trial, score, ratio, example=example),
        example,
        run.budget * swan.count_macs(dense, example),
        rounds=task.settings.tp_rounds,
        finished=lambda cut: as_units(cut, dense, example) if _is_compensated(run) else cut,
    )
    return _finished(small, run, task, dense, 0)


def _dropout(run: Run, task: Task, dense: nn.Module) -> dict[str, Any]:
    """Dropout at the share of channels that leaves the budget's FLOPs, in training and at inference.

    The paper shows dropout on the axis of FLOPs that are left without saying what that means, as all
    units of a dropout network are active at inference. Taken here: channels are dropped at random, and
    of every layer the same share stays, the one that leaves the budget's MACs: about sqrt(budget),
    because MACs go with the product of two widths. In training each step draws anew; what is tested is the network cut to one random draw, with
    batch-norm statistics of its own. After the cut: dropout at inference alone; at the end: trained
    with it for all epochs, as all methods are.
    """
    gated = swan.swanify(dense, task.example())
    keep = close_at_random_(gated, run.budget, run.seed)
    cut = swan.prune(gated)
    facts = _accuracies_after_cut(cut, run, task, dense)
    generator = task.generator(run.seed)

    @contextmanager
    def dropping() -> Iterator[None]:
        drawn = torch.rand(gated.gates.num_units, generator=generator, device=task.device)
        with gated.gates.holding(drawn < keep):
            yield

    options = {"lr": task.settings.lr, "weight_decay": task.settings.weight_decay}
    groups = [{"params": list(gated.model.parameters()), **options}]
    _train(gated, run, task, (0, run.epochs * task.steps), groups=groups, around=dropping)
    cut = swan.prune(gated)
    _calibrate(cut, run, task)
    return facts | {"kept_share": keep} | _accuracies(cut, task, "")


def close_at_random_(gated: swan.GatedModel, budget: float, seed: int) -> float:
    """Close all but one share of the units of every group, the largest that meets the budget; returns it."""
    drawn = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(seed))
    place = drawn.clone()  # of a unit in the order of its group, from 0 to 1; alone: as drawn
    for group in gated.channels.unit_groups:
        members = torch.tensor(group)
        order = members[drawn[members].argsort()]
        # By less than one place apart, so that groups do not step all at once.
        place[order] = (torch.arange(len(group)) + drawn[order]) / len(group)
    low, high = 0.0, 1.0
    total = _macs_of_share(gated, place, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = _macs_of_share(gated, place, middle) <= budget * total
        low, high = (middle, high) if fits else (low, middle)
    _macs_of_share(gated, place, low)
    return low


def _macs_of_share(gated: swan.GatedModel, place: Tensor, share: float) -> int:
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(place < share, _OPEN, _CLOSED) - 0.1 * place)
    return swan.hard_macs(gated)


_METHODS: dict[str, Callable[[Run, Task, nn.Module], dict[str, Any]]] = {
    DENSE: _no_change,
    "dense-longer": _longer,
    "ours": _gates,
    "paper": _gates,
    "score-fisher": _fisher,
    "fisher-compensated": _fisher,
    "staged-compensated": _staged,
    "tp-l2": _torch_pruning,
    "tp-l2-compensated": _torch_pruning,
    "dropout": _dropout,
}


def _finished(
    small: nn.Module,
    run: Run,
    task: Task,
    dense: nn.Module,
    first: int,
    *,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Note the cut of `reference` (or of the dense network), train from step `first` on, note the end."""
    facts = _accuracies_after_cut(small, run, task, dense, reference=reference)
    _train(small, run, task, (first, run.epochs * task.steps))
    return facts | _accuracies(small, task, "")


def _train(model: nn.Module, run: Run, task: Task, part: tuple[int, int], **options: Any) -> None:
    """Steps of the one cycle that all methods share; each part draws batches of its own."""
    generator = task.generator(1000 * (run.seed + 1) + part[0])
    train(model, task, task.settings.lr, (*part, run.epochs * task.steps), generator, **options)


def _is_compensated(run: Run) -> bool:
    return run.method.endswith("-compensated")


def _compensate(small: nn.Module, reference: nn.Module, run: Run, task: Task) -> float:
    """With as many images as batch-norms are calibrated with; the seconds that it took."""
    own = task.some(task.settings.calibration_batches, task.settings.batch, 77 + run.seed)
    return swan.compensate(small, reference, own).seconds


def _calibrate(model: nn.Module, run: Run, task: Task) -> None:
    own = task.some(task.settings.calibration_batches, task.settings.batch, 77 + run.seed)
    swan.calibrate(model, [x for x, _ in own])


def _accuracies_after_cut(
    small: nn.Module,
    run: Run,
    task: Task,
    dense: nn.Module,
    *,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    example: Tensor = task.example()
    facts: dict[str, Any] = _accuracies(small, task, "cut_uncalibrated_")
    if _is_compensated(run):
        seconds = _compensate(small, reference or dense, run, task)
        facts["compensation_seconds"] = round(seconds, 2)
    else:
        _calibrate(small, run, task)
    return {
        **facts,
        **_accuracies(small, task, "cut_"),
        "macs_share": swan.count_macs(small, example) / swan.count_macs(dense, example),
        "params": swan.count_params(small),
    }


def _accuracies(model: nn.Module, task: Task, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}test": accuracy(model, task.splits.test),
        f"{prefix}validation": accuracy(model, task.splits.validation),
    }
