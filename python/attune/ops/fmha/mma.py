"""Attune's tensor-core family."""

from attune.ops.fmha.common import MMA, AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """mma.sync: float16 and bfloat16, compute capability 8.0 and up."""

    NAME = "mma"
    FAMILIES = (MMA,)


class BwOp(AttentionBwOpBase):
    """mma.sync: float16 and bfloat16, compute capability 8.0 and up."""

    NAME = "mma"
    FAMILIES = (MMA,)
