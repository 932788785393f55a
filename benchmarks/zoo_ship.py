"""What the process of one model ships: cut, saved, loaded, exported; in float32, as people ship."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo_models import build, call, copied, suite, tensors_of
from zoo_work import close_units_, first_line

import swan_surgery as swan
from swan_surgery.reporting.measurement import size_bytes


CLOSED = 0.5
SUFFIXES = (".onnx", ".pt2")
Facts = dict[str, Any]


def work_ship(suite_name: str, name: str, emit: Callable[[Facts], None]) -> None:
    """Cut half of the units, save, load into a model built anew, export; all facts so far."""
    facts: Facts = {}
    emit({"stage": "build"})
    case = build(suite_name, name)
    dense, example = case.model.float(), as_float32(case.example)
    facts["params"] = swan.count_params(dense)
    emit(facts | {"stage": "swanify"})
    gated = swan.swanify(dense, example)
    close_units_(gated, CLOSED, torch.Generator().manual_seed(0))
    emit(facts | {"stage": "prune"})
    pruned = swan.prune(gated).eval()
    facts["pruned_params"] = swan.count_params(pruned)
    with tempfile.TemporaryDirectory() as folder:
        emit(facts | {"stage": "save and load"})
        facts |= round_trip(suite_name, name, pruned, example, Path(folder) / "model.swan")
        for suffix in SUFFIXES:
            emit(facts | {"stage": suffix})
            facts[suffix] = exported(pruned, Path(folder) / f"model{suffix}", example)
            if "refused" in facts[suffix]:
                whole = exported(dense.eval(), Path(folder) / f"dense{suffix}", example)
                facts[suffix]["dense_refused"] = whole.get("refused")
    emit(facts | {"verdict": "done"})


def as_float32(inputs: Any) -> Any:
    """Floating-point inputs in float32, the others as they are."""
    return tree_map(lambda x: x.float() if _is_floating(x) else x, inputs)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def round_trip(suite_name: str, name: str, pruned: nn.Module, example: Any, path: Path) -> Facts:
    """Saved, and loaded into a model that was built anew with other weights."""
    started = time.perf_counter()
    swan.save(pruned, path)
    saved = time.perf_counter()
    torch.manual_seed(1)
    base = suite(suite_name).raw_case(name).model.float()
    built = time.perf_counter()
    loaded = swan.load(path, base).eval()
    done = time.perf_counter()
    plain = path.with_suffix(".safetensors")
    save_file(distinct_state(pruned), plain)
    return {
        "bitwise": same_outputs(pruned, loaded, example),
        "same_class": type(loaded) is type(pruned),
        "file_bytes": path.stat().st_size,
        "plain_bytes": plain.stat().st_size,
        "weight_bytes": size_bytes(pruned),
        "save_seconds": saved - started,
        "load_seconds": done - built,
    }


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """The state as a plain safetensors file has it: every tensor once, contiguous."""
    seen: dict[tuple[int, torch.Size], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        seen.setdefault(
            (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor), tensor.shape),
            name,
        )
    return {name: state[name].contiguous() for name in seen.values()}


@torch.no_grad()
def same_outputs(one: nn.Module, other: nn.Module, example: Any) -> bool:
    """Bitwise, every tensor; both start from the same random state."""
    found = []
    for model in (one, other):
        torch.manual_seed(2)
        found.append(tensors_of(call(model, copied(example))))
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def exported(pruned: nn.Module, path: Path, example: Any) -> Facts:
    """What `swan.export` measured, or why it refused."""
    started = time.perf_counter()
    try:
        found = swan.export(pruned, path, copied(example))
    except swan.SwanError as err:
        return {"refused": first_line(err), "seconds": time.perf_counter() - started}
    return {
        "relative_error": found.relative_error,
        "batches": list(found.batches),
        "file_bytes": found.size_bytes,
        "seconds": time.perf_counter() - started,
    }
