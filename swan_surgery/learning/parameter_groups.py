"""Two groups for an optimizer: weights, and gate logits with their own learning rate."""

from typing import Any

from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated


def parameter_groups(
    gated: GatedModel, *, lr: float, gate_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the weights, and the gate logits without weight decay.

    Args:
        gated: the gated model.
        lr: of the weights.
        gate_lr: of the logits; 10 x lr by default, because they have less distance to feel.
        weight_decay: of the weights; by default what the optimizer is given, or has by itself.

    Raises:
        ModelError: `gated` is not a gated model.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> groups = swan.parameter_groups(gated, lr=1e-3, gate_lr=1e-2, weight_decay=0.01)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_gated(gated)
    weights = [p for p in gated.model.parameters() if p.requires_grad]
    # A group's setting wins over the optimizer's: zero here would silence `AdamW(groups, weight_decay=...)`.
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {"params": weights, "lr": lr, **decay},
        {
            "params": [gated.gates.logits],
            "lr": 10 * lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
    ]
