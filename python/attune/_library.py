"""libattune.so through ctypes: the structs and functions of include/attune/attune_c.h."""

from __future__ import annotations

import ctypes
import json
import struct
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any, Iterator, Optional, Union

MAX_RANK = 6
F32, F16, BF16, BOOLEAN, I32 = range(5)
CPU, CUDA = range(2)
FAMILY_CPU, FAMILY_SIMT, FAMILY_MMA, FAMILY_SM90 = range(1, 5)
TOP_LEFT, BOTTOM_RIGHT = range(2)


class EnvironmentFailure(RuntimeError):
    """The machine is at fault, not the call: driver, compiler, disk, or no libattune.so. `attune doctor` helps."""


class Tensor(ctypes.Structure):
    """attune_tensor: shape and strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("rank", c_int32),
        ("shape", c_int64 * MAX_RANK),
        ("strides", c_int64 * MAX_RANK),
    ]


class _Sized(ctypes.Structure):
    """A struct that may grow: its first field is its size."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class Bias(_Sized):
    """attune_bias; a negative reach is no bound, a null pointer an absent part."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("anchor", c_int32),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("tensor", POINTER(Tensor)),
        ("sequences", c_int64),
        ("q_starts", POINTER(Tensor)),
        ("k_starts", POINTER(Tensor)),
        ("k_lens", POINTER(Tensor)),
        ("block_tables", POINTER(Tensor)),
        ("page_size", c_int64),
        ("name", c_char_p),
        ("page_run", c_int64),
    ]


class Options(_Sized):
    """attune_options; a null scale is head_dim ** -0.5, a null stream the default stream, 0 families are any."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("scale", POINTER(c_double)),
        ("stream", c_void_p),
        ("families", c_uint32),
        ("p", c_double),
        ("seed", c_uint64),
        ("offset", c_uint64),
        ("output_dtype", POINTER(c_int32)),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


# attune_forward_memory: its size, query, key, value, output, lse, bias, stream, seed, offset, workspace and its bytes.
# Packed, since to fill a ctypes structure takes three times as long.
FORWARD_MEMORY = struct.Struct("@N7P2QPN")
# attune_backward_memory: its size, grad_output, output, lse, query, key, value, the four gradients, bias, grad_lse, stream,
# seed, offset, workspace and its bytes.
BACKWARD_MEMORY = struct.Struct("@N13P2QPN")


class Gradients(_Sized):
    """attune_gradients; null: not wanted."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("query", POINTER(Tensor)),
        ("key", POINTER(Tensor)),
        ("value", POINTER(Tensor)),
        ("bias", POINTER(Tensor)),
    ]


class BackwardOptions(_Sized):
    """attune_backward_options; a null workspace is allocated by the library."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("grad_lse", POINTER(Tensor)),
        ("deterministic", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class Counters(_Sized):
    """attune_counters"""

    _fields_ = [("struct_size", c_size_t)] + [
        (name, c_uint64)
        for name in (
            "compiles",
            "loads",
            "launches",
            "cache_hits",
            "cache_misses",
            "cache_defects",
            "cache_stores",
        )
    ]


_INPUTS = [POINTER(Tensor)] * 3
_SETTINGS = [POINTER(Bias), POINTER(Options)]
_BACKWARD = [POINTER(Tensor)] * 3 + _INPUTS + [POINTER(Gradients)] + _SETTINGS + [POINTER(BackwardOptions)]
_FUNCTIONS = {
    "attune_version": (c_char_p, []),
    "attune_last_error": (c_char_p, []),
    "attune_last_kernel": (c_char_p, []),
    "attune_free": (None, [c_void_p]),
    "attune_memory_efficient_attention_forward": (c_int, _INPUTS + [POINTER(Tensor)] * 2 + _SETTINGS),
    "attune_forward_workspace_bytes": (c_int, _INPUTS + [c_int] + _SETTINGS + [POINTER(c_size_t)]),
    "attune_forward_call_create": (
        c_int,
        _INPUTS + [POINTER(Tensor)] * 2 + _SETTINGS + [POINTER(c_void_p)],
    ),
    "attune_forward_call_workspace_bytes": (c_int, [c_void_p, POINTER(c_size_t)]),
    "attune_forward_call_run": (c_int, [c_void_p, c_char_p]),  # the second is FORWARD_MEMORY's bytes
    "attune_forward_call_destroy": (None, [c_void_p]),
    "attune_memory_efficient_attention_backward": (c_int, _BACKWARD),
    "attune_backward_workspace_bytes": (c_int, _BACKWARD + [POINTER(c_size_t)]),
    "attune_backward_call_create": (c_int, _BACKWARD + [POINTER(c_void_p)]),
    "attune_backward_call_workspace_bytes": (c_int, [c_void_p, POINTER(c_size_t)]),
    "attune_backward_call_run": (c_int, [c_void_p, c_char_p]),  # the second is BACKWARD_MEMORY's bytes
    "attune_backward_call_destroy": (None, [c_void_p]),
    "attune_prepare_backward": (c_int, _BACKWARD),
    "attune_explain_backward": (c_int, _BACKWARD + [POINTER(c_void_p)]),
    "attune_prepare": (c_int, _INPUTS + [c_int] + _SETTINGS),
    "attune_merge_attentions": (
        c_int,
        [POINTER(Tensor)] * 2 + [c_size_t] + [POINTER(Tensor)] * 2 + _SETTINGS[1:],
    ),
    "attune_merge_attentions_backward": (
        c_int,
        [POINTER(Tensor)] * 6 + [c_size_t] + [POINTER(Tensor)] * 2 + _SETTINGS[1:],
    ),
    "attune_not_supported_reasons": (c_int, [c_int] + _INPUTS + _SETTINGS + [POINTER(c_void_p)]),
    "attune_backward_not_supported_reasons": (c_int, [c_int] + _INPUTS + _SETTINGS + [POINTER(c_void_p)]),
    "attune_explain": (c_int, _INPUTS + [c_int] + _SETTINGS + [POINTER(c_void_p)]),
    "attune_get_counters": (c_int, [POINTER(Counters)]),
}
_ERRORS = {1: ValueError, 2: NotImplementedError, 3: EnvironmentFailure, 4: RuntimeError}

_loaded: Optional[ctypes.CDLL] = None


def library() -> ctypes.CDLL:
    """The library; found and opened at the first call."""
    return _loaded if _loaded is not None else load()


def load(path: Union[str, Path, None] = None) -> ctypes.CDLL:
    """Opens the library at `path`, or the first that opens: beside the package, in the repository's build folders,
    on the loader's path. Raises EnvironmentFailure with everything tried."""
    global _loaded
    tried = []
    for candidate in [str(path)] if path is not None else _candidates():
        try:
            opened = ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(f"  {candidate}: {error}")
            continue
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
        _check_version(candidate, opened)
        _loaded = opened
        return opened
    raise EnvironmentFailure(
        "libattune.so could not be opened; build it with `cmake --preset release && "
        "cmake --build --preset release`. Tried:\n" + "\n".join(tried)
    )


def _candidates() -> Iterator[str]:
    package = Path(__file__).resolve().parent
    yield str(package / "libattune.so")
    builds = package.parents[1] / "build"
    names = sorted(path.name for path in builds.glob("*") if (path / "lib" / "libattune.so").exists())
    for name in sorted(names, key=lambda name: name != "release"):
        yield str(builds / name / "lib" / "libattune.so")
    yield "libattune.so"


def _check_version(path: str, opened: ctypes.CDLL) -> None:
    from attune import __version__  # not at the top: the package imports this module

    version = opened.attune_version().decode()
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise EnvironmentFailure(
            f"{path} is Attune {version}, but this Python package is {__version__}; "
            "install the same version of both"
        )


def json_of(text: ctypes.c_void_p) -> Any:
    """What the library wrote as JSON; frees the text."""
    try:
        return json.loads(ctypes.string_at(text))
    finally:
        library().attune_free(text)


def check(status: int) -> None:
    """Raises what `status` means, with the library's text."""
    if status != 0:
        raise _ERRORS.get(status, RuntimeError)(library().attune_last_error().decode())
