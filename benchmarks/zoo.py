"""Every torchvision CNN without LayerNorm: is it converted whole, and does closed equal cut?

    python benchmarks/zoo.py                        # all models; continues where it stopped
    python benchmarks/zoo.py --models 'resnet*'     # only these
    python benchmarks/zoo.py --stale                # again those measured with an older package
    python benchmarks/zoo.py --markdown             # the README's table, from the results

Models have random parameters, batch-norms included (gamma U(0.5, 1.5), beta N(0, 0.3), statistics
calibrated on two random images), so that a wrong channel shows. float64, 64x64 pixels (inception_v3:
299, the smallest its auxiliary head takes in train mode). Each model runs in two processes of its
own, one for us and one for Torch-Pruning, with a time and a memory limit.
"""

import argparse
import copy
import fnmatch
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import torchvision
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
from rich.console import Console
from rich.table import Table
from tables import zoo_cells, zoo_markdown, zoo_row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation

import swan_surgery as swan
from swan_surgery.channels import PINNED, as_inputs
from swan_surgery.verification import relative_error


LAYERNORM = ("convnext*", "maxvit*", "swin*", "vit*")
SIZES = {"inception_v3": 299}
FLOAT32 = ("regnet_y_128gf",)  # 645 M parameters: three float64 copies do not fit beside others
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
CLOSED = (0.3, 0.7)
PRUNING_RATIO = 0.3  # Torch-Pruning's
PEER_SECONDS = 120  # of CPU time, Torch-Pruning's limit
SMOKE = "squeezenet1_1"


def model_names() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    names = [n for n in names if not any(fnmatch.fnmatch(n, p) for p in LAYERNORM)]
    return names + torchvision.models.list_models(module=segmentation)


# --- in the process of one model -------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode with parameters that hide nothing, and one example image."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if hasattr(segmentation, name):
        options["weights_backbone"] = None
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # scipy's truncated normal takes a minute
    model = torchvision.models.get_model(name, **options)
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    model = model.to(dtype).eval()
    size = SIZES.get(name, 64)
    swan.calibrate(model, [torch.randn(2, 3, size, size, dtype=dtype)])
    return model, torch.randn(1, 3, size, size, dtype=dtype)


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The second call's result, its wall seconds and its CPU seconds."""
    function()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def share_facts(model: nn.Module, channels: swan.ChannelMap) -> dict[str, Any]:
    """Output channels of all conv and linear modules: gated, pinned for a reason, or forgotten."""
    widths = {
        name: module.weight.shape[1 if getattr(module, "transposed", False) else 0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    reasons: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    for pin in channels.pins:
        if pin.op == "output":
            outputs[pin.layer] += len(pin.channels)
        else:
            reasons[f"{pin.reason} ({pin.op})"] += len(pin.channels)
    gated = sum(u != PINNED for layer in channels.layers for u in layer.out_units)
    total = sum(widths.values())
    return {
        "layers": len(widths),
        "channels": total,
        "output_channels": outputs.total(),
        "output_layers": [n for n, count in outputs.items() if count == widths.get(n)],
        "units": channels.num_units,
        "gated_channels": gated,
        "pinned_channels": dict(reasons),
        "forgotten_channels": total - gated - outputs.total() - reasons.total(),
        "unknown_ops": [list(entry) for entry in channels.unknown_ops],
        "notes": list(channels.notes),
    }


def close_units_(gated: swan.GatedModel, share: float, generator: torch.Generator) -> None:
    logits = gated.gates.logits
    closed = torch.rand(logits.shape, generator=generator) < share
    logits.data = torch.where(closed, -3.0, 3.0).to(logits.dtype)


def predicted_params(model: nn.Module, channels: swan.ChannelMap, mask: Tensor) -> int:
    """Parameters of the pruned model by the channel map."""
    stays = [*mask.tolist(), True]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for entry in channels.tensors:
        if entry.tensor in shapes:
            shapes[entry.tensor][entry.axis] = sum(stays[unit] for unit in entry.units)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def cut_facts(gated: swan.GatedModel, share: float, example: Tensor) -> dict[str, Any]:
    """Close units at random, cut, and compare outputs, MACs and parameters."""
    generator = torch.Generator().manual_seed(round(100 * share))
    close_units_(gated, share, generator)
    mask = gated.gates.open_mask()
    refused = None
    try:
        pruned, seconds = timed(lambda: swan.prune(gated))
    except swan.VerificationError as err:
        refused = str(err)
        pruned, seconds = timed(lambda: swan.prune(gated, verify=False))
    shape = (2, *example.shape[1:])
    fresh = torch.randn(shape, generator=generator, dtype=example.dtype)
    error = max(
        relative_error(gated, pruned, mask, as_inputs(inputs)) for inputs in (example, fresh)
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned.eval()(example)
    return {
        "share": share,
        "closed_units": int((~mask).sum()),
        "error": error,
        "refused": refused,
        "seconds": seconds,
        "hard_macs": swan.hard_macs(gated),
        "counted_macs": swan.count_macs(pruned, example),
        "torch_counter_macs": counter.get_total_flops() / 2,
        "predicted_params": predicted_params(gated.model, gated.channels, mask),
        "counted_params": sum(p.numel() for p in pruned.parameters()),
        "trains": runs_in_train_mode(pruned, fresh),
    }


def runs_in_train_mode(model: nn.Module, batch: Tensor) -> str:
    """`yes`, or the error: auxiliary heads run in train mode only."""
    try:
        with torch.no_grad():
            model.train()(batch)
    except (RuntimeError, ValueError, IndexError) as err:
        return first_line(err)
    finally:
        model.eval()
    return "yes"


def first_line(err: BaseException) -> str:
    return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"


def convert(name: str) -> tuple[swan.GatedModel, Tensor, dict[str, Any]]:
    """Map and gate a model; the base model is gone afterwards, to make room."""
    model, example = build(name)
    facts: dict[str, Any] = {"dtype": str(example.dtype).removeprefix("torch.")}
    facts["bound"] = BOUNDS[example.dtype]
    facts["params"] = sum(p.numel() for p in model.parameters())
    _, map_seconds = timed(lambda: swan.channel_map(model, example))
    gated, swanify_seconds = timed(lambda: swan.swanify(model, example))
    facts["seconds"] = {"map": map_seconds, "swanify": swanify_seconds}
    facts |= share_facts(model, gated.channels)
    is_open = torch.ones(gated.channels.num_units, dtype=torch.bool)
    facts["open_error"] = relative_error(gated, model, is_open, as_inputs(example))
    return gated, example, facts


def work_swan(name: str) -> dict[str, Any]:
    gated, example, facts = convert(name)
    facts["macs"] = swan.count_macs(gated, example)
    facts["cuts"] = [cut_facts(gated, share, example) for share in CLOSED]
    return facts


def work_peer(name: str) -> dict[str, Any]:
    """Torch-Pruning on the same model: is the result what zeroing the same channels gives?"""
    model, example = build(name)
    ignored = share_facts(model, swan.channel_map(model, example))["output_layers"]
    dense = copy.deepcopy(model)
    names = {module: n for n, module in model.named_modules()}
    signal.setitimer(signal.ITIMER_PROF, PEER_SECONDS)  # ends the process: "hangs"
    started = time.process_time()
    tp.DependencyGraph().build_dependency(model, example_inputs=example)
    facts: dict[str, Any] = {"graph_seconds": time.process_time() - started}
    torch.manual_seed(0)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=[model.get_submodule(n) for n in ignored],
    )
    removed: dict[str, list[int]] = {}
    alive: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        note_removed(group, pruner.DG, names, alive, removed)
        group.prune()
    signal.setitimer(signal.ITIMER_PROF, 0)
    facts["prune_seconds"] = time.process_time() - started
    facts["removed_channels"] = sum(map(len, removed.values()))
    facts["params"] = sum(p.numel() for p in model.parameters())
    zero_channels_(dense, removed)
    facts |= judge(dense, model, example)
    facts["trains"] = runs_in_train_mode(model, torch.cat([example, example]))
    return facts


def note_removed(
    group: Any,
    graph: Any,
    names: Mapping[nn.Module, str],
    alive: dict[str, list[int]],
    removed: dict[str, list[int]],
) -> None:
    """Which output channels, numbered as in the dense model, a group is about to remove."""
    for dep, indices in group:
        module = dep.target.module
        is_norm = isinstance(module, nn.BatchNorm2d)
        if module not in names or not (is_norm or graph.is_out_channel_pruning_fn(dep.handler)):
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            continue
        name = names[module]
        now = alive.setdefault(name, list(range(module.weight.shape[0])))
        gone = {now[int(index)] for index in indices}
        removed.setdefault(name, []).extend(sorted(gone))
        alive[name] = [channel for channel in now if channel not in gone]


@torch.no_grad()
def zero_channels_(model: nn.Module, removed: Mapping[str, list[int]]) -> None:
    for name, channels in removed.items():
        module = model.get_submodule(name)
        module.weight[channels] = 0
        if module.bias is not None:
            module.bias[channels] = 0


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(item)


@torch.no_grad()
def judge(reference: nn.Module, pruned: nn.Module, example: Tensor) -> dict[str, Any]:
    wanted, got = list(tensors_of(reference(example))), list(tensors_of(pruned(example)))
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return {"verdict": "wrong", "detail": "output shapes differ"}
    worst = max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, got, strict=True)
    )
    verdict = "exact" if worst <= BOUNDS[example.dtype] else "wrong"
    return {"verdict": verdict, "error": worst}


def work(job: str, name: str, memory_gib: float) -> None:
    """Run one job and print its facts as the last line."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    try:
        facts = {"swan": work_swan, "peer": work_peer}[job](name)
    except Exception as err:  # noqa: BLE001 - whatever a model or a peer raises is the result
        facts = {"verdict": "raises", "detail": first_line(err)}
    facts["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(facts))


# --- in the process that drives the sweep ----------------------------------------------------


def spawn(job: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--worker", job, name]
    command += ["--memory", str(options.memory)]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command, capture_output=True, text=True, timeout=options.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"verdict": "hangs", "detail": f"more than {options.limit} s"}
    if done.returncode == -signal.SIGPROF:
        return {"verdict": "hangs", "detail": f"more than {PEER_SECONDS} s of CPU time"}
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or [""])[-1]
        return {"verdict": "raises", "detail": f"exit code {done.returncode}: {tail}"}
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def load(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {"theme": "zoo", "environment": environment(), "rows": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def wanted(options: argparse.Namespace) -> list[str]:
    if not options.models:
        return [SMOKE] if options.smoke else model_names()
    return [n for n in model_names() if any(fnmatch.fnmatch(n, p) for p in options.models)]


def selected(options: argparse.Namespace, rows: Mapping[str, Any], names: list[str]) -> list[str]:
    """Those not measured yet; with `--stale` also those measured with other sources."""
    if options.again:
        return names
    source = source_hash()
    return [n for n in names if n not in rows or (options.stale and rows[n]["source"] != source)]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"commit": commit(), "source": source_hash()}
    row["swan"] = spawn("swan", name, options)
    row["torch_pruning"] = spawn("peer", name, options)
    return row


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="names or glob patterns")
    parser.add_argument("--again", action="store_true", help="measure models already in the file")
    parser.add_argument(
        "--stale", action="store_true", help="measure again what an older package measured"
    )
    parser.add_argument("--markdown", action="store_true", help="print the README table and stop")
    parser.add_argument("--limit", type=int, default=1800, help="seconds per process")
    parser.add_argument("--memory", type=float, default=14, help="GiB per process")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def show(rows: Mapping[str, Any], console: Console) -> None:
    header, cells = zoo_cells(rows)
    table = Table(*header, title="torchvision CNNs")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    options = parse()
    if options.worker:
        work(*options.worker, options.memory)
        return
    torch.set_num_threads(1)
    terminal = console()
    path = output_path("zoo", options)
    result = load(path)
    if options.markdown:
        print(zoo_markdown([result]))
        return
    names = selected(options, result["rows"], wanted(options))
    with progress_bar(terminal) as bar:
        task = bar.add_task("models", total=len(names))
        for name in names:
            bar.update(task, description=name)
            if name in selected(options, load(path)["rows"], [name]):
                row = measure(name, options)
                result = load(path)  # another run may have added rows meanwhile
                result["rows"][name] = row
                write(path, result)
                bar.console.print(" | ".join(cell for cell in zoo_row(name, row) if cell))
            bar.advance(task)
    show({n: r for n, r in result["rows"].items() if not names or n in names}, terminal)
    report(path, terminal)


if __name__ == "__main__":
    main()
