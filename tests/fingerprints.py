"""What a model and the process look like: two equal fingerprints mean that nothing was touched."""

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Weights bit for bit, modes, requires_grad, hooks, class and attributes; RNG and grad mode."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        "tensors": tensors,
        "identity": [id(parameter) for parameter in model.parameters()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_same_fingerprint(before: dict[str, object], after: dict[str, object]) -> None:
    """Compare two fingerprints entry by entry."""
    assert before.keys() == after.keys()
    first, second = before["tensors"], after["tensors"]
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(second[name])), name
    for key in before.keys() - {"tensors"}:
        one, two = before[key], after[key]
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), key
        else:
            assert one == two, key
