"""One attention call: the arguments of the public functions, checked and turned into the C ABI's structs."""

from __future__ import annotations

import ctypes
from typing import Any, Optional, Tuple

from attune import _library, _tensor
from attune.ops.fmha.attn_bias import AttentionBias


class Call:
    """Inputs, bias and options; keeps everything alive that the C structs point to."""

    def __init__(self, query: Any, key: Any, value: Any, attn_bias: Any, scale: Optional[float]):
        self.query = _tensor.view_of("query", query)
        self.key = _tensor.view_of("key", key)
        self.value = _tensor.view_of("value", value)
        self._bias = _c_bias(attn_bias)
        self._scale = None if scale is None else ctypes.c_double(scale)
        self._options = _library.Options(stream=self.query.stream)
        if self._scale is not None:
            self._options.scale = ctypes.pointer(self._scale)

    @property
    def inputs(self) -> Tuple[_library.Tensor, ...]:
        return self.query.c, self.key.c, self.value.c

    @property
    def settings(self) -> Tuple[Any, Any]:
        return ctypes.byref(self._bias), ctypes.byref(self._options)

    def forward(self, with_lse: bool) -> Tuple[Any, Any]:
        """Output [B, Mq, H, Kv] or [B, Mq, Kv] and, if asked for, LSE [B, H, Mq]."""
        shape = self.query.shape
        if len(shape) == 5:
            raise NotImplementedError(
                "5-D [B, M, G, H, K] tensors are not supported in this version; reshape to "
                "[B, M, G * H, K]"
            )
        if len(shape) not in (3, 4):
            raise ValueError(f"query: rank {len(shape)}, expected [B, M, H, K] or [B, M, K]")
        output = self.query.empty_like("output", shape[:-1] + self.value.shape[-1:])
        lse = None
        if with_lse:
            heads = shape[2] if len(shape) == 4 else 1
            lse = self.query.empty_like("lse", (shape[0], heads, shape[1]), "float32")
        _library.check(
            _library.library().attune_memory_efficient_attention_forward(
                *self.inputs, output.c, None if lse is None else lse.c, *self.settings
            )
        )
        return output.value, None if lse is None else lse.value


def _c_bias(attn_bias: Any) -> _library.Bias:
    if attn_bias is None:
        return _library.Bias(kind=_library.BIAS_NONE)
    if isinstance(attn_bias, AttentionBias):
        return attn_bias._c_bias()
    if hasattr(attn_bias, "shape"):
        raise NotImplementedError(
            "attn_bias: tensor biases are not supported in this version; supported are None and "
            "the masks of attune.ops.fmha.attn_bias"
        )
    raise TypeError(
        f"attn_bias: expected None or a mask of attune.ops.fmha.attn_bias, got {type(attn_bias).__name__}"
    )
