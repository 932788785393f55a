"""Random networks of 78 kinds of blocks, foreign ones on purpose: is anything silently wrong?

    python benchmarks/search/search.py --networks 2000      # goes on where it stopped
    python benchmarks/search/search.py --seed 17            # one network, with its traceback
    python benchmarks/search/search.py --seed 17 --shrink   # the fewest blocks that still fail

For every network, in float64: the given model is untouched; open gates give its outputs, gradients and
buffers in both modes; closed equals cut at the mapped size, at other sizes and batches, in eval and train
mode, gradients included; the predicted cost is what is counted. At another size a `PathError` is right, any
other difference a fault. What the library refuses is listed by reason.
"""

import argparse
import collections
import copy
import itertools
import json
import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS
from networks import Recipe, drawn, other_inputs
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swan_surgery as swan
from swan_surgery.cutting.plan import PruningPlan, make_plan


TOLERANCE = 1e-9
SECONDS = 120
# These run on rows that data selects, which other widths may select otherwise: their cost is an estimate.
SELECTING = {"experts"}


class LawError(Exception):
    """A law does not hold."""


def close(one: Tensor, two: Tensor, scale: float | None = None) -> bool:
    """Equal relative to the largest entry, or to a given scale."""
    if one.shape != two.shape:
        return False
    if scale is None:
        scale = max(float(one.abs().max()), 1e-12) if one.numel() else 1.0
    return bool(((one - two).abs() <= TOLERANCE * scale).all() | one.isnan().all())


Run = tuple[list[Tensor], Tensor, dict[str, Tensor], dict[str, Tensor]]


def run(model: nn.Module, x: Tensor, *, train: bool) -> Run:
    """Outputs, gradient of the input, of the parameters, buffers afterwards; same random numbers."""
    model = copy.deepcopy(model).train(train)
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=x.dtype)
    for t in outputs:
        if t.requires_grad:
            loss = loss + (t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
    loss.backward()
    base = model.model if isinstance(model, swan.GatedModel) else model
    grads = {n: p.grad for n, p in base.named_parameters() if p.grad is not None}
    buffers = {n: b.detach() for n, b in base.named_buffers()}
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    return [t.detach() for t in outputs], grad, grads, buffers


def sliced(tensors: dict[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    tensors = dict(tensors)
    for entry in plan.positions:
        if entry.tensor in tensors:
            index = torch.tensor(entry.kept, dtype=torch.long)
            tensors[entry.tensor] = tensors[entry.tensor].index_select(entry.axis, index)
    return tensors


def same(one: Run, two: Run, what: str, plan: PruningPlan | None = None) -> None:
    if len(one[0]) != len(two[0]) or not all(map(close, one[0], two[0])):
        raise LawError(f"{what}: outputs differ")
    # Some gradients are zero but for rounding (a bias in front of a norm): one scale for all.
    scale = max(1.0, *(float(grad.abs().max()) for grad in (one[1], *one[2].values())))
    if not close(one[1], two[1], scale):
        raise LawError(f"{what}: gradients of the input differ")
    for index, name in ((2, "gradient"), (3, "buffer")):
        first, second = one[index], two[index]
        first = first if plan is None else sliced(first, plan)
        for key in sorted(first.keys() & second.keys()):
            if not close(first[key].double(), second[key].double(), scale if index == 2 else None):
                raise LawError(f"{what}: {name} of {key} differs")


def attempt(model: nn.Module, x: Tensor, *, train: bool) -> Run | Exception:
    try:
        return run(model, x, train=train)
    except Exception as err:  # noqa: BLE001 - models refuse sizes in all sorts of ways
        return err


def agree(
    first: nn.Module, second: nn.Module, x: Tensor, what: str, plan: PruningPlan | None = None
) -> None:
    """Where the first runs, the second gives the same or says that it cannot."""
    modes = (False,) if any(getattr(m, "draws", False) for m in first.modules()) else (False, True)
    for train in modes:
        wanted = attempt(first, x, train=train)
        found = attempt(second, x, train=train)
        label = f"{what}, {'train' if train else 'eval'}"
        if isinstance(wanted, Exception) or isinstance(found, swan.PathError):
            continue
        if isinstance(found, Exception):
            raise LawError(f"{label}: {type(found).__name__}: {str(found)[:120]}") from found
        same(wanted, found, label, plan)


def check(recipe: Recipe, model: nn.Module, example: Tensor) -> dict[str, Any]:
    """All laws on one network; raises what is wrong."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random_state = torch.get_rng_state()
    twin = copy.deepcopy(model)
    try:
        gated = swan.swanify(model, example).eval()
    except swan.SwanError as err:
        return {"refused": f"{type(err).__name__}: {err}"}
    finally:
        if not torch.equal(random_state, torch.get_rng_state()):
            raise LawError("the random numbers of the process were drawn from")
        after = model.state_dict()
        if before.keys() != after.keys() or not all(
            torch.equal(before[n], after[n]) for n in before
        ):
            raise LawError("the given model was touched")
    others = other_inputs(recipe)
    agree(twin, gated, example, "open, mapped input")
    for x in others:
        agree(twin, gated, x, f"open, {tuple(x.shape)}")
    generator = torch.Generator().manual_seed(recipe.seed)
    count = gated.channels.num_units
    share = 0.3 + 0.5 * float(torch.rand((), generator=generator))
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(torch.rand(count, generator=generator) < share, -9, 9))
    predicted = int(swan.hard_macs(gated)), int(swan.hard_params(gated))
    plan = make_plan(gated.channels, gated.gates.open_mask())
    small = swan.prune(gated)
    for x in (example, *others):
        agree(gated, small, x, f"closed, {tuple(x.shape)}", plan)
    counted = swan.count_macs(small, example), sum(p.numel() for p in small.parameters())
    if SELECTING & set(recipe.blocks):
        predicted, counted = predicted[1:], counted[1:]
    if predicted != counted:
        raise LawError(f"cost: predicted {predicted}, counted {counted}")
    reads = [units for layer in gated.channels.layers for units in (layer.out_units,) if units]
    gates = sum(unit >= 0 for units in reads for unit in units)
    return {"share": gates / max(1, sum(map(len, reads))), "in_place": gated.acting is not None}


def verdict(seed: int, kinds: tuple[str, ...] = (), *, loud: bool = False) -> dict[str, Any]:
    """One network's row: what it is and what was found."""
    torch.set_num_threads(1)
    recipe, model, example = drawn(seed, kinds)
    row: dict[str, Any] = {"seed": seed, "blocks": list(recipe.blocks), "head": recipe.head}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row |= check(recipe, model, example)
    except LawError as err:
        row["wrong"] = str(err)
    except Exception as err:  # noqa: BLE001 - each is a finding
        row["error"] = f"{type(err).__name__}: {str(err)[:200]}"
        if loud:
            traceback.print_exc()
    finally:
        signal.alarm(0)
    return row


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def failed(row: dict[str, Any]) -> bool:
    return "wrong" in row or "error" in row


def shrunk(seed: int) -> tuple[str, ...]:
    """The fewest of its blocks with which a network still fails."""
    blocks = tuple(verdict(seed)["blocks"])
    for count in range(1, len(blocks) + 1):
        for chosen in itertools.combinations(blocks, count):
            if failed(verdict(seed, chosen)):
                return chosen
    return blocks


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def search(path: Path, wanted: int, jobs: int) -> None:
    done = {row["seed"] for row in rows_of(path)}
    todo = [seed for seed in range(wanted) if seed not in done]
    context = multiprocessing.get_context("forkserver")
    with context.Pool(jobs, maxtasksperchild=200) as pool, path.open("a") as file:
        for row in pool.imap_unordered(verdict, todo):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if failed(row):
                print(row["seed"], "+".join(row["blocks"]), row.get("wrong") or row["error"])


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    kinds = {name for row in rows for name in row["blocks"]}
    yield f"{len(rows)} networks of {len(kinds)} kinds of blocks (of {len(KINDS)})"
    exact = [row for row in rows if "share" in row]
    if exact:
        shares = sum(row["share"] for row in exact) / len(exact)
        graph = sum(not row["in_place"] for row in exact)
        yield f"{len(exact)} exact, mean gated share {shares:.3f}; {graph} of them on the traced graph"
    yield f"{sum('wrong' in row for row in rows)} wrong, {sum('error' in row for row in rows)} errors"
    reasons = collections.Counter(
        row["refused"].split("\n")[0][:100] for row in rows if "refused" in row
    )
    for reason, count in reasons.most_common():
        yield f"{count} refused: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument(
        "--output", type=Path, default=Path("search.jsonl"), help="one row a network"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, help="only this network")
    parser.add_argument("--kinds", type=lambda text: tuple(text.split("+")), default=())
    parser.add_argument("--shrink", action="store_true")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        kinds = shrunk(chosen.seed) if chosen.shrink else chosen.kinds
        print(json.dumps(verdict(chosen.seed, kinds, loud=True), indent=1))
        return
    search(chosen.output, chosen.networks, chosen.jobs)
    rows = [row for row in rows_of(chosen.output) if row["seed"] < chosen.networks]
    print("\n".join(summary(rows)))
    sys.exit(any(map(failed, rows)))


if __name__ == "__main__":
    main()
