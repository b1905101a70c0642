"""The documentation's operator for AMD GPUs."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, Inputs


class FwOp(AttentionFwOpBase):
    """Runs nothing here."""

    NAME = "ckF"

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        return super().limits(d) + ["it is for AMD GPUs, which this version has no kernels for"]


class BwOp(AttentionBwOpBase):
    NAME = "ckB"
