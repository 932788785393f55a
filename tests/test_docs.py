"""The documentation: every public name has a place in the reference, and the notebooks run."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import swan_surgery as swan


DOCS = Path(__file__).parent.parent / "docs"


def test_every_public_name_is_on_one_page_of_the_reference():
    found = [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in re.findall(r"(?m)^::: swan_surgery\.(\w+)$", page.read_text())
    ]
    assert sorted(found) == sorted(swan.__all__)


def test_the_reference_begins_with_a_list_of_all_of_it():
    overview = (DOCS / "api" / "index.md").read_text()
    assert set(re.findall(r"\[swan_surgery\.(\w+)\]", overview)) == set(swan.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.py")), ids=lambda own: own.stem)
def test_notebooks_run_as_scripts(notebook, capsys):
    """Each prints what it found; what must hold is asserted in it, or below."""
    with torch.random.fork_rng():
        names = runpy.run_path(str(notebook))
    printed = capsys.readouterr().out
    if notebook.stem == "cut_without_labels":
        percent = [float(names["accuracy"](names[own]).split()[0]) for own in ("model", "plain")]
        compensated = float(names["accuracy"](names["done"].model).split()[0])
        assert percent[0] >= compensated > percent[1]
    elif notebook.stem == "gates_in_your_loop":
        assert (names["wide"] - names["narrow"]).abs().max() < 1e-4
        assert swan.count_macs(names["small"], names["images"][:1]) < 0.5 * swan.count_macs(
            names["model"], names["images"][:1]
        )
    else:
        assert names["certificate"].bound <= 0.05
        assert 0 < names["certificate"].shares[0] < 1
    assert "MACs" in printed
