"""Registers an FFI handler through a PJRT plugin's own FFI extension."""

import ctypes
from typing import Any

_FFI_EXTENSION = 5


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
    )


class _Api(ctypes.Structure):  # the head of PJRT_Api
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("api_version", ctypes.c_byte * 24),
        ("error_destroy", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("error_message", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


class _FfiExtension(ctypes.Structure):
    _fields_ = (
        ("base", _Extension),
        ("type_register", ctypes.c_void_p),
        ("user_data_add", ctypes.c_void_p),
        ("register_handler", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
    )


class _RegisterArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("name_size", ctypes.c_size_t),
        ("handler", ctypes.c_void_p),
        ("platform", ctypes.c_char_p),
        ("platform_size", ctypes.c_size_t),
        ("traits", ctypes.c_int),
    )


_REGISTER_ARGS_SIZE = _RegisterArgs.traits.offset + ctypes.sizeof(ctypes.c_int)  # no padding


class _ErrorArgs(ctypes.Structure):  # of error_message and, shorter, error_destroy
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("message", ctypes.c_void_p),
        ("message_size", ctypes.c_size_t),
    )


_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype, _get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def capsule_pointer(capsule: Any) -> int:
    """The address that a capsule holds."""
    return _get_pointer(capsule, _get_name(capsule))


def _error_text(api: _Api, error: int) -> str:
    args = _ErrorArgs(struct_size=ctypes.sizeof(_ErrorArgs), error=error)
    api.error_message(ctypes.addressof(args))
    text = ctypes.string_at(args.message, args.message_size).decode(errors="replace")
    args.struct_size = _ErrorArgs.message.offset
    api.error_destroy(ctypes.addressof(args))
    return text


def register_handler(c_api: Any, name: str, handler: int, platform: str) -> str | None:
    """Registers an FFI handler with a plugin.

    Args:
      c_api: the capsule of the plugin's PJRT_Api.
      name: the FFI target's name.
      handler: the address of the handler.
      platform: the platform's name in XLA.

    Returns:
      None, or why it failed. A plugin may accept a handler and still not take it.
    """
    api = _Api.from_address(capsule_pointer(c_api))
    address = api.extension_start
    while address:
        extension = _Extension.from_address(address)
        if extension.type == _FFI_EXTENSION:
            break
        address = extension.next
    else:
        return "the plugin has no PJRT FFI extension"
    target, xla_platform = name.encode(), platform.encode()
    args = _RegisterArgs(
        struct_size=_REGISTER_ARGS_SIZE,
        name=target,
        name_size=len(target),
        handler=handler,
        platform=xla_platform,
        platform_size=len(xla_platform),
    )
    error = _FfiExtension.from_address(address).register_handler(ctypes.addressof(args))
    return _error_text(api, error) if error else None
