"""What gates cost in training on the device, and how fast cuts are there.

A job (`gpu_plan.Job`) is one kind of measurement on one model. Variants take turns in one loop, and the
device is waited for after each. float32 is without TensorFloat-32.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from _measure import paired, ratio, summary, wall
from gpu_clock import Clock
from gpu_right import tensor_float32
from gpu_training import wait
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.environment.machine import device_name


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUDGETS = (0.5, 0.25)
MULTIPLES = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Scale:
    """How large and how often."""

    device: torch.device
    size: int = 224
    train_batch: int = 64
    batches: tuple[int, ...] = (1, 32)
    repeats: int = 30
    multiples: tuple[int, ...] = MULTIPLES
    backend: str = "inductor"


def run_job(what: str, scale: Scale, clock: Clock) -> dict[str, Any]:
    """The row of a job: `latency/MODEL`, `latency-compile/MODEL/BATCH/DTYPE`, `train/MODEL`, ...

    Raises:
        OutOfTimeError: the clock ended between two measurements; there is no row.
    """
    kind, name, *rest = what.split("/")
    with tensor_float32(on=False):
        if kind in ("train", "train-compile"):
            found = [training_step(name, scale, clock, compiled=kind == "train-compile")]
        elif kind == "multiples":
            found = multiples(name, scale, clock)
        else:
            wanted = {f"{100 * share:g} %": {"macs": share, "round_to": 8} for share in BUDGETS}
            own = cuts(name, scale, clock, wanted)
            found = [
                one
                for batch, dtype, runtime in settings_of(kind, rest, scale)
                for one in latencies(own, scale, clock, batch, dtype, runtime)
            ]
    return {
        "part": "speed",
        "kind": kind,
        "model": name,
        "device": device_name(scale.device),
        "measurements": found,
    }


def settings_of(kind: str, rest: list[str], scale: Scale) -> list[tuple[int, str, str]]:
    """Batch, type and runtime of the measurements of a latency job."""
    if kind == "latency-compile":
        return [(int(rest[0]), rest[1], "compile")]
    runtimes = ("eager", "graph") if scale.device.type == "cuda" else ("eager",)
    return list(product(scale.batches, DTYPES, runtimes))


def new(name: str) -> nn.Module:
    """A network of torchvision with random weights."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=1000)


def training_step(name: str, scale: Scale, clock: Clock, *, compiled: bool) -> dict[str, Any]:
    """Forward, backward and SGD step under bf16 autocast: gated over ungated, with the objective too."""
    device = scale.device
    dense = new(name).to(device, memory_format=torch.channels_last).train()
    x, y = _batch(scale.train_batch, scale)
    gated = swan.swanify(dense, x[:1]).train()
    learning = swan.Objective(gated, macs=0.5)
    # The objective measures gates from now on; its own cost is taken in the third variant alone.
    runs: dict[str, Callable[[], object]] = {
        "ungated": _step(dense, x, y, scale, compiled=compiled),
        "gated": _step(gated, x, y, scale, compiled=compiled),
    }
    if not compiled:
        runs["gated with objective"] = _step(gated, x, y, scale, compiled=False, objective=learning)
    samples = _in_turns(runs, scale, clock)
    return {
        "batch": scale.train_batch,
        "dtype": "bf16",
        "runtime": "compile" if compiled else "eager",
        "ungated": wall(samples["ungated"]),
        "ratios": {
            which: ratio(own, samples["ungated"])
            for which, own in samples.items()
            if which != "ungated"
        },
    }


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    scale: Scale,
    *,
    compiled: bool,
    objective: Callable[[float], Tensor] | None = None,
) -> Callable[[], None]:
    # Tiny steps: the weights must stay what they are, only the work counts.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    run: Callable[[Tensor], Tensor] = (
        torch.compile(model, backend=scale.backend) if compiled else model
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(scale.device.type, torch.bfloat16):
            logits = run(x)
        loss = F.cross_entropy(logits.float(), y)
        if objective is not None:
            loss = loss + objective(1.0)
        loss.backward()
        optimizer.step()

    return step


@dataclass(frozen=True, eq=False)
class Cut:
    """A network and its share of the MACs."""

    name: str
    model: nn.Module
    macs_share: float


def cuts(name: str, scale: Scale, clock: Clock, wanted: dict[str, dict[str, Any]]) -> list[Cut]:
    """The dense network and cuts of it, in the order that gates start in; options of `prune` by name."""
    example = torch.randn(1, 3, scale.size, scale.size, device=scale.device)
    dense = new(name).to(scale.device).eval()
    gated = swan.swanify(dense, example)
    total = swan.count_macs(dense, example)
    sizes, plainly = gated.gates.probabilities().detach(), {"per_cost": False, "diminishing": False}
    found = [Cut("dense", dense, 1.0)]
    for key, options in wanted.items():
        clock.check()
        small = swan.prune_by_score(gated, sizes, verify=False, **plainly, **options).eval()
        found.append(Cut(key, small, swan.count_macs(small, example) / total))
    return found


def latencies(
    own: list[Cut], scale: Scale, clock: Clock, batch: int, dtype: str, runtime: str
) -> list[dict[str, Any]]:
    """The dense network, which comes first, and its cuts, in turns."""
    passes = {cut.name: _pass(cut.model, scale, batch, dtype, runtime, clock) for cut in own}
    samples = _in_turns(passes, scale, clock)
    dense = samples["dense"]
    return [
        {
            "budget": cut.name,
            "macs_share": cut.macs_share,
            "batch": batch,
            "dtype": dtype,
            "runtime": runtime,
            "dense": wall(dense),
            "pruned": wall(samples[cut.name]),
            "latency_ratio": ratio(samples[cut.name], dense),
            # Its speed-up over that of its MACs.
            "kept": summary(
                [
                    cut.macs_share * b[0] / a[0]
                    for a, b in zip(samples[cut.name], dense, strict=True)
                ]
            ),
        }
        for cut in own[1:]
    ]


def multiples(name: str, scale: Scale, clock: Clock) -> list[dict[str, Any]]:
    """Half the MACs with widths that are multiples of 1, 8, ...: seconds per share of the MACs."""
    wanted = {str(step): {"macs": 0.5, "round_to": step} for step in scale.multiples}
    own = cuts(name, scale, clock, wanted)[1:]
    runtime = "graph" if scale.device.type == "cuda" else "eager"
    found = []
    for dtype in DTYPES:
        batch = max(scale.batches)
        passes = {cut.name: _pass(cut.model, scale, batch, dtype, runtime, clock) for cut in own}
        samples = _in_turns(passes, scale, clock)
        found += [
            {
                "multiple": int(cut.name),
                "macs_share": cut.macs_share,
                "batch": batch,
                "dtype": dtype,
                "runtime": runtime,
                "seconds": wall(samples[cut.name]),
                "per_macs": summary([one[0] / cut.macs_share for one in samples[cut.name]]),
            }
            for cut in own
        ]
    return found


def _pass(
    model: nn.Module, scale: Scale, batch: int, dtype: str, runtime: str, clock: Clock
) -> Callable[[], object]:
    """One forward pass, ready to be timed: warm, compiled or captured."""
    clock.check()
    x = _batch(batch, scale)[0].to(DTYPES[dtype])
    ready = copy.deepcopy(model).to(DTYPES[dtype], memory_format=torch.channels_last)
    if runtime == "compile":
        compiled = torch.compile(ready, backend=scale.backend)
        return _without_gradients(lambda: compiled(x), scale.device)
    run = _without_gradients(lambda: ready(x), scale.device)
    return captured(run, scale.device) if runtime == "graph" else run


def _without_gradients(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        call()

    for _ in range(3):
        run()
    wait(device)
    return run


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same as a CUDA graph: all its kernels in one launch."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, keeps: Callable[[], object]) -> None:
    """`keeps` holds on to the weights and inputs whose memory the graph reads."""
    del keeps
    graph.replay()


def _in_turns(
    runs: dict[str, Callable[[], object]], scale: Scale, clock: Clock
) -> dict[str, list[tuple[float, float]]]:
    def waiting(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            run()
            wait(scale.device)

        return whole

    waited = {name: waiting(run) for name, run in runs.items()}
    return paired(waited, repeats=scale.repeats, warmup=3, tick=clock.check)


def _batch(batch: int, scale: Scale) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, scale.size, scale.size, generator=generator)
    y = torch.randint(1000, (batch,), generator=generator)
    x = x.to(scale.device, memory_format=torch.channels_last)
    return x, y.to(scale.device)
