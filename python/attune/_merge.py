"""One merge of partial attentions through the C ABI."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

from attune import _library, _tensor


class _Chunks:
    """A list of tensors, or one tensor with the chunks on its first axis."""

    def __init__(self, name: str, given: Any, dtypes: Tuple[str, ...]):
        if isinstance(given, (list, tuple)):
            self._views = [_tensor.view_of(f"{name}[{i}]", tensor, dtypes) for i, tensor in enumerate(given)]
            self.c: List[_library.Tensor] = [view.c for view in self._views]
            self.shape = self._views[0].shape if given else ()
        else:
            self._views = [_tensor.view_of(name, given, dtypes)]
            self.c = self._views[0].along_first_axis()
            self.shape = self._views[0].shape[1:]
        if not self.c:
            raise ValueError(f"{name}: no chunks to merge")
        self.kind = self._views[0]  # of what results are made

    @property
    def array(self) -> Any:
        return (_library.Tensor * len(self.c))(*self.c)


def merge(attn: Any, lse: Any, write_lse: bool, output_dtype: Any) -> Tuple[Any, Optional[Any]]:
    """See attune.ops.fmha.merge_attentions."""
    attn, lse = _Chunks("attn_split", attn, _tensor.FLOATS), _Chunks("lse_split", lse, ("float32",))
    if len(attn.c) != len(lse.c):
        raise ValueError(
            f"Incompatible number of LSE and attention chunks: {len(attn.c)} of attention, {len(lse.c)} of LSE"
        )
    dtype = attn.kind.dtype if output_dtype is None else _tensor.dtype_name(output_dtype)
    output = attn.kind.empty_like("output", attn.shape, dtype)
    lse_out = None
    if write_lse:
        lse_out = attn.kind.empty_like("lse", attn.shape[:1] + attn.shape[2:-1] + attn.shape[1:2], "float32")
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
