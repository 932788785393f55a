"""The demo's knobs, with what each trades."""

from dataclasses import dataclass

from swan_surgery.errors import InputError


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings of the demo; chosen by validation accuracy, never by test accuracy.

    Attributes:
        dense_epochs: training of the dense network that every method starts from.
        joint_epochs: weights and gates together.
        finetune_epochs: the pruned network alone. Every other method gets `joint_epochs +
            finetune_epochs` from the same dense network, with the same learning rates.
        macs: share of the dense network's MACs to keep.
        width: channels of the first stage; the second has twice as many.
        lr: peak learning rate of the weights; falls along a cosine.
        gate_lr: of the gate logits, along the same cosine; too low and the initial ranking decides.
        weight_decay: of the weights; the gates have none.
        ramp: share of `joint_epochs` over which the budget falls from everything to `macs`.
        batch: images per step.
        num_train: training images to use.
    """

    dense_epochs: int = 20
    joint_epochs: int = 20
    finetune_epochs: int = 10
    macs: float = 0.25
    width: int = 32
    lr: float = 3e-3
    gate_lr: float = 1e-2
    weight_decay: float = 1e-2
    ramp: float = 0.6
    batch: int = 50
    num_train: int = 1000

    @classmethod
    def of_length(cls, epochs: int, *, macs: float = 0.25) -> "DemoSettings":
        """Settings with `epochs` in all: two fifths dense, two fifths joint, the rest fine-tuning.

        Raises:
            InputError: fewer than 3 epochs, so that a stage would get none.
        """
        if epochs < 3:
            raise InputError(f"the demo has 3 stages and needs at least 3 epochs; got {epochs}")
        long = max(1, 2 * epochs // 5)
        return cls(
            dense_epochs=long, joint_epochs=long, finetune_epochs=epochs - 2 * long, macs=macs
        )

    @property
    def later_epochs(self) -> int:
        """What every method gets after the dense start."""
        return self.joint_epochs + self.finetune_epochs
