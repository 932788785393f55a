"""What an experiment is: one flat record whose fields say what they trade."""

from dataclasses import dataclass, field, fields
from typing import Any

from swan_surgery.errors import InputError
from swan_surgery.learning.stages import ONE_CUT


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of `swan-surgery train`; `help_of` says what each one means.

    Raises:
        InputError: values that cannot be run, all of them in one message.
    """

    model: str = _setting(
        "torchvision:resnet18",
        "torchvision:NAME, timm:NAME, or package.module:factory of your own",
    )
    classes: int = _setting(
        0, "outputs of a torchvision or timm model; 0: as many as the data has classes"
    )
    weights: str = _setting("", "file to start from: of swan.save, or safetensors of a state dict")
    data: str = _setting(
        "sklearn:digits",
        "folder with train/<class>/* and test/ or val/, root of a torchvision dataset (MNIST, "
        "FashionMNIST, CIFAR10, CIFAR100), sklearn:digits, or package.module:function that returns "
        "two datasets, to train and to test",
    )
    size: int = _setting(0, "side in pixels that images are resized to; 0: as they are")
    mean: tuple[float, ...] = _setting((0.5,), "of the images in [0, 1], per channel or for all")
    std: tuple[float, ...] = _setting((0.5,), "of the images in [0, 1], per channel or for all")
    crop: bool = _setting(
        False,  # noqa: FBT003
        "training images are random parts, scaled to size, and test images the middle, as usual for ImageNet; "
        "false: whole images",
    )
    shift: int = _setting(0, "random moves in pixels while training")
    flip: bool = _setting(False, "random mirror images while training")  # noqa: FBT003
    held_out: float = _setting(
        0.2, "share of the images to test on, where the data has no test part"
    )
    validation: float = _setting(
        0.0,
        "share of the training images that epochs are scored on in place of the test images, to choose settings "
        "by; 0: none",
    )
    workers: int = _setting(0, "processes that decode images; 0: none besides this one")
    dense_epochs: int = _setting(10, "before the gates; 0 for a model that is trained already")
    gate_epochs: int = _setting(10, "weights and gates together, while the budget falls")
    finetune_epochs: int = _setting(10, "of the cut model")
    baseline: bool = _setting(
        False,  # noqa: FBT003
        "train the dense model as long as the cut one, too (gate_epochs and finetune_epochs), to compare with",
    )
    macs: float = _setting(0.5, "share of the multiply-adds to keep; 0: no such budget")
    params: float = _setting(0.0, "share of the parameters to keep; 0: no such budget")
    min_width: int | float | dict[str, Any] = field(
        default=1,
        metadata={"help": "units that every layer keeps: a number, a share, or a table by layer"},
    )
    ignore: tuple[str, ...] = _setting((), "modules that stay whole, as names or patterns")
    round_to: int = _setting(1, "widths become multiples of this; 8 or 16 suit most hardware")
    choice: str = _setting(
        "auto",
        "how units are chosen: gates (they learn in gate_epochs), scores (Fisher, weights behind the cut "
        "solved for anew, in stages below a fifth; gate_epochs are trained after the cut), both (half of "
        "the way by scores, then gates), or auto: scores where less than a fifth stays, else both",
    )
    compensation: int = _setting(
        16, "batches that weights behind a cut by scores are solved for with"
    )
    learning: str = _setting("curvature", "how gates learn: curvature or gradient")
    ramp: float = _setting(0.6, "share of gate_epochs in which the budget falls: longer is gentler")
    freeze: float = _setting(0.1, "last share of gate_epochs, in which gates stay as they are")
    batch: int = _setting(64, "images per step, over all processes")
    optimizer: str = _setting("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = _setting(1e-3, "peak learning rate; every stage has a cosine of its own")
    gate_lr: float = _setting(1e-2, "of the gates, where they learn by gradient")
    finetune_lr: float = _setting(0.0, "peak of the fine-tuning; 0: lr")
    warmup: float = _setting(0.0, "epochs of rising learning rate at the start of each stage")
    weight_decay: float = _setting(0.01, "of the weights; gates have none")
    label_smoothing: float = _setting(0.0, "share of a label that goes to the other classes")
    distillation: float = _setting(0.0, "share of the loss that follows the dense model's outputs")
    temperature: float = _setting(4.0, "of distillation: higher shows more of the wrong classes")
    calibration: int = _setting(50, "batches for batch-norm statistics before the cut")
    precision: str = _setting("fp32", "fp32, or bf16 for forward and backward passes")
    device: str = _setting(
        "auto", "auto, cpu, cuda, cuda:1, ...; of several processes each takes one GPU"
    )
    save_every: int = _setting(
        0,
        "steps between checkpoints inside an epoch, where epochs are long; 0: after each epoch alone",
    )
    threads: int = _setting(0, "of torch on the CPU; 0: its own choice")
    seed: int = _setting(0, "of weights, order and augmentation; report more than one")

    @property
    def budgets(self) -> dict[str, Any]:
        """Shares to keep, None where there is no such budget."""
        return {"macs": self.macs or None, "params": self.params or None}

    @property
    def chosen_by(self) -> str:
        """`choice`, decided."""
        if self.choice != "auto":
            return self.choice
        share = min(own for own in (self.macs, self.params) if own)
        return "scores" if share < ONE_CUT else "both"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        shares = (
            "macs",
            "params",
            "held_out",
            "validation",
            "ramp",
            "freeze",
            "distillation",
            "label_smoothing",
        )
        faults = [
            f"{name} is a share in [0, 1]; got {getattr(self, name)}"
            for name in shares
            if not 0 <= getattr(self, name) <= 1
        ]
        counts = dict.fromkeys(_COUNTS, 0) | dict.fromkeys(_AT_LEAST_ONE, 1)
        faults += [
            f"{name} must be at least {least}; got {getattr(self, name)}"
            for name, least in counts.items()
            if getattr(self, name) < least
        ]
        faults += [
            f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
        ]
        if not (self.macs or self.params):
            faults.append("say how small the model shall get: macs or params")
        if self.crop and not self.size:
            faults.append("crop needs size")
        if not (0 < self.lr < float("inf") and self.temperature > 0):
            faults.append("lr and temperature must be above 0")
        if faults:
            raise InputError("; ".join(faults))


_COUNTS = (
    *("classes", "size", "shift", "workers", "dense_epochs", "finetune_epochs", "calibration"),
    *("threads", "save_every", "warmup", "weight_decay", "finetune_lr", "gate_lr"),
)
_AT_LEAST_ONE = ("gate_epochs", "batch", "round_to", "compensation")
_CHOICES = {
    "choice": ("auto", "gates", "scores", "both"),
    "learning": ("curvature", "gradient"),
    "optimizer": ("adamw", "sgd"),
    "precision": ("fp32", "bf16"),
}


def help_of(name: str) -> str:
    """What a setting means."""
    text: str = {own.name: own for own in fields(TrainSettings)}[name].metadata["help"]
    return text
