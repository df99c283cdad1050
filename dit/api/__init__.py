"""The Python API: train, sample, audit and compare in a notebook, by the code that the studies run."""

from dit.api.comparing import Comparison, compare
from dit.api.model import Model, audit_model, sample
from dit.api.running import Run, train

__all__ = ["Comparison", "Model", "Run", "audit_model", "compare", "sample", "train"]
