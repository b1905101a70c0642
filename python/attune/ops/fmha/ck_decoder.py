"""The documentation's decoding operator for AMD GPUs."""

from attune.ops.fmha.ck import ForAmd
from attune.ops.fmha.common import AttentionFwOpBase


class FwOp(ForAmd, AttentionFwOpBase):
    """Runs nothing here. Forward only."""

    NAME = "ck_decoderF"
