"""The documentation's operator for few queries over many keys."""

from __future__ import annotations

from attune.ops.fmha.common import MMA, SIMT, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """At most 16 queries a sequence. Forward only."""

    NAME = "triton_splitKF"
    FAMILIES = (MMA, SIMT)
    MAX_QUERIES = 16
