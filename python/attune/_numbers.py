"""Arguments that are one number, of whatever type of numbers."""

from __future__ import annotations

import ctypes
import operator
from typing import Any


def whole(name: str, number: Any) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {number!r}") from None


def real(name: str, number: Any) -> float:
    try:
        return ctypes.c_double(number).value  # as float(), but that takes text, too
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {number!r}") from None
