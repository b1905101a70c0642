"""The documentation's operator for few queries over many keys."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import MMA, SIMT, AttentionFwOpBase, Inputs

MAX_QUERIES = 16


class FwOp(AttentionFwOpBase):
    """At most 16 queries a sequence. Keys are not split over thread blocks in this version."""

    NAME = "triton_splitKF"
    FAMILIES = (MMA, SIMT)

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        reasons = super().limits(d)
        queries = d.max_queries()
        if queries is not None and queries > MAX_QUERIES:
            reasons.append(f"{queries} queries of one sequence, and it is for at most {MAX_QUERIES}")
        return reasons
