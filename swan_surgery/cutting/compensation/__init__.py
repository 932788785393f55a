"""What the layers behind a cut can still read out of what stayed, in closed form."""

from swan_surgery.cutting.compensation.compensating import Compensation, compensate
from swan_surgery.cutting.compensation.outcome import LayerCompensation


__all__ = ["Compensation", "LayerCompensation", "compensate"]
