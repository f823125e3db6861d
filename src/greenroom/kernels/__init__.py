"""y = MLP(x) over packed records, where they lie.

`reference` is plain torch and the definition of the arithmetic; `native` is compiled, and tested against it; `dispatch`
chooses. Knows the layout of a record, nothing of residency: it is handed records that are in memory.
"""

from greenroom.kernels.dispatch import describe, experts, linear
from greenroom.kernels.reference import Activation, ExpertsKernel, ExpertTask

__all__ = ["Activation", "ExpertTask", "ExpertsKernel", "describe", "experts", "linear"]
