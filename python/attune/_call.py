"""One attention call: the arguments of the public functions, turned into the C ABI's structs."""

from __future__ import annotations

import ctypes
from typing import Any, List, Optional, Tuple

from attune import _library, _random, _tensor
from attune.ops.fmha.attn_bias import AttentionBias


class Call:
    """Inputs, bias and options; keeps everything alive that the C structs point to."""

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Optional[float] = None,
        output_dtype: Any = None,
        families: Tuple[int, ...] = (),
    ):
        self.query = _tensor.view_of("query", query)
        self.key = _tensor.view_of("key", key)
        self.value = _tensor.view_of("value", value)
        self.output_dtype = self.query.dtype if output_dtype is None else _tensor.dtype_name(output_dtype)
        self._bias = _CBias(attn_bias, self.query, self.key)
        self._options = _library.Options(
            stream=self.query.stream, p=p, families=sum(1 << family for family in families)
        )
        self._options.output_dtype = ctypes.pointer(ctypes.c_int32(_tensor.dtype_code(self.output_dtype)))
        if scale is not None:
            self._options.scale = ctypes.pointer(ctypes.c_double(scale))

    def forward(self, with_lse: bool, generator: Any = None) -> Tuple[Any, Any]:
        """Output [B, Mq, (G,) H, Kv] and, if asked for, LSE [B, (G,) H, Mq]; both without heads [B, M, K] and with one."""
        if self._options.p > 0:
            self._options.seed, self._options.offset = _random.state_of(generator, self.query.value)
        shape = self.query.shape
        output = self.query.empty_like("output", shape[:-1] + self.value.shape[-1:], self.output_dtype)
        lse = None
        if with_lse:
            heads = shape[2:-1] if len(shape) > 3 else (1,)
            lse = self.query.empty_like("lse", shape[:1] + heads + shape[1:2], "float32")
        _library.check(
            _library.library().attune_memory_efficient_attention_forward(
                *self._inputs, output.c, None if lse is None else lse.c, *self._settings
            )
        )
        return output.value, None if lse is None else lse.value

    def prepare(self, with_lse: bool) -> None:
        _library.check(_library.library().attune_prepare(*self._inputs, with_lse, *self._settings))

    def explain(self, with_lse: bool) -> Any:
        text = ctypes.c_void_p()
        _library.check(_library.library().attune_explain(*self._inputs, with_lse, *self._settings, text))
        return _library.json_of(text)

    def reasons_against(self, family: int) -> List[str]:
        """Why a kernel family cannot run the call; empty when it can."""
        text = ctypes.c_void_p()
        _library.check(
            _library.library().attune_not_supported_reasons(family, *self._inputs, *self._settings, text)
        )
        return _library.json_of(text)

    @property
    def _inputs(self) -> Tuple[_library.Tensor, ...]:
        return self.query.c, self.key.c, self.value.c

    @property
    def _settings(self) -> Tuple[Any, Any]:
        return ctypes.byref(self._bias.c), ctypes.byref(self._options)


class _CBias:
    """attune_bias of a call."""

    def __init__(self, attn_bias: Any, query: _tensor.View, key: _tensor.View):
        self.c = _library.Bias(window_left=-1, window_right=-1)
        if attn_bias is None:
            return
        if _tensor.is_tensor(attn_bias):
            self._set_tensor(attn_bias)
            return
        if not isinstance(attn_bias, AttentionBias):
            raise TypeError(
                "attn_bias: expected None, a tensor or a mask of attune.ops.fmha.attn_bias, got "
                f"{type(attn_bias).__name__}"
            )
        self.c.name = type(attn_bias).__name__.encode()
        self.c.anchor, self.c.window_left, self.c.window_right = attn_bias._window
        if attn_bias._dense is not None:
            self._set_tensor(attn_bias._dense)
        blocks = attn_bias._blocks
        if blocks is not None:
            if query.shape[:1] == (1,):  # otherwise the library has more to say
                blocks.check_rows(query.rows, key.rows)
            self._set_blocks(blocks, query.device)

    def _set_tensor(self, tensor: Any) -> None:
        self._tensor = _tensor.view_of("attn_bias", tensor, _tensor.BIASES)
        self.c.tensor = ctypes.pointer(self._tensor.c)

    def _set_blocks(self, blocks: Any, device: Tuple[int, int]) -> None:
        self.c.sequences, self.c.page_size = blocks.count, blocks.page_size
        for name in ("q_starts", "k_starts", "k_lens", "block_tables"):
            table = getattr(blocks, name)
            if table is not None:
                setattr(self.c, name, ctypes.pointer(table.c_on(device)))
