"""The README's code runs, its tables are current, and the docstrings' examples hold."""

import contextlib
import doctest
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swan_surgery import distillation, ramps


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_shows_code() -> None:
    assert code_blocks()


@pytest.mark.slow
@pytest.mark.parametrize("code", code_blocks())
def test_readme_code_runs_and_prunes_to_half_the_macs(code: str) -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - that is the test
    assert "MACs" in printed.getvalue()
    small, base = names["small"], names["model"]
    assert isinstance(small, torch.nn.Module)
    assert type(small) is type(base)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(
        p.numel()
        for p in base.parameters()  # type: ignore[attr-defined]
    )


def test_readme_tables_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_docstring_examples_hold() -> None:
    for module in (ramps, distillation):
        assert doctest.testmod(module).failed == 0
        assert doctest.testmod(module).attempted > 0
