"""The tutorial runs from top to bottom, and what it promises holds."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch


TUTORIAL = Path(__file__).parent.parent / "recipes" / "TUTORIAL.md"


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "tutorial"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        for number, code in enumerate(blocks, 1):
            exec(compile(code, f"TUTORIAL.md, step {number}", "exec"), names)  # noqa: S102
    assert names["dense_accuracy"] > 95
    assert names["small_accuracy"] > names["dense_accuracy"] - 2
    assert {path.name for path in tmp_path.iterdir()} == {"small.swan", "small.onnx", "report.html"}
    text = printed.getvalue()
    for promised in ("view", "head", "of the MACs remain", "relative error", "ms ["):
        assert promised in text
