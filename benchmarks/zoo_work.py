"""What the process of one model measures with our own library."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import Case, build, call, copied

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.cutting.verification import relative_error
from swan_surgery.models import as_inputs


CLOSED = (0.3, 0.7)
PATIENCE = 1  # seconds; what takes longer is timed in one call, without a warm-up
WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
Facts = dict[str, Any]


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A warm call's result, its wall seconds and its CPU seconds."""
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if seconds["wall"] > PATIENCE:
            break
    return result, seconds


def first_line(err: BaseException) -> str:
    text = str(err).strip()
    return f"{type(err).__name__}: {text.splitlines()[0] if text else ''}"


def work_swan(suite: str, name: str, emit: Callable[[Facts], None]) -> None:
    """Map, gate and cut one model; `emit` gets all facts so far, again and again.

    The last facts hold a verdict: `exact`, `wrong` or `nothing gated`. What raises, raises.
    """
    facts: Facts = {}
    gated, case, given = _convert(suite, name, facts, emit)
    if gated is None:
        return
    facts["macs"] = _or_error(lambda: swan.count_macs(gated, case.example))
    facts["cuts"] = []
    for share in CLOSED:
        emit(facts | {"stage": f"cut {share}"})
        facts["cuts"].append(cut_facts(gated, share, case, given))
    emit(facts | verdict(facts))


def _convert(
    suite: str, name: str, facts: Facts, emit: Callable[[Facts], None]
) -> tuple[swan.GatedModel | None, Case, type[nn.Module]]:
    """Map and gate a model; the base model is gone afterwards, to make room."""
    emit({"stage": "build"})
    case = build(suite, name)
    model = case.model
    facts["dtype"] = str(case.dtype).removeprefix("torch.")
    facts["rounds_inside"] = case.rounds_inside
    facts["bound"] = case.bound
    facts["kind"] = case.kind
    facts["params"] = sum(p.numel() for p in model.parameters())
    emit(facts | {"stage": "map"})
    channels, map_seconds = timed(lambda: swan.channel_map(model, case.example))
    facts["seconds"] = {"map": map_seconds}
    facts |= share_facts(case, channels)
    emit(facts | {"stage": "swanify"})
    try:
        gated, facts["seconds"]["swanify"] = timed(lambda: swan.swanify(model, case.example))
    except swan.NoGateableChannelsError as err:
        emit(facts | {"verdict": "nothing gated", "detail": first_line(err)})
        return None, case, type(model)
    facts |= share_facts(case, gated.channels)
    is_open = torch.ones(gated.channels.num_units, dtype=torch.bool)
    facts["open_error"] = relative_error(
        gated, model, is_open, as_inputs(case.example), widen=case.rounds_inside
    )
    generator = torch.Generator().manual_seed(0)
    facts["dense_trains"] = runs_in_train_mode(model, case.fresh_inputs(generator))
    return gated, case.without_model(), type(model)


def share_facts(case: Case, channels: swan.ChannelMap) -> Facts:
    """Output channels of all layers: gated, pinned for a reason, outputs, unused or forgotten.

    A layer is a convolution, a linear module, or a bare parameter used like one.
    """
    widths = {layer.name: len(layer.out_units) for layer in channels.layers}
    gated = sum(u != PINNED for layer in channels.layers for u in layer.out_units)
    missing = {
        name: module.weight.shape[1 if getattr(module, "transposed", False) else 0]
        for name, module in case.model.named_modules()
        if isinstance(module, WEIGHTED) and name not in widths
    }
    run = called_modules(case) if missing else set()
    unused = sum(width for name, width in missing.items() if name not in run)
    reasons: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    for pin in channels.pins:
        if pin.op == "output":
            outputs[pin.layer] += len(pin.channels)
        else:
            reasons[f"{pin.reason} ({pin.op})"] += len(pin.channels)
    total = sum(widths.values()) + sum(missing.values()) - unused
    return {
        "layers": len(widths) + len(missing),
        "channels": total,
        "output_channels": outputs.total(),
        "output_layers": [n for n, count in outputs.items() if count == widths.get(n)],
        "units": channels.num_units,
        "gated_channels": gated,
        "pinned_channels": dict(reasons.most_common()),
        "unused_channels": unused,
        "forgotten_channels": total - gated - outputs.total() - reasons.total(),
        "unknown_ops": [list(entry) for entry in channels.unknown_ops],
        "notes": list(channels.notes),
    }


def called_modules(case: Case) -> set[str]:
    """Names of the modules that a forward pass in eval mode calls."""
    seen: set[str] = set()

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: seen.add(name)

    handles = [m.register_forward_pre_hook(noting(n)) for n, m in case.model.named_modules()]
    try:
        with torch.no_grad():
            call(case.model, copied(case.example))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def close_units_(gated: swan.GatedModel, share: float, generator: torch.Generator) -> None:
    logits = gated.gates.logits
    closed = torch.rand(logits.shape, generator=generator) < share
    logits.data = torch.where(closed, -3.0, 3.0).to(logits.dtype)


def predicted_params(model: nn.Module, channels: swan.ChannelMap, mask: Tensor) -> int:
    """Parameters of the pruned model by the channel map."""
    stays = [*mask.tolist(), True]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for entry in channels.tensors:
        if entry.tensor in shapes:
            shapes[entry.tensor][entry.axis] = sum(stays[unit] for unit in entry.units)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def cut_facts(gated: swan.GatedModel, share: float, case: Case, given: type[nn.Module]) -> Facts:
    """Close units at random, cut, and compare outputs, MACs, parameters and greedy tokens."""
    generator = torch.Generator().manual_seed(round(100 * share))
    close_units_(gated, share, generator)
    mask = gated.gates.open_mask()
    refused = None
    try:
        pruned, seconds = timed(lambda: swan.prune(gated))
    except swan.VerificationError as err:
        refused = first_line(err)
        pruned, seconds = timed(lambda: swan.prune(gated, verify=False))
    fresh = case.fresh_inputs(generator)
    error = max(
        relative_error(gated, pruned, mask, as_inputs(inputs), widen=case.rounds_inside)
        for inputs in (case.example, fresh)
    )
    return {
        "share": share,
        "closed_units": int((~mask).sum()),
        "error": error,
        "refused": refused,
        "same_class": type(pruned) is given,
        "seconds": seconds,
        "hard_macs": _or_error(lambda: swan.hard_macs(gated)),
        "counted_macs": _or_error(lambda: swan.count_macs(pruned, case.example)),
        "torch_counter_macs": _or_error(lambda: torch_counter_macs(pruned, case.example)),
        "predicted_params": predicted_params(gated.model, gated.channels, mask),
        "counted_params": sum(p.numel() for p in pruned.parameters()),
        "generates": _or_error(lambda: generates(pruned, case)),
        "trains": runs_in_train_mode(pruned, fresh),
    }


def verdict(facts: Facts) -> Facts:
    """Does closed equal cut, in an object of the given class that still generates?"""
    for cut in facts["cuts"]:
        if not cut["error"] <= facts["bound"]:
            return {"verdict": "wrong", "detail": f"relative error {cut['error']:.0e}"}
        if cut["refused"]:
            return {"verdict": "raises", "detail": cut["refused"]}
        if not cut["same_class"]:
            return {"verdict": "wrong", "detail": "another class"}
        if cut["generates"] not in ("yes", None):
            return {"verdict": "wrong", "detail": f"generate: {cut['generates']}"}
    return {"verdict": "exact" if facts["gated_channels"] else "nothing gated"}


def _or_error(function: Callable[[], Any]) -> Any:
    """The result, or the first line of the error: one fact must not cost the others."""
    try:
        return function()
    except Exception as err:  # noqa: BLE001 - whatever is raised is the fact
        return first_line(err)


def torch_counter_macs(model: nn.Module, example: Any) -> float:
    """By torch's own counter, which knows no fused attention on the CPU."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            call(model.eval(), copied(example))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() / 2


def runs_in_train_mode(model: nn.Module, batch: Any) -> str:
    """`yes`, or the error: auxiliary heads run in train mode only."""
    try:
        with torch.no_grad():
            call(model.train(), copied(batch))
    except Exception as err:  # noqa: BLE001 - whatever a model raises is the fact
        return first_line(err)
    finally:
        model.eval()
    return "yes"


@torch.no_grad()
def generates(model: Any, case: Case) -> str | None:
    """`yes` if `generate` continues as the greedy choice of plain forward passes does.

    None for a model that cannot generate.
    """
    if case.prompt is None:
        return None
    prompt = case.example[case.prompt]
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    inputs = {case.prompt: prompt}
    greedy = prompt
    if model.config.is_encoder_decoder:
        greedy = torch.full((1, 1), model.config.decoder_start_token_id)
        if tokens[0, 0] != greedy[0, 0]:  # Whisper returns the new tokens alone
            tokens = torch.cat([greedy, tokens], 1)
    steps = tokens.shape[1] - greedy.shape[1]
    for _ in range(steps):
        named = "decoder_input_ids" if model.config.is_encoder_decoder else case.prompt
        logits = model(**(inputs | {named: greedy})).logits
        greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], 1)
    if not 1 <= steps <= 4:
        return f"{steps} new tokens"
    return "yes" if bool((greedy == tokens).all()) else f"{tokens.tolist()}, not {greedy.tolist()}"
