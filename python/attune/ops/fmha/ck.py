"""The documentation's operators for AMD GPUs."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase, AttentionOpBase, Inputs


class ForAmd(AttentionOpBase):
    """Runs nothing here."""

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        return super().limits(d) + ["it is for AMD GPUs, which this version has no kernels for"]


class FwOp(ForAmd, AttentionFwOpBase):
    """Runs nothing here."""

    NAME = "ckF"


class BwOp(ForAmd, AttentionBwOpBase):
    """Runs nothing here."""

    NAME = "ckB"
