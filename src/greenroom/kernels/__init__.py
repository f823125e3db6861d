"""y = MLP(x) over packed records, where they lie.

`reference` is plain torch and the definition of the arithmetic; faster kernels are tested against it. Knows the
layout of a record, nothing of residency: it is handed records that are in memory.
"""

from greenroom.kernels.reference import Activation, ExpertsKernel, ExpertTask, experts, linear

__all__ = ["Activation", "ExpertTask", "ExpertsKernel", "experts", "linear"]
