"""Attune's family for the CPU."""

from attune.ops.fmha.common import CPU, AttentionBwOpBase, AttentionFwOpBase


class FwOp(AttentionFwOpBase):
    """x86-64 with AVX2 or AVX-512."""

    NAME = "cpu"
    FAMILIES = (CPU,)
    SUPPORTED_DEVICES = {"cpu"}


class BwOp(AttentionBwOpBase):
    """x86-64 with AVX2 or AVX-512."""

    NAME = "cpu"
    FAMILIES = (CPU,)
    SUPPORTED_DEVICES = {"cpu"}
