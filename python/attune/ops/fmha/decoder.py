"""The documentation's operator for decoding: one query a sequence."""

from __future__ import annotations

from attune.ops.fmha.common import MMA, SIMT, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """One query a sequence. Forward only."""

    NAME = "decoderF"
    FAMILIES = (MMA, SIMT)
    MAX_QUERIES = 1
