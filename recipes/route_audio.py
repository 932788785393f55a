"""A switch in an audio encoder, without labels: silence takes a short way, speech the full one (arXiv:2407.05442).

    pip install espeakng-loader          # espeak-ng 1.52 and its voices, as PyPI ships them; without it: formants
    pip install "visqol-python[lattice]" # Google's ViSQOL, ported; without it: spectral distance and SI-SDR alone
    python recipes/route_audio.py        # about a quarter of an hour of CPU time
    python recipes/route_audio.py --smoke

A small SoundStream-like autoencoder (strided convolutions, and their transposes back) learns segments of 0.37 s. A switch
behind its encoder's first convolution then learns how far a light encoder's embeddings will be from the full one's. Speech is
made by espeak-ng; "silence" is what AudioSet files under it: nearly nothing, quiet tones, quiet coloured noise.
"""

import argparse
import copy
import ctypes
import json
import math
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import lfilter, resample_poly
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.routing.costs import routed_costs


RATE, LENGTH = 22_050, 8192
LISTENED = 60  # segments that ViSQOL hears: it takes quadratic time
WORDS = (
    "one",
    "two",
    "seven",
    "quick foxes",
    "lazy dogs",
    "rain falls",
    "on the open sea",
    "nobody speaks",
)
VOICES = ("en", "en-us+f3", "en+m3", "de", "fr+f2", "es")


@dataclass(frozen=True)
class Settings:
    """What is traded: time against quality."""

    sentences: int = 27  # to train, of about 3 s
    judging: int = 42  # held out, and as many to test: how easy a segment is depends on its sentence's voice and noise
    width: int = 32  # channels that cross; the paper's encoder has 70,000 parameters
    epochs: int = 12  # of the autoencoder
    light_epochs: int = 44  # of both encoders, switch and decoder
    light_params: float = 0.047  # of what runs behind the switch; the paper has 1/20.9
    # Of a batch, half of it speech, what the light encoder learns to reconstruct.
    learnt_share: float = 0.62
    share: float = 0.68  # of held-out segments, half of them speech, that take the short way
    seed: int = 0


def spoken(sentences: list[str]) -> list[np.ndarray]:
    """What espeak-ng says, in turns by several voices."""
    if find_spec("espeakng_loader") is None:
        return [formants(index) for index in range(len(sentences))]
    loader = import_module("espeakng_loader")
    engine, heard = ctypes.CDLL(loader.get_library_path()), []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: Any, count: int, _: Any) -> int:
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    engine.espeak_Initialize(
        2, 0, loader.get_data_path().encode(), 0
    )  # 2: synchronous, no sound card
    engine.espeak_SetSynthCallback(hear)
    found = []
    for index, sentence in enumerate(sentences):
        engine.espeak_SetVoiceByName(VOICES[index % len(VOICES)].encode())
        text = sentence.encode() + b"\0"
        heard.clear()
        engine.espeak_Synth(text, len(text), 0, 0, 0, 1, None, None)
        engine.espeak_Synchronize()
        found.append(np.concatenate(heard) / 32768)
    return found


def formants(seed: int) -> np.ndarray:
    """Where there is no espeak-ng: three seconds of pulses through resonators that move from vowel to vowel, with pauses."""
    draw, parts = np.random.default_rng(seed), []
    for _ in range(12):
        count = int(draw.uniform(0.15, 0.35) * RATE)
        pitch = draw.uniform(90, 220) * (1 + 0.1 * np.linspace(0, draw.uniform(-1, 1), count))
        sound = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) + 0.01 * draw.standard_normal(
            count
        )
        for centre in draw.uniform((300, 900, 2200), (800, 2000, 3200)):
            pole = np.exp(-np.pi * 90 / RATE + 2j * np.pi * centre / RATE)
            sound = lfilter([1 - abs(pole)], [1, -2 * pole.real, abs(pole) ** 2], sound)
        silent = draw.random() < 0.25
        parts.append(
            0 * sound if silent else 0.3 * np.hanning(count) * sound / (abs(sound).max() + 1e-9)
        )
    return np.concatenate(parts)


def segments(settings: Settings) -> dict[str, list[Tensor]]:
    """Speech and silence [N, 1, LENGTH]: to train, held out, to test."""
    draw = np.random.default_rng(settings.seed)
    ends = (settings.sentences, settings.sentences + settings.judging)
    sentences = [" ".join(draw.choice(WORDS, 6)) for _ in range(ends[1] + settings.judging)]
    speech, silence = [], []
    for sound in spoken(sentences):
        noisy = draw.uniform(0.4, 1.2) * sound + 10 ** draw.uniform(
            -4, -2.5
        ) * draw.standard_normal(len(sound))
        speech.append(noisy[: len(noisy) // LENGTH * LENGTH].reshape(-1, 1, LENGTH))
        for _ in speech[-1]:
            time = np.arange(LENGTH) / RATE
            noise = lfilter([1], [1, -draw.uniform(0, 0.98)], draw.standard_normal(LENGTH))
            tone = np.sin(2 * np.pi * draw.uniform(80, 3000) * time) * (draw.random() < 0.3)
            quiet = 10 ** draw.uniform(-4, -2) * (noise / noise.std() + 2 * tone)
            silence.append(quiet[None, None])
    found = {"speech": [torch.tensor(np.concatenate(part)).float() for part in (
        speech[: ends[0]], speech[ends[0] : ends[1]], speech[ends[1] :])]}  # fmt: skip
    sizes = [len(part) for part in found["speech"]]
    found["silence"] = list(torch.tensor(np.concatenate(silence)).float().split(sizes))
    return found


class Residual(nn.Module):
    """SoundStream's unit: a dilated convolution and a pointwise one beside the identity."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.point = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, N], as it came."""
        found: Tensor = x + self.point(F.elu(self.wide(F.elu(x))))
        return found


def encoder(width: int) -> nn.Sequential:
    """[B, 1, LENGTH] -> embeddings [B, 32, LENGTH / 128]."""
    layers: list[nn.Module] = [nn.Conv1d(1, width, 8, 2, padding=3), nn.ELU()]
    for dilation in (1, 3, 9):
        layers += [
            nn.Conv1d(width, 2 * width, 8, 4, padding=2),
            Residual(2 * width, dilation),
            nn.ELU(),
        ]
        width *= 2
    return nn.Sequential(*layers, nn.Conv1d(width, 32, 3, padding=1))


def decoder(width: int) -> nn.Sequential:
    """The way back."""
    layers: list[nn.Module] = [nn.Conv1d(32, 8 * width, 3, padding=1), nn.ELU()]
    for before, dilation in ((8 * width, 9), (4 * width, 3), (2 * width, 1)):
        layers += [
            nn.ConvTranspose1d(before, before // 2, 8, 4, padding=2),
            Residual(before // 2, dilation),
            nn.ELU(),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose1d(width, 1, 8, 2, padding=3))


def spectral_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Multi-scale: L1 of magnitudes and of their logarithms over three windows, [B]."""
    total = torch.zeros(len(found))
    for size in (128, 512, 2048):
        window = torch.hann_window(size)
        one, two = (
            torch.stft(x[:, 0], size, size // 4, window=window, return_complex=True).abs()
            / math.sqrt(size)
            for x in (found, wanted)
        )
        total = (
            total
            + (one - two).abs().mean((1, 2))
            + 0.1 * ((one + 1e-4).log() - (two + 1e-4).log()).abs().mean((1, 2))
        )
    return total


def si_sdr(found: Tensor, wanted: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, [B]."""
    one, two = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (found, wanted))
    target = (one * two).sum(1, keepdim=True) / (two.square().sum(1, keepdim=True) + 1e-12) * two
    return (
        10 * ((target.square().sum(1) + 1e-12) / ((one - target).square().sum(1) + 1e-12)).log10()
    )


def visqol(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Listening quality of speech (1 to 5), and the similarity (to 1) it is read off; nothing without ViSQOL."""
    if find_spec("visqol") is None:
        return {}
    judge = import_module("visqol").VisqolApi()
    judge.create(mode="speech")
    two, one = (
        resample_poly(x[:LISTENED].flatten().double().numpy(), 320, 441) for x in (found, wanted)
    )  # 22,050 to 16,000 Hz
    result = judge.measure_from_arrays(one, two, 16_000)
    return {"visqol": float(result.moslqo), "similarity": float(result.vnsim)}


def train(loss: Any, parameters: Any, data: Tensor, epochs: int, seed: int) -> None:
    """Adam, the learning rate on a cosine."""
    generator, size = torch.Generator().manual_seed(seed), 16
    optimizer = torch.optim.Adam(parameters, 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * math.ceil(len(data) / size)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(size):
            optimizer.zero_grad()
            loss(data[rows]).backward()
            optimizer.step()
            decay.step()


def short_way(
    full: nn.Module, back: nn.Module, learn: Tensor, settings: Settings
) -> swan.RoutedModel:
    """A switch in the encoder; both encoders, switch and decoder learn together, as in the paper.

    The light encoder learns to reconstruct what it will get: the segments of a batch that the switch finds easiest.
    """
    few = learn[torch.randperm(len(learn))][:256].split(32)
    with torch.no_grad():
        crossing = [full[:2](x) for x in few]
    cut = swan.compress(
        full[2:].eval(), crossing, params=settings.light_params, round_to=1, progress=False
    )
    routed = swan.add_switch(
        full.eval(), "1", example_inputs=learn[:1], light=cut.model, discrepancy="l2", frozen=False
    ).train()

    def loss(x: Tensor) -> Tensor:
        embedding, (light,), predicted = routed.body(x)
        own = routed.loss(x, run=lambda _: (embedding, (light,), predicted))
        easy = predicted[0].detach().argsort()[: math.ceil(settings.learnt_share * len(x))]
        return own + distance(back(embedding), x) + distance(back(light[easy]), x[easy])

    own = [*(p for p in routed.parameters() if p.requires_grad), *back.parameters()]
    train(loss, own, learn, settings.light_epochs, settings.seed + 1)
    return routed.eval()


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """What the autoencoder learns by: spectra and samples."""
    return spectral_distance(found, wanted).mean() + 10 * (found - wanted).abs().mean()


def run(settings: Settings) -> dict[str, Any]:
    """Train the autoencoder, then the short way; measure on speech and on silence."""
    torch.manual_seed(settings.seed)
    data = segments(settings)
    learn, held, _ = (torch.cat(parts) for parts in zip(*data.values(), strict=True))
    full, back = encoder(settings.width), decoder(settings.width)
    own = [*full.parameters(), *back.parameters()]
    train(lambda x: distance(back(full(x)), x), own, learn, settings.epochs, settings.seed)
    before = copy.deepcopy(back)
    routed = short_way(full, back, learn, settings)
    swan.calibrate_switch(routed, held.split(32), share=settings.share)
    costs = routed_costs(routed)
    found: dict[str, Any] = {
        "settings": asdict(settings), "segments": len(learn), "voices": bool(find_spec("espeakng_loader")),
        "light_fewer_macs": costs.full / costs.lights[0], "light_fewer_params": costs.rest_params[0] / costs.light_params[0],
    }  # fmt: skip
    for kind, (_, _, test) in data.items():
        stats = swan.route_stats(routed, test.split(1))
        found[kind] = {
            "light_share": stats.shares[0], "macs": stats.macs,
            "latency_ms": stats.mean_ms, "full_latency_ms": stats.full_mean_ms,
            "latency_saving": 1 - stats.mean_ms / stats.full_mean_ms,
        }  # fmt: skip
        with torch.no_grad():
            crossing = routed.parts.trunk(test)
            ways = {
                "before": before(full(test)),
                "full": back(routed.parts.full(crossing)),
                "mixed": back(routed(test)),
                "light": back(routed.parts.light(crossing)),
            }
        for way, sound in ways.items():
            found[kind][f"{way}_spectral_distance"] = float(spectral_distance(sound, test).mean())
            found[kind][f"{way}_si_sdr_db"] = float(si_sdr(sound, test).mean())
            if kind == "speech":
                found[kind] |= {f"{way}_{k}": own for k, own in visqol(sound, test).items()}
    return found


def main() -> None:
    """One run; `--output` keeps it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="keep what was reached as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(seed=options.seed)
    if options.smoke:
        settings = Settings(
            sentences=4, judging=1, width=8, epochs=1, light_epochs=1, seed=options.seed
        )
    found = run(settings)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
