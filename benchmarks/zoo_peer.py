"""What the process of one model measures with Torch-Pruning, on the same model and inputs.

30 % of all channels are removed by random importance; the model's output layers are ignored. The
removed channels are noted, and closed in a copy of the dense model: weight rows and biases become
zero, norms count the remaining channels only. The pruned model must compute what that copy does.
"""

import copy
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import PEER_SECONDS, Case, build, call, copied, tensors_of
from zoo_work import Facts, runs_in_train_mode, share_facts

import swan_surgery as swan
from swan_surgery.calls.mode import CallMode, Change
from swan_surgery.gates.weighted_statistics import WEIGHTED, weighing


PRUNING_RATIO = 0.3
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def work_peer(suite: str, name: str, emit: Callable[[Facts], None]) -> None:
    """Prune one model with Torch-Pruning; `emit` gets the facts with a verdict at the end."""
    emit({"stage": "build"})
    case = build(suite, name)
    model = case.model
    outputs = share_facts(case, swan.channel_map(model, case.example))["output_layers"]
    modules = dict(model.named_modules())
    dense = copy.deepcopy(model)
    names = {module: n for n, module in modules.items()}
    signal.setitimer(signal.ITIMER_PROF, PEER_SECONDS[suite])  # ends the process: "hangs"
    emit({"stage": "graph"})
    started = time.process_time()
    inputs = copied(case.example)
    tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    facts: Facts = {"graph_seconds": time.process_time() - started}
    emit(facts | {"stage": "prune"})
    torch.manual_seed(0)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=[modules[n] for n in outputs if n in modules],
    )
    removed: dict[str, list[int]] = {}
    alive: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        _note_removed(group, pruner.DG, names, alive, removed)
        group.prune()
    signal.setitimer(signal.ITIMER_PROF, 0)
    facts["prune_seconds"] = time.process_time() - started
    facts["removed_channels"] = sum(map(len, removed.values()))
    facts["params"] = sum(p.numel() for p in model.parameters())
    emit(facts | {"stage": "compare"})
    if not facts["removed_channels"]:
        emit(facts | {"verdict": "nothing removed"})
        return
    _close_(dense, removed)
    facts |= _judge(dense, model, case)
    fresh = case.fresh_inputs(torch.Generator().manual_seed(0))
    emit(facts | {"trains": runs_in_train_mode(model, fresh)})


def _note_removed(
    group: Any,
    graph: Any,
    names: Mapping[nn.Module, str],
    alive: dict[str, list[int]],
    removed: dict[str, list[int]],
) -> None:
    """Which output channels, numbered as in the dense model, a group is about to remove."""
    for dep, indices in group:
        module = dep.target.module
        is_norm = isinstance(module, NORMS)
        if module not in names or not (is_norm or graph.is_out_channel_pruning_fn(dep.handler)):
            continue
        if not isinstance(module, (*LAYERS, *NORMS)) or module.weight is None:
            continue
        name = names[module]
        transposed = bool(getattr(module, "transposed", False))
        now = alive.setdefault(name, list(range(module.weight.shape[1 if transposed else 0])))
        gone = {now[int(index)] for index in indices}
        removed.setdefault(name, []).extend(sorted(gone))
        alive[name] = [channel for channel in now if channel not in gone]


@torch.no_grad()
def _close_(model: nn.Module, removed: Mapping[str, list[int]]) -> None:
    for name, channels in removed.items():
        module: Any = model.get_submodule(name)
        transposed = bool(getattr(module, "transposed", False))
        rows = module.weight.transpose(0, 1) if transposed else module.weight
        rows[channels] = 0
        if getattr(module, "bias", None) is not None:
            module.bias[channels] = 0
        if isinstance(module, NORMS) and not isinstance(module, _BatchNorm):
            _count_remaining_(module, channels)


def _count_remaining_(norm: nn.Module, channels: list[int]) -> None:
    """Let a norm take its statistics over the channels that remain."""
    weight: Any = norm.weight
    stays = torch.ones(weight.numel(), dtype=weight.dtype)
    stays[channels] = 0
    original = norm.forward

    # LayerNorm2d and its like call layer_norm on permuted data, or average over the second axis.
    is_second = isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower()

    def forward(x: Tensor) -> Tensor:
        last = stays.view(*[1] * (x.ndim - 1), -1)
        second = stays.view(1, -1, *[1] * (x.ndim - 2)) if x.ndim > 1 else last
        changes = {}
        for function in WEIGHTED:
            is_last = not is_second or function in ("layer_norm", "rms_norm")
            changes[function, 1] = Change(instead=weighing(function, last if is_last else second))
        with CallMode(changes):
            return original(x)

    norm.forward = forward  # type: ignore[assignment]


@torch.no_grad()
def _judge(reference: nn.Module, pruned: nn.Module, case: Case) -> Facts:
    wanted = tensors_of(call(reference, copied(case.example)))
    got = tensors_of(call(pruned, copied(case.example)))
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return {"verdict": "wrong", "detail": "output shapes differ"}
    worst = max(
        float((a.double() - b.double()).abs().max() / a.double().abs().max())
        for a, b in zip(wanted, got, strict=True)
        if a.numel()
    )
    return {"verdict": "exact" if worst <= case.bound else "wrong", "error": worst}
