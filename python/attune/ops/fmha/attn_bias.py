"""Masks to pass as `attn_bias`. Query i sees key j iff the class's predicate holds; s = keys - queries."""

from __future__ import annotations

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np

from attune import _library, _tensor

# Beyond any sequence; keeps larger windows within the C ABI's integers.
_UNBOUNDED = 2**40


class AttentionBias:
    """Base class of what `attn_bias` takes. A mask is never materialized by the kernels."""

    def visible(self, i: np.ndarray, j: np.ndarray, s: int) -> np.ndarray:
        """The predicate over broadcast query indices i and key indices j."""
        raise NotImplementedError(f"{type(self).__name__} has no predicate")

    def _c_bias(self) -> _library.Bias:
        raise NotImplementedError(f"attn_bias: {type(self).__name__} is not supported in this version")

    def materialize(self, shape: Tuple[int, ...], dtype: Any = np.float32, device: Any = "cpu") -> Any:
        """The mask as a dense array of 0 (visible) and -inf, for debugging.

        `shape` is [*, queries, keys]. Gives a NumPy array, or a torch tensor on `device` when `dtype` is torch's.
        """
        if len(shape) < 2:
            raise ValueError(f"shape {tuple(shape)}: expected [*, queries, keys]")
        queries, keys = shape[-2:]
        kept = self.visible(np.arange(queries)[:, None], np.arange(keys)[None, :], keys - queries)
        dense = np.broadcast_to(np.where(kept, np.float32(0), np.float32(-np.inf)), shape)
        if type(dtype).__module__ == "torch":
            import torch

            return torch.tensor(np.ascontiguousarray(dense), dtype=dtype, device=device)
        if str(device) != "cpu":
            raise ValueError(
                f"device {device}: NumPy arrays are on the CPU; pass a torch dtype for another device"
            )
        return dense.astype(dtype)


@dataclass(frozen=True)
class LowerTriangularMask(AttentionBias):
    """Causal, anchored at the first query and the first key: j <= i."""

    def visible(self, i, j, s):
        return j <= i

    def _c_bias(self):
        return _library.Bias(kind=_library.BIAS_LOWER_TRIANGULAR)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, anchored at the last query and the last key: j <= i + s."""

    def visible(self, i, j, s):
        return j <= i + s

    def _c_bias(self):
        return _library.Bias(kind=_library.BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT)

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same, and only the last `window_size` keys, the diagonal included."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal and local: i + s - window_size < j <= i + s. The window counts the diagonal itself."""

    _window_size: int

    def __post_init__(self):
        if self._window_size <= 0:
            raise ValueError(f"window_size is {self._window_size}. Expected `window_size > 0`")

    def visible(self, i, j, s):
        return (j > i + s - self._window_size) & (j <= i + s)

    def _c_bias(self):
        return _library.Bias(
            kind=_library.BIAS_LOWER_TRIANGULAR_FROM_BOTTOM_RIGHT_LOCAL,
            window_size=min(self._window_size, _UNBOUNDED),
        )


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Local: i + s - window_left <= j <= i + s + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self):
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}. Expected `{name} >= 0`")

    def visible(self, i, j, s):
        return (j >= i + s - self.window_left) & (j <= i + s + self.window_right)

    def _c_bias(self):
        return _library.Bias(
            kind=_library.BIAS_LOCAL_FROM_BOTTOM_RIGHT,
            window_left=min(self.window_left, _UNBOUNDED),
            window_right=min(self.window_right, _UNBOUNDED),
        )
