"""One attention call: the arguments of the public functions, turned into the C ABI's structs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import gcd
from typing import Any, List, NamedTuple, Optional, Tuple

from attune import _library, _random, _tensor
from attune._numbers import real
from attune.ops.fmha.attn_bias import AttentionBias


class Wanted(NamedTuple):
    """Which gradients to compute."""

    query: bool = True
    key: bool = True
    value: bool = True
    bias: bool = False


@dataclass
class Backward:
    """What a backward pass is given besides the inputs of its forward pass."""

    grad: Any  # of the output; any strides
    output: Any
    lse: Any
    grad_lse: Any = None  # of any strides; None: 0
    wanted: Wanted = Wanted()
    deterministic: bool = False  # torch.use_deterministic_algorithms asks for it, too
    generator: Any = None  # in the state in which forward's was


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
        self.output_dtype = self.query.dtype
        self._bias = _CBias(attn_bias, self.query, self.key)
        self._options = _library.Options(
            stream=self.query.stream, p=real("p", p), families=sum([1 << family for family in families])
        )
        if output_dtype is not None:
            self.output_dtype = _tensor.output_dtype_name(output_dtype)
            self._options.output_dtype = ctypes.pointer(ctypes.c_int32(_tensor.dtype_code(self.output_dtype)))
        if scale is not None:
            self._options.scale = ctypes.pointer(ctypes.c_double(real("scale", scale)))

    @property
    def drops(self) -> bool:
        return self._options.p > 0

    def forward(self, with_lse: bool, generator: Any = None) -> Tuple[Any, Any]:
        """Output [B, Mq, (G,) H, Kv] and, if asked for, LSE [B, (G,) H, Mq]; both without heads [B, M, K] and with one."""
        if self.drops:
            self._options.seed, self._options.offset = _random.state_of(generator, self.query.value)
        output, lse = self._results(with_lse)
        workspace = self._use_workspace_of_torch(with_lse)
        _library.check(
            _library.library().attune_memory_efficient_attention_forward(
                *self._inputs, output.c, None if lse is None else lse.c, *self._settings
            )
        )
        self._options.workspace, self._options.workspace_bytes = None, 0
        del workspace  # it had to live until here
        return output.value, None if lse is None else lse.value

    def _use_workspace_of_torch(self, with_lse: bool) -> Any:
        """On a GPU torch's allocator counts its memory and knows graphs. Elsewhere none is needed."""
        if self.query.stream is None:
            return None
        size = ctypes.c_size_t()
        _library.check(
            _library.library().attune_forward_workspace_bytes(*self._inputs, with_lse, *self._settings, size)
        )
        if size.value == 0:
            return None
        workspace = self.query.empty((size.value,), "uint8")
        self._options.workspace, self._options.workspace_bytes = workspace.data_ptr(), size.value
        return workspace

    def described(self, output: Any, lse: Any) -> ctypes.c_void_p:
        """The library's attune_forward_call of a call that gave these results."""
        c_output = _tensor.view_of("output", output).c
        c_lse = None if lse is None else _tensor.view_of("lse", lse).c
        handle = ctypes.c_void_p()
        _library.check(
            _library.library().attune_forward_call_create(
                *self._inputs, c_output, c_lse, *self._settings, handle
            )
        )
        return handle

    def backward(self, b: Backward) -> List[Any]:
        """Gradients of query, key, value and the bias tensor, each in its own framework; None where not wanted."""
        return self.backward_pass(b).run()

    def backward_pass(self, b: Backward) -> BackwardPass:
        """The backward pass of a call that was made with the same arguments."""
        if 0 < self._options.p <= 1:
            if b.generator is None:
                raise ValueError(
                    f"p={self._options.p}: what forward dropped is a function of its generator's state; pass a "
                    "generator in that state, such as attune.Generator(seed, offset)"
                )
            self._options.seed, self._options.offset = _random.state_of(b.generator, self.query.value)
        return BackwardPass(self, b)

    def prepare(self, with_lse: bool) -> None:
        _library.check(_library.library().attune_prepare(*self._inputs, with_lse, *self._settings))

    def explain(self, with_lse: bool) -> Any:
        text = ctypes.c_void_p()
        _library.check(_library.library().attune_explain(*self._inputs, with_lse, *self._settings, text))
        return _library.json_of(text)

    def prepare_backward(self, wanted: Wanted, deterministic: bool) -> None:
        arguments = self._typical_backward(wanted, deterministic)
        _library.check(_library.library().attune_prepare_backward(*arguments.c))

    def explain_backward(self, wanted: Wanted, deterministic: bool) -> Any:
        arguments, text = self._typical_backward(wanted, deterministic), ctypes.c_void_p()
        _library.check(_library.library().attune_explain_backward(*arguments.c, text))
        return _library.json_of(text)

    def reasons_against(self, family: int) -> List[str]:
        """Why a kernel family cannot run the call; empty when it can."""
        return self._reasons(_library.library().attune_not_supported_reasons, family)

    def reasons_against_backward(self, family: int) -> List[str]:
        """Why a kernel family cannot compute the gradients of query, key and value."""
        return self._reasons(_library.library().attune_backward_not_supported_reasons, family)

    def _reasons(self, ask: Any, family: int) -> List[str]:
        text = ctypes.c_void_p()
        _library.check(ask(family, *self._inputs, *self._settings, text))
        return _library.json_of(text)

    def _results(self, with_lse: bool) -> Tuple[_tensor.View, Optional[_tensor.View]]:
        """Where the output and the LSE go."""
        shape = self.query.shape
        output = self.query.empty_like("output", shape[:-1] + self.value.shape[-1:], self.output_dtype)
        if not with_lse:
            return output, None
        return output, self.query.empty_like("lse", _tensor.lse_shape(shape), "float32")

    def _typical_backward(self, wanted: Wanted, deterministic: bool) -> BackwardPass:
        """With results as forward makes them, and a contiguous gradient. Nothing looks into them."""
        output, lse = self._results(with_lse=True)
        b = Backward(output.value, output.value, lse.value, wanted=wanted, deterministic=deterministic)
        return BackwardPass(self, b)

    @property
    def _inputs(self) -> Tuple[_library.Tensor, ...]:
        return self.query.c, self.key.c, self.value.c

    @property
    def _settings(self) -> Tuple[Any, Any]:
        return ctypes.byref(self._bias.c), ctypes.byref(self._options)


class BackwardPass:
    """What the C ABI's functions about gradients are called with."""

    def __init__(self, call: Call, b: Backward):
        bias = call._bias.tensor
        if b.wanted.bias and (bias is None or bias.dtype == "bool"):
            raise ValueError(
                "bias_gradient: attn_bias has no tensor of numbers, so there is no gradient of one"
            )
        self._call = call
        self._given = [
            _tensor.view_of("grad", b.grad),
            _tensor.view_of("output", b.output),
            _tensor.view_of("lse", b.lse, _tensor.LSES),
        ]
        self.gradients = [
            view.empty_like(f"gradient of {name}", view.shape) if wanted else None
            for wanted, name, view in zip(b.wanted, Wanted._fields, (call.query, call.key, call.value, bias))
        ]
        self._gradients = _library.Gradients()
        for name, view in zip(Wanted._fields, self.gradients):
            if view is not None:
                setattr(self._gradients, name, ctypes.pointer(view.c))
        deterministic = b.deterministic or _tensor.torch_wants_determinism(call.query.value)
        self._options = _library.BackwardOptions(deterministic=deterministic)
        if b.grad_lse is not None:
            self._given.append(_tensor.view_of("grad_lse", b.grad_lse, _tensor.LSES))
            self._options.grad_lse = ctypes.pointer(self._given[-1].c)

    @property
    def c(self) -> Tuple[Any, ...]:
        given = (view.c for view in self._given[:3])
        return (*given, *self._call._inputs, self._gradients, *self._call._settings, self._options)

    def run(self) -> List[Any]:
        """The gradients, None where not wanted."""
        workspace = self._use_workspace_of_torch()
        _library.check(_library.library().attune_memory_efficient_attention_backward(*self.c))
        del workspace  # it had to live until here
        return [None if gradient is None else gradient.value for gradient in self.gradients]

    def described(self) -> ctypes.c_void_p:
        """The library's attune_backward_call of this one."""
        handle = ctypes.c_void_p()
        _library.check(_library.library().attune_backward_call_create(*self.c, handle))
        return handle

    def _use_workspace_of_torch(self) -> Any:
        """On a GPU torch's allocator counts its memory and knows graphs. Elsewhere the library allocates."""
        query = self._call.query
        if query.stream is None:
            return None
        size = ctypes.c_size_t()
        _library.check(_library.library().attune_backward_workspace_bytes(*self.c, size))
        workspace = query.empty((size.value,), "uint8")
        self._options.workspace, self._options.workspace_bytes = workspace.data_ptr(), size.value
        return workspace


class _CBias:
    """attune_bias of a call."""

    tensor: Optional[_tensor.View] = None  # the dense part

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
        self.tensor = _tensor.view_of("attn_bias", tensor, _tensor.BIASES)
        self.c.tensor = ctypes.pointer(self.tensor.c)

    def _set_blocks(self, blocks: Any, device: Tuple[int, int]) -> None:
        self.c.sequences, self.c.page_size = blocks.count, blocks.page_size
        self.c.page_run = gcd(blocks.page_size, blocks.k_starts.common_divisor)
        for name in ("q_starts", "k_starts", "k_lens", "block_tables"):
            table = getattr(blocks, name)
            if table is not None:
                setattr(self.c, name, ctypes.pointer(table.c_on(device)))
