"""Gated models train under DistributedDataParallel (gloo, CPU): ranks agree, and agree with one process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from swan_surgery.integrations.steps import finish
from tests.gated_zoo import drawn_zoo
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


def state(gated: nn.Module) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in gated.state_dict().items()}


@contextmanager
def process_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def step_worker(rank: int, world_size: int) -> dict:
    gated = make_gated()
    if rank:  # DDP starts everybody from rank 0
        with torch.no_grad():
            for parameter in gated.parameters():
                parameter.zero_()
    wrapped = DistributedDataParallel(gated)
    train_step(gated, wrapped, batch().chunk(world_size)[rank])
    return state(gated)


def rank_of_two(rank: int, folder: str) -> None:
    """What all tests here want of two processes: starting them costs more than all of it."""
    with process_group(rank, 2, folder):
        found = {"step": step_worker(rank, 2), "finish": finish_worker(rank)}
        found |= {learning: train_worker(rank, 2, learning) for learning in LEARNINGS}
        found["routed"] = routed_worker(rank, 2)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(rank_of_two, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_step_of_a_group_of_one_equals_the_step_without(tmp_path) -> None:
    with process_group(0, 1, str(tmp_path)):
        check_step([step_worker(0, 1)])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_step_of_two_processes_equals_the_step_of_one(two_ranks) -> None:
    check_step([found["step"] for found in two_ranks])


def check_step(found: list[dict]) -> None:
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


NUM_STEPS = 6
LEARNINGS = ("curvature", "gradient")


def mlp(seed: int) -> GatedModel:
    """Weights, and so the order that gates start in, by seed; none of the modules keeps statistics."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    return swan.swanify(model.double(), torch.zeros(1, 6, dtype=torch.float64)).train()


def train(gated: GatedModel, forward: nn.Module, objective: swan.Objective, part: slice) -> dict:
    """Six steps under a falling budget; the gates after each."""
    optimizer = torch.optim.SGD(swan.parameter_groups(gated, lr=0.05), momentum=0.9)
    generator = torch.Generator().manual_seed(8)
    seen: dict[str, list] = {"logits": [], "is_open": [], "threshold": [], "macs": []}
    for step in range(NUM_STEPS):
        x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64)[part] for n in (6, 3))
        optimizer.zero_grad()
        loss = (forward(x) - y).square().mean() + objective(step)
        seen["is_open"].append(gated.gates.open_mask().tolist())
        seen["macs"].append(swan.hard_macs(gated))
        loss.backward()
        optimizer.step()
        seen["logits"].append(gated.gates.logits.tolist())
        seen["threshold"].append(gated.gates.threshold)
    return seen | {"weight": gated.model[0].weight.tolist()}


def make_objective(gated: GatedModel, learning: str) -> swan.Objective:
    return swan.Objective(gated, macs=0.4, learning=learning, ramp=swan.CosineRamp(0, 4))


def train_worker(rank: int, world_size: int, learning: str) -> dict:
    gated = mlp(seed=rank)  # DDP gives everybody the weights of rank 0, afterwards
    objective = make_objective(gated, learning)
    size = 8 // world_size
    part = slice(rank * size, (rank + 1) * size)
    return train(gated, DistributedDataParallel(gated), objective, part)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_gates_under_a_falling_budget_are_those_of_one_process(two_ranks) -> None:
    for learning in LEARNINGS:
        first, second = (found[learning] for found in two_ranks)
        assert first == second  # bit for bit, after every step
        gated = mlp(seed=0)
        alone = train(gated, gated, make_objective(gated, learning), slice(None))
        assert first["is_open"] == alone["is_open"]
        assert first["macs"] == alone["macs"]
        assert first["macs"][-1] <= 0.4 * swan.count_macs(gated, gated.example_inputs)
        assert len({tuple(mask) for mask in first["is_open"]}) > 2  # they did move
        for name in ("logits", "threshold", "weight"):
            torch.testing.assert_close(
                torch.tensor(first[name], dtype=torch.float64),
                torch.tensor(alone[name], dtype=torch.float64),
                rtol=1e-9,
                atol=1e-12,
            )


def finish_worker(rank: int) -> dict[str, list]:
    gated = drawn_zoo(dtype=torch.float32)
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))]
    small = finish(swan.Objective(gated, l0=0.1), data, inputs_of=None, num_batches=None)
    return {name: tensor.tolist() for name, tensor in small.state_dict().items()}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ranks_finish_alike_on_different_data(two_ranks) -> None:
    first, second = (found["finish"] for found in two_ranks)
    assert first == second


def routed_worker(rank: int, world_size: int) -> dict[str, list]:
    torch.manual_seed(rank)
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(*layers).double()
    routed = swan.add_switch(model, "1", example_inputs=x, light=0.5, mask=True).train()
    start = state(routed)
    wrapped = DistributedDataParallel(routed.body)
    objective = swan.Objective(routed.gated, macs=0.8)
    optimizer = torch.optim.SGD(swan.parameter_groups(routed.gated, lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        loss = routed.loss(x.chunk(world_size)[rank], run=wrapped) + objective(float(step))
        loss.backward()
        optimizer.step()
    wrapped(x)  # the statistics of rank 0 count for all
    with pytest.warns(swan.SwanWarning, match=r"run=ddp"):
        DistributedDataParallel(routed).module.loss(x)
    found = state(routed)
    return found | {"moved": [name for name in found if found[name] != start.get(name)]}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ranks_train_one_routed_model(two_ranks) -> None:
    first, second = (found["routed"] for found in two_ranks)
    moved = first.pop("moved")
    second.pop("moved")
    assert first == second  # bit for bit, although each rank drew other weights at first
    for part in (".switch.out.weight", ".light.", ".switch.scale", ".switch.norm.running_mean"):
        assert any(part in name for name in moved), part
    assert "body.gates.logits" in moved
    assert not any(".trunk." in name or ".full." in name for name in moved)


@pytest.fixture
def mesh(tmp_path) -> Iterator[DeviceMesh]:
    threads = torch.get_num_threads()
    with process_group(0, 1, str(tmp_path)):
        yield init_device_mesh("cpu", (1,))
    torch.set_num_threads(threads)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sharded_models_are_refused_with_what_works(mesh) -> None:
    x = torch.randn(2, 3)
    whole = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    for model in (fully_shard(plain(), mesh=mesh), whole):
        with pytest.raises(swan.ModelError, match=r"is sharded .* swanify it before\."):
            swan.swanify(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_refusal_of_sharded_models_says_works(mesh, tmp_path, in_place) -> None:
    x, model = torch.randn(2, 3), plain()
    gated = swan.swanify(model, x, in_place=in_place)
    with torch.no_grad():
        gated.gates.logits[::2] = -3.0
    fully_shard(gated, mesh=mesh)
    optimizer = torch.optim.SGD(gated.model.parameters(), lr=0.1)
    gated(x).square().sum().backward()
    optimizer.step()
    wanted = gated.eval()(x)
    for refused in (swan.prune, lambda own: swan.save(own, tmp_path / "x.swan")):
        with pytest.raises(swan.ModelError, match="full_state_dict=True"):
            refused(gated)
    again = swan.swanify(model, x, in_place=in_place)
    options = StateDictOptions(full_state_dict=True)
    again.load_state_dict(get_model_state_dict(gated, options=options))
    torch.testing.assert_close(swan.prune(again).eval()(x), wanted)
