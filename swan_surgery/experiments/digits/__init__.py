"""The main job on real data: a digits network, dense, gated, trained, cut and reported."""

from swan_surgery.experiments.digits.experiment import METHODS, Narrator, SeedResult, run_seed
from swan_surgery.experiments.digits.network import DigitsNet
from swan_surgery.experiments.digits.settings import DemoSettings
from swan_surgery.experiments.digits.study import Study, run_study


__all__ = [
    "METHODS",
    "DemoSettings",
    "DigitsNet",
    "Narrator",
    "SeedResult",
    "Study",
    "run_seed",
    "run_study",
]
