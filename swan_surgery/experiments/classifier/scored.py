"""Units chosen by scores: one cut or several, weights behind each solved for anew, training in between and after."""

from itertools import islice
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.artifacts import load
from swan_surgery.compressing.cutter import Budget, Choice, Cutter
from swan_surgery.experiments.classifier.run import Run
from swan_surgery.gates import GatedModel
from swan_surgery.learning.stages import stages
from swan_surgery.models.batches import run_on_batch


def scored_stage(run: Run, dense: nn.Module) -> nn.Module:
    """The smaller model, cut by scores and trained; its accuracy is noted."""
    file = run.folder / "pruned.swan"
    if "finetuned" in run.scores:
        small = load(file, dense).to(run.device)
    else:
        small = _cut_and_train(run, dense)
        run.store(small.eval(), file.name)
    run.finish("finetuned", small)
    return small


def halfway(run: Run, dense: nn.Module) -> GatedModel:
    """Gates in what one cut left, to the square root of the budget; widths are rounded in the end alone."""
    cutter, file = _cutter_of(run, dense, round_to=1), run.folder / "halfway.swan"
    if "halfway" not in run.scores:
        run.store(cutter.cut(dense, 0.5), file.name)
        run.narrator.say(f"Half of the way: {cutter.done[-2]}.")
    small = load(file, dense).to(run.device)  # the same in all processes
    run.finish("halfway", small)
    return cutter.gate(small)


def _cutter_of(run: Run, dense: nn.Module, *, round_to: int) -> Cutter:
    settings = run.settings
    count = max(settings.calibration, settings.compensation, 1)
    return Cutter(
        dense,
        run.example,
        list(islice(run.batches("calibration", 0), count)),
        Budget(settings.macs or None, settings.params or None, None),
        Choice(_cross_entropy, "fisher", settings.ignore, round_to, settings.min_width),
        lambda _text, _share: None,
        compensated_with=settings.compensation,
    )


def _cut_and_train(run: Run, dense: nn.Module) -> nn.Module:
    """Goes on where the checkpoint is: `now` says which cut was the last."""
    settings = run.settings
    total = settings.gate_epochs + settings.finetune_epochs
    cutter = _cutter_of(run, dense, round_to=settings.round_to)
    plan = stages(cutter.budget.least, steps=total)
    done = run.now["cut"] if run.now.get("stage") == "finetuned" else -1
    model = dense if done < 0 else load(_file(run, done), dense).to(run.device)
    for index in range(max(done, 0), len(plan)):
        if index > done:
            model = cutter.cut(model, (index + 1) / len(plan))
            run.narrator.say(f"Cut {index + 1} of {len(plan)}: {cutter.done[-2]}.")
            run.store(model, _file(run, index).name)
            if not run.processes.is_first:  # scores may round otherwise there
                model = load(_file(run, index), dense).to(run.device)
            if index + 1 == len(plan):
                run.note("pruned", model)
            run.now = {"stage": "finetuned", "cut": index}
            run.keep()
        stop = plan[index + 1].step if index + 1 < len(plan) else total
        span = range(plan[index].step, stop)
        run.train("finetuned", model, total, teacher=dense, span=span, cut=index)
    return model


def _file(run: Run, index: int) -> Path:
    return run.folder / f"cut-{index + 1}.swan"


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Tensor = run_on_batch(model, batch)
    return F.cross_entropy(logits.float(), batch[1].to(logits.device))


__all__ = ["halfway", "scored_stage"]
