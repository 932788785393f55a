"""`swan-surgery train`: settings, data, the run from dense to fine-tuned, and what it leaves."""

from swan_surgery.experiments.classifier.batches import ShuffledBatches
from swan_surgery.experiments.classifier.config import read_settings, text_of, write_settings
from swan_surgery.experiments.classifier.data import Data, input_channels, load_data
from swan_surgery.experiments.classifier.experiment import run_experiment
from swan_surgery.experiments.classifier.outcome import Narrator, Outcome, Silent
from swan_surgery.experiments.classifier.outputs import write_outputs
from swan_surgery.experiments.classifier.settings import TrainSettings


__all__ = [
    "Data",
    "Narrator",
    "Outcome",
    "ShuffledBatches",
    "Silent",
    "TrainSettings",
    "input_channels",
    "load_data",
    "read_settings",
    "run_experiment",
    "text_of",
    "write_outputs",
    "write_settings",
]
