"""From a model and data to a smaller model in one call, and what each size of it would be worth."""

from swan_surgery.compressing.compress import Compressed, compress
from swan_surgery.compressing.tradeoff import TradeoffCurve, tradeoff_curve


__all__ = ["Compressed", "TradeoffCurve", "compress", "tradeoff_curve"]
