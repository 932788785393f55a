"""From a model and settings to a smaller model: dense, gated, cut, fine-tuned; resumable after a kill.

Every random number follows from the seed, the stage, the epoch and the step, and a checkpoint is written
after each epoch, and inside of them where asked for: a run that was killed and started again ends bitwise
like one that was not (on a CPU, with the same number of threads).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from swan_surgery.artifacts import load
from swan_surgery.calibration import calibrate, norms_of
from swan_surgery.compressing.cutter import share_of_now
from swan_surgery.costs.macs import count_macs
from swan_surgery.costs.params import count_params
from swan_surgery.cutting.pruning import prune
from swan_surgery.environment.locking import alone_in
from swan_surgery.experiments.classifier.data import Data
from swan_surgery.experiments.classifier.outcome import Narrator, Outcome
from swan_surgery.experiments.classifier.run import Run
from swan_surgery.experiments.classifier.scored import halfway, scored_stage
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.classifier.steps import check_logits
from swan_surgery.experiments.processes import Processes, alone_on
from swan_surgery.gates import GatedModel
from swan_surgery.gates.conversion import swanify
from swan_surgery.learning.objective import Objective
from swan_surgery.learning.ramps import CosineRamp
from swan_surgery.models import copy_of
from swan_surgery.selection.limits import limits_of
from swan_surgery.selection.ordering import ranking
from swan_surgery.selection.widest_mask import widest_mask


def run_experiment(
    model: nn.Module,
    settings: TrainSettings,
    data: Data,
    *,
    folder: Path,
    narrator: Narrator,
    fresh: bool = False,
    processes: Processes | None = None,
) -> Outcome:
    """Train, gate, cut and fine-tune a copy of a model that classifies images.

    Args:
        model: takes [B, C, H, W] and returns logits [B, classes].
        settings: what to do.
        data: from `load_data`.
        folder: exists; holds the checkpoint, and `dense.swan` and `gated.swan` once made.
        narrator: told what happens; `Silent` for all processes but the first.
        fresh: start anew, whatever the folder holds of an earlier run.
        processes: from `joined`: those that train together, in one folder that all can read; by default this
            one alone.

    Raises:
        InputError: batches that cannot be shared out; outputs that are no logits; a checkpoint of other settings.
        BudgetError: the budget cannot be reached; before anything is trained.
        WritingError: another training is under way in the folder.
    """
    processes = processes or alone_on(settings.device)
    run = Run(settings, data, folder, narrator, processes)
    with processes.first_alone(alone_in(folder, "training")), torch.random.fork_rng():
        if fresh and processes.is_first:
            run.file.unlink(missing_ok=True)
        processes.wait()
        run.resume_()
        processes.wait()  # nothing is written before all have read
        dense = copy_of(model).to(run.device)
        check_logits(dense, run.example, num_classes=data.classes)
        # Refuse what cannot work before hours are spent on the dense model.
        gated = swanify(dense, run.example, ignore=settings.ignore)
        _check_reachable(run, gated)
        channels = gated.channels
        run.whole = {
            "macs": count_macs(dense, run.example),
            "params": count_params(dense),
            "units": channels.num_units,
        }
        dense = _dense_stage(run, dense)
        if settings.chosen_by == "scores":
            small = scored_stage(run, dense)
        else:
            gated = _gated_stage(run, dense)
            small = _finetune_stage(run, gated, dense)
        if settings.baseline:
            _baseline_stage(run, dense)
    return Outcome(
        dense=dense,
        small=small,
        gated=gated,
        channels=channels,
        example=run.example,
        scores=run.scores,
        macs=(run.whole["macs"], count_macs(small, run.example)),
        params=(run.whole["params"], count_params(small)),
        history=run.history,
        probabilities=run.probabilities,
        seconds=run.seconds(),
    )


def _dense_stage(run: Run, model: nn.Module) -> nn.Module:
    file = run.folder / "dense.swan"
    if "dense" in run.scores:
        model = load(file, model).to(run.device)
    else:
        run.train("dense", model, run.settings.dense_epochs)
        run.store(model, file.name)
    run.finish("dense", model)
    return model


def _gated_stage(run: Run, dense: nn.Module) -> GatedModel:
    file = run.folder / "gated.swan"
    if "gated" in run.scores:
        gated = load(file, dense).to(run.device)
        assert isinstance(gated, GatedModel)  # noqa: S101 - that is what was saved
    else:
        gated = _gates_in(run, dense)
        objective = _objective_of(run, gated)
        run.train("gated", gated, run.settings.gate_epochs, teacher=dense, objective=objective)
        objective(run.settings.gate_epochs)  # the last step moved weights, and perhaps gates
        _calibrate(run, gated)
        run.store(gated, file.name)
    run.finish("gated", gated)
    return gated


def _gates_in(run: Run, dense: nn.Module) -> GatedModel:
    """In the dense model, or in what a first cut left of it."""
    if run.settings.chosen_by == "both":
        return halfway(run, dense)
    gated = swanify(dense, run.example, ignore=run.settings.ignore)
    gated.gates.min_width = run.settings.min_width
    return gated


def _budgets_of(run: Run, gated: GatedModel) -> dict[str, Any]:
    """The budgets as shares of what carries the gates."""
    budgets = run.settings.budgets
    if run.settings.chosen_by != "both":
        return budgets
    now = {"macs": count_macs(gated.model, run.example), "params": count_params(gated.model)}
    return {
        name: share_of_now(share, 1.0, run.whole[name], now[name])
        for name, share in budgets.items()
    }


def _objective_of(run: Run, gated: GatedModel) -> Objective:
    settings = run.settings
    return Objective(
        gated,
        **_budgets_of(run, gated),
        learning=settings.learning,  # type: ignore[arg-type]  # checked by the settings
        ramp=CosineRamp(length=settings.ramp * settings.gate_epochs),
        freeze_after=(1 - settings.freeze) * settings.gate_epochs,
    )


def _finetune_stage(run: Run, gated: GatedModel, dense: nn.Module) -> nn.Module:
    file = run.folder / "pruned.swan"
    if "finetuned" in run.scores:
        small = load(file, dense).to(run.device)
    else:
        small = _cut(run, gated)
        run.train("finetuned", small, run.settings.finetune_epochs, teacher=dense)
        run.store(small.eval(), file.name)
    run.finish("finetuned", small)
    return small


def _baseline_stage(run: Run, dense: nn.Module) -> None:
    """The dense model with the epochs that the small one had, so that the comparison is fair."""
    if "baseline" not in run.scores:
        longer = copy_of(dense)
        run.train("baseline", longer, run.settings.gate_epochs + run.settings.finetune_epochs)
        run.store(longer.eval(), "baseline.swan")
        run.finish("baseline", longer)


def _check_reachable(run: Run, gated: GatedModel) -> None:
    """The budgets, by gates alone and with rounded widths."""
    gated.gates.min_width = run.settings.min_width
    Objective(gated, **run.settings.budgets)
    limits = limits_of(gated, **run.settings.budgets)
    widest_mask(gated, ranking(gated), limits, round_to=run.settings.round_to)


def _cut(run: Run, gated: GatedModel) -> nn.Module:
    settings = run.settings
    if settings.round_to == 1:
        small = prune(gated)
    else:
        small = prune(gated, round_to=settings.round_to, **_budgets_of(run, gated))
        _calibrate(run, small)
    run.finish("pruned", small)
    return small


def _calibrate(run: Run, model: nn.Module) -> None:
    """By the same batches in every process."""
    if run.settings.calibration and norms_of(model):
        batches = ((x.to(run.device), y) for x, y in run.batches("calibration", 0))
        calibrate(model, batches, run.settings.calibration)
        run.processes.agree_(model)


__all__ = ["run_experiment"]
