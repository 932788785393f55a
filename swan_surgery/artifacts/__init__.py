"""Saving and loading: one safetensors file with a JSON header, checked as a whole, never executed."""

from swan_surgery.artifacts.folders import save_pretrained
from swan_surgery.artifacts.loading import load
from swan_surgery.artifacts.saving import save


__all__ = ["load", "save", "save_pretrained"]
