"""Which line of code an operation without a rule is blamed on."""

import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import swan_surgery as swan


INSTALLED = '''"""A package."""
import torch
from torch import nn


def renormed(x):
    return torch.renorm(x, 2, 1, 0.5)


class Layer(nn.Module):
    def forward(self, x):
        return renormed(x)
'''


def installed(folder: Path):
    path = folder / "site-packages" / "somebodys" / "layers.py"
    path.parent.mkdir(parents=True)
    path.write_text(INSTALLED)
    spec = importlib.util.spec_from_file_location("somebodys_layers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blamed(middle: nn.Module) -> str:
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2))
    (entry,) = swan.channel_map(model, torch.zeros(2, 3)).unknown
    return entry.line


def test_the_users_own_line_wins_over_a_package_it_calls(tmp_path) -> None:
    package = installed(tmp_path)

    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return package.renormed(x) + 1

    line = blamed(Mine())
    assert line.startswith("tests/test_source_lines.py:")
    assert line.endswith("   return package.renormed(x) + 1")


def test_a_packages_innermost_line_where_there_is_no_own(tmp_path) -> None:
    # The line of this file that calls channel_map is not the model's.
    line = blamed(installed(tmp_path).Layer())
    assert line == "somebodys/layers.py:7   return torch.renorm(x, 2, 1, 0.5)"


def test_nothing_where_only_torch_runs() -> None:
    class Renormed(nn.Module):
        forward = staticmethod(partial(torch.renorm, p=2, dim=1, maxnorm=0.5))

    assert blamed(Renormed()) == ""
