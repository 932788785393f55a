"""Everything a user does with a model, on a CUDA device; the same functions run on the CPU as well.

The device is a parameter whose CUDA value is marked `gpu`, so that faults of the tests show where there is
no GPU. `benchmarks/gpu.py` runs these first.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.learning.curvature import CurvatureRule
from tests.closing import learnt_


pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PLACES = [False, True]  # in the traced graph, in the model's own code
HALVES = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    """A residual trunk of two blocks and a head: folded gates, shared units, batch-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.outer_norm = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        return self.fc(F.relu(x).mean((2, 3)))


class Normed(nn.Module):
    """Layer norms over gated channels: statistics that gates weigh, so gates act in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


class Chosen(nn.Module):
    """Its path depends on values, so no shell of it can be mapped; positions of rows lie with the model."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("order", torch.tensor([1, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 1e9):
            x = -x
        return self.last(F.relu(self.first(x))[self.order])


def images(device, count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype).to(device)


def net(device, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that a wrong cut cannot hide
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(device, dtype)


def close_some(gated):
    with torch.no_grad():
        gated.gates.logits[::3] = -3.0


def assert_on(model, device):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.device.type != device] == []


def close(one, two, bound=1e-9):
    assert one.device == two.device
    assert one.dtype == two.dtype
    one, two = one.detach(), two.detach()
    assert float((one - two).abs().max()) <= bound * float(one.abs().max())


@pytest.mark.parametrize("in_place", PLACES)
def test_swanify_changes_nothing_and_puts_gates_beside_the_model(device, in_place):
    model, x = net(device).eval(), images(device)
    gated = swan.swanify(model, x[:1], in_place=in_place)
    assert gated.runs_in_place == in_place
    assert_on(gated, device)
    close(model(x), gated(x))
    back = swan.unswanify(gated)
    assert_on(back, device)
    close(model(x), back(x))


@pytest.mark.parametrize("given", ["on the CPU", "none"])
def test_swanify_takes_example_inputs_from_the_cpu_or_guesses_them(device, given):
    model = net(device).eval()
    gated = swan.swanify(model, images("cpu", 1)) if given != "none" else swan.swanify(model)
    close_some(gated)
    x = images(device)
    close(gated(x), swan.prune(gated)(x))


@pytest.mark.parametrize("in_place", PLACES)
def test_closed_equals_cut_and_the_cost_is_exact(device, in_place):
    gated = swan.swanify(net(device).eval(), images(device, 1), in_place=in_place)
    close_some(gated)
    small = swan.prune(gated)  # verified on the device
    assert_on(small, device)
    x = images(device)
    close(gated(x), small(x))
    assert swan.hard_macs(gated) == swan.count_macs(small, x[:1])
    assert swan.hard_params(gated) == swan.count_params(small)
    assert small.inner.out_channels < 12


@pytest.mark.parametrize("kind", [Normed, Chosen])
def test_statistics_and_positions_follow_the_device(device, kind):
    torch.manual_seed(0)
    model = kind().to(device, torch.float64).eval()
    x = torch.randn(4, 6, dtype=torch.float64).to(device)
    gated = swan.swanify(model, x)
    assert gated.gates.num_units == 8
    close_some(gated)
    small = swan.prune(gated)
    close(gated(x), small(x))
    assert small.first.out_features == 5


def trained(gated, objective, device, steps=3):
    x, y = images(device, 8), torch.arange(8, device=device) % 5
    groups = swan.parameter_groups(gated, lr=0.01, gate_lr=0.2, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    gated.train()
    for step in range(steps):
        loss = F.cross_entropy(gated(x), y) + objective(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    objective(steps)
    return gated


@pytest.mark.parametrize(
    "options",
    [{}, {"learning": "gradient"}, {"preset": "paper"}],
    ids=["curvature", "gradient", "paper"],
)
@pytest.mark.parametrize("in_place", PLACES)
def test_gates_learn_to_a_budget(device, options, in_place):
    gated = swan.swanify(net(device), images(device, 1), in_place=in_place)
    before = gated.gates.logits.detach().clone()
    objective = swan.Objective(gated, macs=0.5, **options)
    trained(gated, objective, device)
    assert not torch.equal(before, gated.gates.logits)
    assert objective.log()["hard_macs"] > 0
    small = swan.prune(gated, macs=0.5)
    x = images(device, 1)
    assert swan.count_macs(small, x) <= 0.5 * swan.count_macs(net(device), x)
    state = copy.deepcopy(objective.state_dict())
    objective.load_state_dict(state)
    objective(9)


def test_calibrate_takes_batches_from_anywhere(device):
    gated = swan.swanify(net(device), images(device, 1))
    close_some(gated)
    assert swan.calibrate(gated, [images("cpu"), images(device)]) == 2
    assert_on(gated, device)
    x = gated.model.stem(images(device))
    assert torch.allclose(gated.model.norm.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("score", ["magnitude", "bn_scale", "fisher", "taylor", "random"])
def test_scores_lie_with_the_model_and_prune_it(device, score):
    gated = swan.swanify(net(device), images(device, 1))
    batches = [(images(device), torch.arange(4, device=device))] * 2
    scores = swan.importance(
        gated,
        score,
        batches=batches,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    assert scores.device.type == device
    assert bool(scores.any())
    small = swan.prune_by_score(gated, scores, macs=0.5)
    assert swan.count_params(small) < swan.count_params(net(device))


@pytest.mark.parametrize("gated_too", [False, True])
def test_a_saved_model_comes_back_bitwise(device, gated_too, tmp_path):
    gated = swan.swanify(net(device).eval(), images(device, 1))
    close_some(gated)
    own = gated if gated_too else swan.prune(gated)
    swan.save(own, tmp_path / "own.swan")
    back = swan.load(tmp_path / "own.swan", net(device).eval())
    assert_on(back, device)
    x = images(device)
    assert torch.equal(own(x), back(x))
    elsewhere = swan.load(tmp_path / "own.swan", net("cpu").eval())
    assert_on(elsewhere, "cpu")
    close(own(x).cpu(), elsewhere(x.cpu()))


@pytest.mark.filterwarnings("ignore:the machine is too noisy to choose")  # other jobs may run on it
def test_latencies_are_measured_where_the_model_is(device):
    model = net(device, torch.float32).eval()
    x = images(device, 2, torch.float32)
    measured = swan.measure_latency(model, x, seconds=0.05)
    assert measured.latency.median_ms > 0
    if device == "cuda":
        assert measured.environment.device == torch.cuda.get_device_name()
    gated = learnt_(swan.swanify(model, x[:1]))
    table = swan.measure_latency_table(gated, repeats=2)
    assert table.total_ms > 0
    small = swan.prune(gated, macs=0.5, round_to="auto", latency_table=table)
    compared = swan.report(model, small, images("cpu", 1, torch.float32))
    assert compared.after.macs <= 0.5 * compared.before.macs


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("in_place", PLACES)
def test_gates_learn_under_autocast(device, dtype, in_place):
    gated = swan.swanify(
        net(device, torch.float32), images(device, 1, torch.float32), in_place=in_place
    )
    objective = swan.Objective(gated, macs=0.5)
    x, y = images(device, 8, torch.float32), torch.arange(8, device=device) % 5
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(swan.parameter_groups(gated, lr=0.01, gate_lr=0.2))
    gated.train()
    for step in range(3):
        with torch.autocast(device, dtype):
            logits = gated(x)
        assert logits.dtype is dtype
        loss = F.cross_entropy(logits.float(), y) + objective(step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    objective(3)
    assert swan.hard_macs(gated) <= 0.5 * swan.count_macs(gated, x[:1])
    small = swan.prune(gated)
    with torch.autocast(device, dtype):
        assert bool(small.eval()(x).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_and_half_weights_stay(device, dtype):
    model = net(device, dtype).to(memory_format=torch.channels_last).eval()
    x = images(device, 1, dtype).to(memory_format=torch.channels_last)
    gated = swan.swanify(model, x)
    close_some(gated)
    small = swan.prune(gated)
    for weight in (gated.model.inner.weight, small.inner.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.dtype is dtype
    bound = 1e-4 if dtype is torch.float32 else 0.05
    if device == "cuda" and dtype is torch.float32:
        bound = 5e-3  # convolutions may be TensorFloat-32 there
    close(gated(x), small(x), bound)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", PLACES)
def test_a_compiled_step_computes_what_the_eager_one_does(device, in_place):
    gated = swan.swanify(net(device), images(device, 1), in_place=in_place)
    close_some(gated)
    x, y = images(device, 8), torch.arange(8, device=device) % 5
    found = []
    # Without a C++ compiler there is no code for the CPU; on CUDA this is the whole of it.
    backend = "inductor" if device == "cuda" else "aot_eager"
    for run in (gated, torch.compile(gated, backend=backend)):
        own = copy.deepcopy(gated.state_dict())
        gated.train().zero_grad()
        F.cross_entropy(run(x), y).backward()
        found.append([p.grad.clone() for p in gated.parameters() if p.grad is not None])
        gated.load_state_dict(own)
    assert len(found[0]) == len(found[1]) > 10
    for eager, compiled in zip(*found, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-9)


def captured_step(step, device):
    """On CUDA a graph of `step`; on the CPU the function itself."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize(
    "min_width", [1, 0.6, {"inner": 7, "stem": 0}], ids=["one", "share", "mapping"]
)
def test_gates_learn_from_a_captured_step(device, min_width):
    gated = swan.swanify(net(device), images(device, 1))
    gated.gates.min_width = min_width
    objective = swan.Objective(gated, macs=0.9)
    x, y = images(device, 8), torch.arange(8, device=device) % 5
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
    gated.train()

    def step():
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(gated(x), y).backward()
        optimizer.step()

    replay = captured_step(step, device)
    objective(0)  # whatever was gathered while warming up
    seen = []
    for epoch in range(1, 4):
        replay()
        objective(epoch)
        seen.append(objective.state_dict()["curvature"]["mean"])
    assert bool(seen[0].any())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert objective.log()["hard_macs_ratio"] <= 0.9


def test_gradients_are_gathered_in_the_memory_that_a_graph_would_go_on_writing(device):
    gated = swan.swanify(net(device), images(device, 1)).train()
    limits = swan.Objective(gated, macs=0.5).limits
    rule = CurvatureRule(gated, decay=0.9)
    place = rule._pending.data_ptr()
    for _ in range(2):
        gated(images(device)).square().sum().backward()
        assert bool(rule._pending.any())
        rule.project(limits)
        assert not bool(rule._pending.any())
    assert rule._pending.data_ptr() == place


class _Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes operations that read from the device or copy to it: a capture refuses them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh", "aten.equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_place", PLACES)
@pytest.mark.parametrize(
    "min_width", [1, 0.6, {"inner": 3, "*": 0}], ids=["one", "share", "mapping"]
)
def test_a_step_with_gates_never_waits_for_the_device(device, in_place, min_width):
    gated = swan.swanify(net(device), images(device, 1), in_place=in_place).train()
    gated.gates.min_width = min_width
    swan.Objective(gated, macs=0.9)
    x = images(device)
    with _Waits() as waits:
        gated(x).square().sum().backward()
    assert waits.found == []


@pytest.mark.parametrize("options", [{"macs": 0.5}, {"macs": 0.5, "params": 0.6}])
def test_an_objective_waits_for_the_device_a_few_times_a_call(device, options):
    gated = swan.swanify(net(device), images(device, 1)).train()
    objective = swan.Objective(gated, **options)
    gated(images(device)).square().sum().backward()
    objective(0)
    gated(images(device)).square().sum().backward()
    with _Waits() as waits:
        objective(1)
    # Are logits finite, how full is each limit, and once more where the rest is filled, as in this small network.
    assert len(waits.found) <= 1 + 2 * len(options)
