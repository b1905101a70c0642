"""What the operators share: their base classes, the inputs they are asked about, and the call itself.

Attune has kernel families; an operator of the documentation is a name for one or two of them, with the limits that the
documentation gives it. docs/operators.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple, Type

import numpy as np

from attune import _library, _repeated, _tensor
from attune._call import Backward, Call


@dataclass
class Inputs:
    """The arguments of an attention call; see memory_efficient_attention."""

    query: Any
    key: Any
    value: Any
    attn_bias: Any = None
    p: float = 0.0
    scale: Optional[float] = None
    output_dtype: Any = None
    is_partial: bool = False  # output in float32 unless output_dtype says otherwise

    def of(self, query: Any, key: Any, value: Any, attn_bias: Any) -> Inputs:
        """The same call of other tensors; dataclasses.replace takes ten times as long."""
        return Inputs(query, key, value, attn_bias, self.p, self.scale, self.output_dtype, self.is_partial)

    def call(self, families: Tuple[int, ...] = ()) -> Call:
        """The call that these inputs ask for, of the families that may run it. Raises what is wrong with them."""
        output_dtype = self.output_dtype
        if output_dtype is None and self.is_partial:
            output_dtype = "float32"
        return Call(
            self.query, self.key, self.value, self.attn_bias, self.p, self.scale, output_dtype, families
        )

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return "cuda" if _tensor.view_of("query", self.query).device[0] == _library.CUDA else "cpu"

    def max_queries(self) -> Optional[int]:
        """The longest sequence of queries; None where only a GPU knows it."""
        blocks = getattr(self.attn_bias, "_blocks", None)
        if blocks is None:
            return self.query.shape[1]
        if not blocks.q_starts.on_host:
            return None
        return int(np.diff(blocks.q_starts.numbers()).max(initial=0))


class AttentionOpBase:
    """Base class of all operators: kernel families, the most general last, and limits of its own. They are never
    instantiated."""

    NAME: str = ""
    OPERATOR: str = ""  # what it does, in messages
    FAMILIES: Tuple[Tuple[str, int], ...] = ()
    SUPPORTED_DEVICES = {"cuda"}

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> List[str]:
        """Why the operator cannot run these inputs, the most useful reason first. It can run them only if the list is
        empty."""
        try:
            own = cls.limits(d)
            return own or cls._reasons_of_families(d.call())
        except (NotImplementedError, TypeError, ValueError) as refused:
            return [str(refused)]

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        """What the operator refuses although its families might run it."""
        if d.device in cls.SUPPORTED_DEVICES:
            return []
        return [f"device={d.device} (supported: {cls.SUPPORTED_DEVICES})"]

    @classmethod
    def check(cls, d: Inputs) -> None:
        """Raises ValueError with all reasons where the operator cannot run the inputs."""
        reasons = cls.not_supported_reasons(d)
        if not reasons:
            return
        lines = [f"Operator `{cls.OPERATOR}` does not support inputs:"]
        for name in ("query", "key", "value"):
            tensor = getattr(d, name)
            lines.append(f"     {name:<9} : shape={tuple(tensor.shape)} ({tensor.dtype})")
        lines.append(f"     attn_bias : {type(d.attn_bias)}")
        lines.append(f"     p         : {d.p}")
        lines.append(f"`{cls.NAME}` is not supported because:")
        raise ValueError("\n".join(lines + [f"    {reason}" for reason in reasons]))

    @classmethod
    def _run(cls, d: Inputs, run: Callable[[Call], Any]) -> Any:
        """What `run` makes of the call, restricted to the operator's families."""
        call = d.call(tuple(number for _, number in cls.FAMILIES))
        if cls.limits(d):
            cls.check(d)
        try:
            return run(call)
        except NotImplementedError:
            cls.check(d)  # says more, where it is the operator that refuses
            raise

    @classmethod
    def _reasons_of_families(cls, call: Call) -> List[str]:
        reasons = []
        for name, number in reversed(cls.FAMILIES):  # the last one refuses least, so its reasons say most
            against = cls._reasons_against(call, number)
            if not against:
                return []
            reasons += [reason if len(cls.FAMILIES) == 1 else f"{name}: {reason}" for reason in against]
        return reasons

    @classmethod
    def _reasons_against(cls, call: Call, family: int) -> List[str]:
        raise NotImplementedError


class AttentionFwOpBase(AttentionOpBase):
    """A forward operator."""

    OPERATOR = "memory_efficient_attention"
    MAX_QUERIES: Optional[int] = None  # of one sequence; None: any number

    @classmethod
    def limits(cls, d: Inputs) -> List[str]:
        reasons = super().limits(d)
        if cls.MAX_QUERIES is not None:
            queries = d.max_queries()
            if queries is not None and queries > cls.MAX_QUERIES:
                reasons.append(f"{queries} queries of one sequence, and it is for at most {cls.MAX_QUERIES}")
        return reasons

    @classmethod
    def forward(cls, d: Inputs, with_lse: bool, generator: Any) -> Tuple[Any, Any]:
        """Output and LSE. Raises ValueError with all reasons where the operator cannot run the inputs."""
        return cls._run(d, lambda call: call.forward(with_lse, generator))

    @classmethod
    def _reasons_against(cls, call: Call, family: int) -> List[str]:
        return call.reasons_against(family)


class AttentionBwOpBase(AttentionOpBase):
    """A backward operator."""

    OPERATOR = "memory_efficient_attention_backward"

    @classmethod
    def backward(cls, d: Inputs, b: Backward) -> List[Any]:
        """Gradients of query, key, value and the bias tensor. Raises ValueError with all reasons where the operator
        cannot run the inputs."""
        return cls._run(d, lambda call: call.backward(b))

    @classmethod
    def _reasons_against(cls, call: Call, family: int) -> List[str]:
        return call.reasons_against_backward(family)


# A forward and a backward operator; None leaves the choice to Attune.
AttentionOp = Tuple[Optional[Type[AttentionFwOpBase]], Optional[Type[AttentionBwOpBase]]]
AttentionOpDispatch = AttentionOp


def run_forward(
    d: Inputs, op: Optional[Type[AttentionFwOpBase]], with_lse: bool, generator: Any
) -> Tuple[Any, Any]:
    """Output and LSE, by `op` or Attune's choice."""
    return _repeated.forward(d, with_lse, generator) if op is None else op.forward(d, with_lse, generator)


def run_backward(d: Inputs, op: Optional[Type[AttentionBwOpBase]], b: Backward) -> List[Any]:
    """Gradients of query, key, value and the bias tensor, by `op` or Attune's choice."""
    return _repeated.backward(d, b) if op is None else op.backward(d, b)


# Kernel families: their names in messages, their numbers in the C ABI.
SM90 = ("sm90", _library.FAMILY_SM90)
MMA = ("mma", _library.FAMILY_MMA)
SIMT = ("simt", _library.FAMILY_SIMT)
CPU = ("cpu", _library.FAMILY_CPU)
