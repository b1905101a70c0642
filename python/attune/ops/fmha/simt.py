"""Attune's family for any GPU."""

from attune.ops.fmha.common import SIMT, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """Ordinary float units: every dtype, compute capability 6.0 and up."""

    NAME = "simt"
    FAMILIES = (SIMT,)
