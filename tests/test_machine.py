"""The machine has a name, with and without /proc."""

import platform
from pathlib import Path

import pytest
import torch

from swan_surgery.environment.machine import device_name, wait_for


def test_the_processor_as_the_kernel_names_it(monkeypatch) -> None:
    text = "processor : 0\nmodel name\t: A Fast One @ 3: GHz\nmodel name\t: another\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert device_name(torch.device("cpu")) == "A Fast One @ 3: GHz"


def test_elsewhere_what_python_knows(monkeypatch) -> None:
    def missing(self, encoding):
        raise OSError("no such file")

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert device_name(torch.device("cpu")) == "riscv64"


def test_the_cpu_is_never_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waited"))
    wait_for(torch.device("cpu"))


@pytest.mark.gpu
def test_the_gpu_has_a_name() -> None:
    assert device_name(torch.device("cuda")) == torch.cuda.get_device_name()
