"""Merges of partial attention, and their gradients, through the C ABI."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

from attune import _library, _tensor


def is_stacked(chunks: Any) -> bool:
    """Is it one tensor with the chunks on its first axis, and no list?"""
    return not isinstance(chunks, (list, tuple))


def listed(chunks: Any) -> Sequence[Any]:
    """The tensors that hold the chunks."""
    return [chunks] if is_stacked(chunks) else chunks


class _Chunks:
    """A list of tensors, or one tensor with the chunks on its first axis."""

    def __init__(self, name: str, given: Any, dtypes: Tuple[str, ...]):
        self.given = given
        self._name, self._dtypes = name, dtypes
        if is_stacked(given):
            self._views = [_tensor.view_of(name, given, dtypes)]
            self.c: List[_library.Tensor] = self._views[0].along_first_axis()
            self.shape = self._views[0].shape[1:]
        else:
            self._views = [_tensor.view_of(f"{name}[{i}]", tensor, dtypes) for i, tensor in enumerate(given)]
            self.c = [view.c for view in self._views]
            self.shape = self._views[0].shape if given else ()
        if not self.c:
            raise ValueError(f"{name}: no chunks to merge")
        self.kind = self._views[0]  # of what results are made

    @property
    def array(self) -> Any:
        return (_library.Tensor * len(self.c))(*self.c)

    def empty(self, shape: _tensor.Shape) -> _Chunks:
        """New ones of this shape to write to, in a list or in one tensor as these are."""
        name = f"gradient of {self._name}"
        if is_stacked(self.given):
            return _Chunks(name, self.kind.empty_like(name, (len(self.c), *shape)).value, self._dtypes)
        return _Chunks(name, [view.empty_like(name, shape).value for view in self._views], self._dtypes)


def merge(attn: Any, lse: Any, write_lse: bool, output_dtype: Any) -> Tuple[Any, Optional[Any]]:
    """See attune.ops.fmha.merge_attentions."""
    attn, lse = _chunks_of_both(attn, lse)
    dtype = attn.kind.dtype if output_dtype is None else _tensor.output_dtype_name(output_dtype)
    output = attn.kind.empty_like("output", attn.shape, dtype)
    lse_out = attn.kind.empty_like("lse", _tensor.lse_shape(attn.shape), "float32") if write_lse else None
    _library.check(
        _library.library().attune_merge_attentions(
            attn.array,
            lse.array,
            len(attn.c),
            output.c,
            None if lse_out is None else lse_out.c,
            _library.Options(stream=attn.kind.stream),
        )
    )
    return output.value, None if lse_out is None else lse_out.value


def merge_backward(
    grad: Any, output: Any, lse: Any, attn_split: Any, lse_split: Any, grad_lse: Any
) -> Tuple[Any, Any]:
    """See attune.ops.fmha.merge_attentions_backward."""
    attn, lse_of_attn = _chunks_of_both(attn_split, lse_split)
    given = [
        _tensor.view_of("grad", grad),
        _tensor.view_of("output", output),
        _tensor.view_of("lse", lse, _tensor.LSES),
    ]
    if grad_lse is not None:
        given.append(_tensor.view_of("grad_lse", grad_lse, _tensor.LSES))
    grad_attn, grad_attn_lse = attn.empty(attn.shape), lse_of_attn.empty(_tensor.lse_shape(attn.shape))
    _library.check(
        _library.library().attune_merge_attentions_backward(
            given[0].c,
            None if grad_lse is None else given[3].c,
            given[1].c,
            given[2].c,
            attn.array,
            lse_of_attn.array,
            len(attn.c),
            grad_attn.array,
            grad_attn_lse.array,
            _library.Options(stream=attn.kind.stream),
        )
    )
    return grad_attn.given, grad_attn_lse.given


def _chunks_of_both(attn: Any, lse: Any) -> Tuple[_Chunks, _Chunks]:
    attn, lse = _Chunks("attn_split", attn, _tensor.FLOATS), _Chunks("lse_split", lse, _tensor.LSES)
    if len(attn.c) != len(lse.c):
        raise ValueError(
            f"Incompatible number of LSE and attention chunks: {len(attn.c)} of attention, {len(lse.c)} of LSE"
        )
    return attn, lse
