"""What the parts of the GPU script share: the result file, the clock, the device and the images."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from _measure import environment, write
from gpu_clock import Clock
from gpu_plan import Rates, State, rates_from
from gpu_runs import Run
from gpu_speed import Scale
from gpu_training import Settings, Task, cached_images, dense_path
from quality_data import Splits, load, synthetic
from quality_networks import CifarResNet
from rich.console import Console
from torch import nn

from swan_surgery.environment.machine import device_name


ARCHIVE = "cifar10-jpeg.tar.gz"


@dataclass(frozen=True, eq=False)
class Session:
    """What all parts share.

    Attributes:
        options: of the command line.
        path: of the result file.
        result: its content.
        clock: of the whole session.
        device: where everything runs.
        terminal: what is printed to.
        images: holds them once they are read.
        broken: keys of what raised an error in this session.
    """

    options: argparse.Namespace
    path: Path | None
    result: dict[str, Any]
    clock: Clock
    device: torch.device
    terminal: Console
    images: list[Splits]
    broken: set[str]

    def save(self, key: str, facts: Mapping[str, Any]) -> None:
        """Put a row into the file."""
        self.result["rows"][key] = {"device": device_name(self.device), **facts}
        write(self.path, self.result)
        self.terminal.print(f"{self.clock.left():6.0f} s left  {key}")

    def note(self, key: str, why: str) -> None:
        """What was not finished: no row."""
        self.result["unfinished"].append({"key": key, "why": why})
        write(self.path, self.result)
        self.terminal.print(f"{self.clock.left():6.0f} s left  {key}: {why.splitlines()[-1]}")

    def rates(self) -> Rates:
        """As measured on this device, as far as they were."""
        return rates_from(self.measured())

    def measured(self) -> dict[str, Any]:
        """What was measured on this device, by this session or an earlier one."""
        name = device_name(self.device)
        own: dict[str, Any] = self.result["rates"].setdefault(
            name, {"source": f"{name}, measured", "images": {}, "gated": {}, "setup": {}}
        )
        return own

    def task(self, clock: Clock) -> Task:
        """Images and settings for training; images are read when first asked for."""
        if not self.images:
            self.images.append(read_images(self.options).to(self.device))
        if self.options.smoke:
            small = Settings(
                batch=32, score_batches=2, calibration_batches=2, tp_rounds=3, bf16=False
            )
            return Task(self.images[0], small, clock, small_network)
        return Task(self.images[0], Settings(), clock)

    def state(self) -> State:
        """What is there already."""
        runs = [Run(*name) for name in self.result["dense"]]
        at_hand = {
            (run.part, run.network, run.seed)
            for run in runs
            if dense_path(self.options.work, run, self.device).exists()
        }
        return State(frozenset(self.result["rows"]), dict(self.result["epochs"]), at_hand)


def read_images(options: argparse.Namespace) -> Splits:
    """CIFAR-10 from `--data`, or ten noisy patterns in a smoke run without it."""
    if options.data is None:
        return synthetic(128)
    threads = os.cpu_count() or 1
    return cached_images(
        options.work,
        options.images,
        lambda: load(options.data / ARCHIVE, options.images, threads=threads),
    )


def small_network(network: str) -> nn.Module:
    """For smoke runs: a chain or residual blocks, tiny."""
    if network == "vgg16_bn":
        features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True)
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return CifarResNet(8, (4, 8, 8))


def scale_of(session: Session) -> Scale:
    """Sizes of the speed part."""
    if not session.options.smoke:
        return Scale(session.device)
    return Scale(session.device, 32, 4, (1, 2), 3, (1, 8), "eager")


def opened(path: Path | None) -> dict[str, Any]:
    """The result file, as an earlier session left it, or a new one."""
    here = environment()
    if path is not None and path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        result["sessions"].append(here)
        return result
    empty: dict[str, Any] = {"rates": {}, "epochs": {}, "dense": [], "unfinished": [], "rows": {}}
    return {"theme": "gpu", "environment": here, "sessions": [here], **empty}
