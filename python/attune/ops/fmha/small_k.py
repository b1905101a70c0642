"""The documentation's operators for small head dims in float32. Deprecated there."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import SIMT, AttentionBwOpBase, AttentionFwOpBase, AttentionOpBase, Inputs


class _SmallK(AttentionOpBase):
    FAMILIES = (SIMT,)

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        reasons = super().limits(d)
        if not str(d.query.dtype).endswith("float32"):
            reasons.append(f"dtype={d.query.dtype} (supported: {{'float32'}})")
        widest = max(d.query.shape[-1], d.value.shape[-1])
        if widest > 32:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > 32: it is {widest}")
        return reasons


class FwOp(_SmallK, AttentionFwOpBase):
    """float32, head dims up to 32."""

    NAME = "smallkF"


class BwOp(_SmallK, AttentionBwOpBase):
    """float32, head dims up to 32."""

    NAME = "smallkB"
