"""Is it right on the device? The tests marked `gpu`, and the laws on random networks and on the zoo.

The laws: hard open gates change nothing, closed equals cut, the cost is exact. float64 and float32 are
held to the library's bounds with TensorFloat-32 off; with it on, float32 shows the error that it causes.
"""

import copy
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _measure import ROOT
from gpu_clock import Clock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_models import BOUNDS, build as build_zoo

import swan_surgery as swan


ZOO = (
    "resnet18",
    "vgg11_bn",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
)
NUM_RANDOM = 30
TESTS = ("tests/test_gpu.py", "tests/test_gpu_parts.py", "tests/test_machine.py")
_SHARE = 0.5
# name of a precision -> type, and whether float32 may be rounded to 10 bits in products
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "float32_tf32": (torch.float32, True),
}


@dataclass(frozen=True)
class Subject:
    """A model to try the laws on: `make` gives it in float64 with its inputs, on the CPU."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@contextmanager
def tests_running(
    device: torch.device, *, smoke: bool
) -> Iterator[Callable[[float], dict[str, Any]]]:
    """The tests marked `gpu`, in a process beside this one; on a CPU two of their twins.

    Gives a function that waits for them some seconds and returns what they found.
    """
    chosen = ["-k", "guesses and cpu"] if smoke else ["-m", "gpu"]
    with TemporaryDirectory() as folder:
        found, said = Path(folder) / "found.xml", Path(folder) / "said.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
        # Warnings of a newer torch are no faults of this device.
        command += ["-W", "default", f"--junitxml={found}", "--import-mode=importlib"]
        if device.type == "cuda" and find_spec("xdist") is not None:
            command += ["-n", "6"]  # most of the time is compiling, on the CPU
        path = os.pathsep.join(
            [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        )
        with said.open("w") as out:
            process = subprocess.Popen(  # noqa: S603
                [*command, *TESTS],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )

        def waited(seconds: float) -> dict[str, Any]:
            try:
                process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                return {"device": device.type, "out_of_time": True, "said": said.read_text()[-500:]}
            if not found.exists():
                return {"device": device.type, "broken": said.read_text()[-2000:]}
            report = read_report(found)
            if report["failed"]:
                print(said.read_text(), flush=True)  # the row names them only
            return {"device": device.type, **report}

        try:
            yield waited
        finally:
            process.kill()
            process.wait()


def read_report(path: Path) -> dict[str, Any]:
    """Counts, and the names and first lines of what failed, from pytest's JUnit file."""
    cases = list(ET.parse(path).iter("testcase"))  # noqa: S314 - written by our own process
    bad: dict[str, str] = {}
    for case in cases:
        for fault in (*case.findall("failure"), *case.findall("error")):
            text = fault.get("message") or ""
            bad[str(case.get("name"))] = text.splitlines()[0] if text else ""
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - skipped - len(bad),
        "failed": bad,
        "skipped": skipped,
    }


def subjects(*, smoke: bool) -> list[Subject]:
    """Random networks and the zoo by turns: where the time ends, some of both are done."""
    count, names = (2, ("squeezenet1_1",)) if smoke else (NUM_RANDOM, ZOO)
    drawn = [
        Subject(f"random {index}", partial(_random_case, spec))
        for index, spec in enumerate(random_descriptions(count))
    ]
    share = -(-count // len(names))
    found: list[Subject] = []
    for index, name in enumerate(names):
        found += drawn[share * index : share * (index + 1)]
        found.append(Subject(name, partial(_zoo_case, name)))
    return found


def random_descriptions(count: int) -> list[Any]:
    """Descriptions of random networks, the same every time."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    # Only this part needs hypothesis.
    from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: PLC0415

    from tests.strategies import descriptions  # noqa: PLC0415

    found: list[Any] = []

    @seed(0)
    @settings(
        max_examples=4 * count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(descriptions())
    def collect(spec: Any) -> None:
        if spec not in found:
            found.append(spec)

    collect()
    # The first ones are the plainest.
    return found[-count:]


def _random_case(spec: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from tests.strategies import build  # noqa: PLC0415 - see random_descriptions

    case = build(spec)
    return case.model, case.inputs


def _zoo_case(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    case = build_zoo("torchvision", name)
    return case.model, (case.draw(torch.Generator().manual_seed(1), 2),)


def check(subject: Subject, device: torch.device) -> dict[str, Any]:
    """Errors of one subject in every precision, or why nothing could be compared."""
    model, inputs = subject.make()
    model = model.to(device).eval()
    inputs = tuple(x.to(device) for x in inputs)
    try:
        gated = swan.swanify(model, inputs).eval()
    except swan.NoGateableChannelsError:
        return {"nothing_to_gate": True}
    close_(gated, _SHARE)
    found: dict[str, Any] = {"units": gated.gates.num_units, "in_place": gated.runs_in_place}
    for name, (dtype, tf32) in PRECISIONS.items():
        if tf32 and device.type != "cuda":
            continue
        own = copy.deepcopy(gated).to(dtype)
        base = copy.deepcopy(model).to(dtype)
        data = tree_map_only(Tensor, lambda x, dtype=dtype: x.to(dtype), inputs)
        with tensor_float32(on=tf32):
            found[name] = _laws(base, own, data)
        found[name]["bound"] = None if tf32 else BOUNDS[dtype]
    return found


def _laws(model: nn.Module, gated: swan.GatedModel, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    pruned = swan.prune(gated, verify=False)
    closed, cut = outputs(gated, inputs), outputs(pruned, inputs)
    opened = torch.ones_like(gated.gates.open_mask())
    with gated.gates.holding(opened):
        whole = outputs(gated, inputs)
    macs = swan.count_macs(pruned, inputs)
    return {
        "open_error": error(outputs(model, inputs), whole),
        "cut_error": error(closed, cut),
        "hard_macs": swan.hard_macs(gated),
        "counted_macs": macs,
    }


def close_(gated: swan.GatedModel, share: float) -> None:
    """Close a share of the units at random."""
    drawn = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0) + 0.1 * drawn)


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Every tensor that a model returns; inputs are copied, because models change them."""
    own = [x.clone() for x in inputs]
    return [leaf for leaf in tree_leaves(model(*own)) if isinstance(leaf, Tensor)]


def error(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference over the largest value; infinite where shapes differ or NaN meets a number."""
    worst = 0.0
    for one, two in zip(first, second, strict=True):
        if one.shape != two.shape:
            return float("inf")
        if one.numel():
            worst = max(worst, _difference(one.double(), two.double()))
    return worst


def _difference(one: Tensor, two: Tensor) -> float:
    same = (one == two) | (one.isnan() & two.isnan())
    difference = (one - two).abs().masked_fill(same, 0.0)
    scale = one[one.isfinite()].abs().max() if bool(one.isfinite().any()) else one.new_ones(())
    found = float(difference.max() / scale.clamp(min=torch.finfo(torch.float64).tiny))
    return found if found == found else float("inf")


@contextmanager
def tensor_float32(*, on: bool) -> Iterator[None]:
    """Allow or forbid TensorFloat-32 in matrix products and convolutions inside the block."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to rename these
        before = [place.allow_tf32 for place in places]
        try:
            for place in places:
                place.allow_tf32 = on
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.allow_tf32 = value


def run_right(
    device: torch.device, clock: Clock, save: Callable[[str, dict[str, Any]], None], *, smoke: bool
) -> None:
    """All of it, as far as the clock goes; the row `right` says how far that was."""
    own = subjects(smoke=smoke)
    done = 0
    with tests_running(device, smoke=smoke) as tests:
        for subject in own:
            if clock.left() < 0:
                break
            try:
                facts = check(subject, device)
            except Exception as err:  # noqa: BLE001 - a fault of one subject must not hide the others
                lines = str(err).splitlines()
                facts = {"fails": f"{type(err).__name__}: {lines[0] if lines else ''}"}
            save(f"right/{subject.name}", facts)
            done += 1
        save("right/tests", tests(clock.left()))
    not_reached = [subject.name for subject in own[done:]]
    save("right", {"subjects": len(own), "not_reached": not_reached})
