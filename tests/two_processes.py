"""What each of several processes does in `test_recipes.py`: a whole `train`, and its result in a file."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from swan_surgery.errors import GateError
from swan_surgery.experiments.classifier import Data, Outcome, Silent, TrainSettings, run_experiment
from swan_surgery.experiments.processes import Processes, joined


SETTINGS = TrainSettings(
    macs=0.5, dense_epochs=1, gate_epochs=2, finetune_epochs=1, batch=8, lr=1e-2, distillation=0.3
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(1, 12), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 3)),
    ).double()


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(63) % 3
    x = torch.randn(63, 1, 4, 4, generator=generator, dtype=torch.float64)
    x += 0.3 * y[:, None, None, None]
    # An odd number to test on: the shares are not equal.
    return Data(TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:]), 3, "made up")


def run(folder: Path, processes: Processes | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    return run_experiment(
        net(), SETTINGS, data(), folder=folder, narrator=Silent(), processes=processes
    )


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        assert processes.count == 2
        outcome = run(folder / "both", processes)
        state = outcome.gated.state_dict()
        state |= {f"small.{name}": own for name, own in outcome.small.state_dict().items()}
        save_file(state, folder / f"{processes.rank}.safetensors")
        with torch.no_grad():
            outcome.gated.gates.logits[0] += processes.rank
        try:
            processes.agree_(outcome.gated)
        except GateError:
            assert processes.rank == 1
        else:
            assert processes.rank == 0


if __name__ == "__main__":
    main()
