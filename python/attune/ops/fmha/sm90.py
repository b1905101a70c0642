"""Attune's family for Hopper."""

from attune.ops.fmha.common import SM90, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """wgmma and the tensor copy engine: float16 and bfloat16 on compute capability 9.0. Forward only."""

    NAME = "sm90"
    FAMILIES = (SM90,)
