"""The README's code runs, its tables are current, and the docstrings' examples hold."""

import contextlib
import doctest
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swan_surgery as swan
from swan_surgery.learning import ramps


ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / name).read_text() for name in ("README.md", "docs/guide.md")]
# As `hard_macs` and `count_macs`.
WITHOUT_EXAMPLE = {"count_params", "expected_params", "hard_params", "marginal_macs"}


def code_blocks() -> list[str]:
    return [
        code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    ]


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
        p.numel() for p in base.parameters()
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


PUBLIC = [name for name in swan.__all__ if inspect.isroutine(getattr(swan, name))]
EXAMPLES = doctest.DocTestFinder(recurse=False)


CLASSES = [name for name in swan.__all__ if inspect.isclass(getattr(swan, name))]


@pytest.mark.parametrize("name", [*PUBLIC, *CLASSES])
def test_docstring_examples_hold(name, tmp_path) -> None:
    names = vars(swan) | {"torch": torch, "nn": torch.nn, "swan": swan, "folder": tmp_path}
    for example in EXAMPLES.find(getattr(swan, name), name, globs=names):
        told = io.StringIO()
        found = doctest.DocTestRunner().run(example, out=told.write)
        assert not found.failed, told.getvalue()


def test_what_people_call_first_has_an_example() -> None:
    without = {name for name in PUBLIC if not EXAMPLES.find(getattr(swan, name))[0].examples}
    assert without == WITHOUT_EXAMPLE


def test_examples_of_modules_hold() -> None:
    for module in (ramps,):
        assert doctest.testmod(module).failed == 0
        assert doctest.testmod(module).attempted > 0
