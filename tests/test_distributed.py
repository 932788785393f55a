"""Gated models train under DistributedDataParallel (gloo, CPU): ranks agree, and agree with one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.zoo import ZOO


EPOCH = 2.0


def make_gated() -> GatedModel:
    model, inputs = ZOO["resnet_preactivation"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # batch statistics would differ between one process and several
    gated = swan.swanify(model.double(), tuple(tensor.double() for tensor in inputs))
    drawn = torch.randn(gated.gates.num_units, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        gated.gates.logits.copy_(drawn)
    return gated


def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def train_step(gated: GatedModel, forward: nn.Module, x: torch.Tensor) -> None:
    gated.train()
    for module in gated.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    objective = swan.Objective(gated, l0=0.5, flops=0.5, macs=0.6)
    optimizer = torch.optim.SGD(swan.parameter_groups(gated, lr=0.1))
    (forward(x).square().mean() + objective(EPOCH)).backward()
    optimizer.step()


def state(gated: GatedModel) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in gated.state_dict().items()}


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
    )
    try:
        gated = make_gated()
        if rank:  # DDP starts everybody from rank 0
            with torch.no_grad():
                for parameter in gated.parameters():
                    parameter.zero_()
        wrapped = DistributedDataParallel(gated)
        train_step(gated, wrapped, batch().chunk(world_size)[rank])
        (Path(folder) / f"{rank}.json").write_text(json.dumps(state(gated)))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_equals_the_step_of_one_process(world_size, tmp_path) -> None:
    if world_size == 1:
        worker(0, 1, str(tmp_path))
    else:
        torch.multiprocessing.spawn(worker, (world_size, str(tmp_path)), nprocs=world_size)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(other == found[0] for other in found)  # bit for bit, gates and threshold included
    start = state(make_gated())
    alone = make_gated()
    train_step(alone, alone, batch())
    wanted = state(alone)
    assert found[0]["gates.logits"] != start["gates.logits"]
    assert found[0]["gates._threshold"] != start["gates._threshold"]
    for name, value in wanted.items():
        torch.testing.assert_close(
            torch.tensor(found[0][name], dtype=torch.float64),
            torch.tensor(value, dtype=torch.float64),
            rtol=1e-9,
            atol=1e-12,
        )
