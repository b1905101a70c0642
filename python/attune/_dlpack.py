"""DLPack capsules, read by ctypes. https://dmlc.github.io/dlpack has the layout of the structs."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    PYFUNCTYPE,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
INTEGER, FLOAT, BFLOAT, BOOLEAN = 0, 2, 4, 6
_READ_ONLY = 1


class DLTensor(ctypes.Structure):
    """Strides in elements; null strides are row-major."""

    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("dl_tensor", DLTensor),
    ]


# PYFUNCTYPE keeps the interpreter's lock: a deleter may release Python objects.
_Deleter = PYFUNCTYPE(None, c_void_p)
_get_name = PYFUNCTYPE(c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_get_pointer = PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_set_name = PYFUNCTYPE(c_int, ctypes.py_object, c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))

# A capsule keeps the pointer to its name, so the names live as long as the module.
_STRUCTS = {
    b"dltensor": (_Managed, b"used_dltensor"),
    b"dltensor_versioned": (_ManagedVersioned, b"used_dltensor_versioned"),
}


class Exchanged:
    """A tensor taken over from a producer; its memory goes back when this object dies."""

    def __init__(self, producer: object, stream: int | None):
        try:
            capsule = producer.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:  # a producer from before DLPack 1.0 does not know max_version
            capsule = producer.__dlpack__(stream=stream)
        name = _get_name(capsule)
        if name not in _STRUCTS:
            raise ValueError(f"__dlpack__ returned a capsule named {name!r}, expected 'dltensor'")
        struct, used = _STRUCTS[name]
        self._address = _get_pointer(capsule, name)
        managed = struct.from_address(self._address)
        _set_name(capsule, used)  # from here on the deleter is ours to call
        self._deleter = managed.deleter
        if struct is _ManagedVersioned and managed.major != 1:
            raise ValueError(f"DLPack {managed.major}.{managed.minor} is not supported, expected 1.x")
        self.tensor = managed.dl_tensor
        self.read_only = struct is _ManagedVersioned and bool(managed.flags & _READ_ONLY)

    def __del__(self):
        if getattr(self, "_deleter", None):
            _Deleter(self._deleter)(self._address)
