"""From a model and data to a smaller model in one call."""

from swan_surgery.compressing.compress import Compressed, compress


__all__ = ["Compressed", "compress"]
