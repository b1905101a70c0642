"""The documentation's operator for decoding: one query a sequence."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import MMA, SIMT, AttentionFwOpBase, Inputs

MAX_QUERIES = 1


class FwOp(AttentionFwOpBase):
    """One query a sequence. Keys are not split over thread blocks in this version."""

    NAME = "decoderF"
    FAMILIES = (MMA, SIMT)

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        reasons = super().limits(d)
        queries = d.max_queries()
        if queries is not None and queries > MAX_QUERIES:
            reasons.append(f"{queries} queries of one sequence, and it is for at most {MAX_QUERIES}")
        return reasons
