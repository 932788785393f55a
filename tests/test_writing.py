"""Whole or not at all."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.environment.locking import alone_in
from swan_surgery.environment.writing import replacing


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("mode", [None, 0o600, 0o640, 0o444])
def test_permissions_are_those_of_any_file_here_or_stay(mode, tmp_path) -> None:
    (tmp_path / "plain").write_text("x")
    path = tmp_path / "x.swan"
    if mode is not None:
        path.write_text("old")
        path.chmod(mode)
    swan.save(nn.Linear(2, 2), path)
    expected = (tmp_path / "plain").stat().st_mode & 0o777 if mode is None else mode
    assert path.stat().st_mode & 0o777 == expected


def test_an_error_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_what_the_system_refuses_is_a_writing_error(tmp_path) -> None:
    def write() -> None:
        with replacing(tmp_path / "none" / "x.txt") as temporary:
            temporary.write_text("x")

    with pytest.raises(swan.WritingError, match=r"cannot write .*x\.txt: there is no folder"):
        write()


def test_threads_may_write_one_path_and_one_of_them_is_the_last(tmp_path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "x.swan"
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(swan.save, model, path) for _ in range(40)]:
            done.result()
    assert torch.equal(swan.load(path, nn.Linear(2, 2)).weight, model.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["x.swan"]


def test_what_is_written_beside_it_comes_along(tmp_path) -> None:
    with replacing(tmp_path / "x.onnx") as temporary:
        temporary.write_text("net")
        temporary.with_name("x.onnx.data").write_text("weights")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "x.onnx": "net",
        "x.onnx.data": "weights",
    }


def test_the_next_save_clears_what_a_killed_one_left_and_nothing_of_one_that_runs(tmp_path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from swan_surgery.environment.writing import replacing\n"
        f"with replacing(Path({str(tmp_path / 'x.swan')!r})) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with replacing(tmp_path / "running.swan") as running:
        running.write_text("half")
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
        assert len(list(tmp_path.iterdir())) == 2
        swan.save(nn.Linear(2, 2), tmp_path / "y.swan")
        left = {p.name for p in tmp_path.iterdir()}
        assert left == {"y.swan", running.parent.name}
        running.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"y.swan", "running.swan"}


def test_two_in_one_folder(tmp_path) -> None:
    def second() -> None:
        with alone_in(tmp_path, "training"):
            pass

    with (
        alone_in(tmp_path, "training"),
        pytest.raises(swan.WritingError, match="another training is under way in "),
    ):
        second()
    second()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_left_alone(kind, tmp_path) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(swan.WritingError, match="no regular file"):
        swan.save(nn.Linear(2, 2), path)
    assert stat.S_ISFIFO(path.stat().st_mode) if kind == "pipe" else path.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
