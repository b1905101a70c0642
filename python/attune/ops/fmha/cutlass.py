"""The documentation's general operators: every dtype and head dim."""

from attune.ops.fmha.common import MMA, SIMT, SM90, AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """Tensor cores where the inputs and the GPU have them, else ordinary units."""

    NAME = "cutlassF"
    FAMILIES = (SM90, MMA, SIMT)


class BwOp(AttentionBwOpBase):
    """Tensor cores where the inputs and the GPU have them, else ordinary units."""

    NAME = "cutlassB"
    FAMILIES = (SM90, MMA, SIMT)
