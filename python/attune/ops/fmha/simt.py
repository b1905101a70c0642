"""Attune's family for any GPU."""

from attune.ops.fmha.common import SIMT, AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """Ordinary float units: every dtype, compute capability 6.0 and up."""

    NAME = "simt"
    FAMILIES = (SIMT,)


class BwOp(AttentionBwOpBase):
    """Ordinary float units: every dtype, compute capability 6.0 and up."""

    NAME = "simt"
    FAMILIES = (SIMT,)
