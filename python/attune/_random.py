"""Where the random numbers of dropout come from.

Which pairs of query and key are dropped is a function of a state, two 64-bit numbers, alone: the same on every device, for
every layout of the same sequences. A call that drops takes one state, on the host, and waits for nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Tuple

import numpy as np

from attune import _tensor
from attune._numbers import whole

_BITS = 2**64


class Generator:
    """Hands out states of dropout, one per call: (seed, 0), (seed, 1), ... The same seed gives the same states.

    Thread-safe. `Generator(seed, offset)` for one call repeats exactly what a call with that state dropped.
    """

    def __init__(self, seed: int = 0, offset: int = 0):
        self._lock = threading.Lock()
        self.manual_seed(seed, offset)

    def manual_seed(self, seed: int, offset: int = 0) -> Generator:
        state = whole("seed", seed) % _BITS, whole("offset", offset) % _BITS
        with self._lock:
            self._seed, self._offset = state
        return self

    def __reduce__(self) -> Tuple[Any, ...]:
        """Copies go on from the same state, each for itself."""
        with self._lock:
            return Generator, (self._seed, self._offset)

    def __repr__(self) -> str:
        return f"attune.Generator(seed={self._seed}, offset={self._offset})"

    def next(self) -> Tuple[int, int]:
        """Seed and offset of one call."""
        with self._lock:
            state = self._seed, self._offset
            self._offset = (self._offset + 1) % _BITS
        return state


_default = Generator(int.from_bytes(os.urandom(8), "little"))


def manual_seed(seed: int) -> None:
    """Seeds the generator that calls without torch tensors use by default; a new process seeds it at random. Calls with
    torch tensors follow torch.manual_seed."""
    _default.manual_seed(seed)


def state_of(generator: Any, query: Any) -> Tuple[int, int]:
    """Seed and offset of one call, from the `generator` it was given or, without one, the default of its framework."""
    if generator is None and not _tensor.is_torch_tensor(query):
        generator = _default
    if isinstance(generator, Generator):
        return generator.next()
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(_BITS, dtype=np.uint64)), 0
    if generator is None or _is_torch_generator(generator):
        return _torch_state(generator)
    raise TypeError(
        "generator: expected an attune.Generator, a torch.Generator or a numpy.random.Generator, got "
        f"{type(generator).__name__}"
    )


def _is_torch_generator(generator: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(generator, torch.Generator)


def _torch_state(generator: Any) -> Tuple[int, int]:
    import torch

    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator: it is on {generator.device}, where reading it would wait; pass a torch.Generator of the CPU"
        )
    return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")), 0
