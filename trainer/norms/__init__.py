"""Replacement of all normalisation layers of a model."""

from trainer.norms.replace import replace_norms
from trainer.norms.trace import Trace, trace_forward

__all__ = ["Trace", "replace_norms", "trace_forward"]
