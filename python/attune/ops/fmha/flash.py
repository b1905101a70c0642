"""The documentation's operators for tensor cores."""

from attune.ops.fmha.common import MMA, SM90, AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """float16 and bfloat16, compute capability 8.0 and up."""

    NAME = "flshattF"
    FAMILIES = (SM90, MMA)


class BwOp(AttentionBwOpBase):
    """float16 and bfloat16, compute capability 8.0 and up."""

    NAME = "flshattB"
    FAMILIES = (SM90, MMA)
