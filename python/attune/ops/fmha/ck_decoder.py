"""The documentation's decoding operator for AMD GPUs."""

from __future__ import annotations

from typing import List

from attune.ops.fmha.common import AttentionFwOpBase, Inputs


class FwOp(AttentionFwOpBase):
    """Runs nothing here."""

    NAME = "ck_decoderF"

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        return super().limits(d) + ["it is for AMD GPUs, which this version has no kernels for"]
