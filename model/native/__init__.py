"""The native kernels: the best library for this processor, loaded on first use, or the reason why there is none.

`library()` gives it, `status()` says which it is, `pool(threads)` the threads that it computes with;
`tensors.py` makes matrices of tensors. Nothing here needs PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import InputError, ModelError
from ..trust import untrusted
from . import abi
from .build import LIB, architecture, compiler, variants

FORCED = "DBRX_NATIVE"  # a variant's name, or "none"
VECTORS = Path(__file__).parent / "vectors.bin"  # inputs and known answers; see tests/make_native_vectors.py
NONE = "none"


@dataclass(frozen=True)
class Status:
    """Which variant is used, and what became of those before it.

    variant: None where PyTorch's kernels compute instead.
    faults: of libraries that are there and should have run, a sentence each.
    hint: what to type where that would give a better one.
    """

    variant: str | None
    why_not: str | None = None
    faults: tuple[str, ...] = ()
    hint: str | None = None


@dataclass(frozen=True)
class _Loaded:
    status: Status
    library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL | None:
    """The library, its functions as `abi.py` declares them; None where there is none that runs here.

    `InputError` or `ModelError` if DBRX_NATIVE asks for one that cannot be had.
    """
    return _load(os.environ.get(FORCED, "")).library


def status() -> Status:
    """What `library` found."""
    return _load(os.environ.get(FORCED, "")).status


def why_not() -> str | None:
    """Why there is no library, or None if there is one."""
    return status().why_not


@cache
def _load(forced: str) -> _Loaded:
    names = list(variants(architecture()))
    if forced == NONE:
        return _Loaded(Status(None, f"{FORCED}={NONE}", hint=f"unset {FORCED}"))
    if forced and forced not in names:
        raise InputError(f"{FORCED}={forced} is no variant of {architecture()}", f"one of {', '.join((*names, NONE))}")
    faults: list[str] = []
    for name in (forced,) if forced else names:
        try:
            found = _open(name)
        except _Unusable as error:
            faults.append(f"{name}: {error}")
        else:
            if found is not None:
                return _Loaded(Status(name, faults=tuple(faults), hint=_build() if faults else None), found)
    if forced:
        reason = "; ".join(faults) or f"{forced}: it was not built, or this processor cannot run it"
        raise ModelError(f"{FORCED}={forced} cannot be used ({reason})", f"unset {FORCED}, or: {_build()}")
    if faults:
        return _Loaded(Status(None, "; ".join(faults), tuple(faults), _build()))
    lacking = "" if compiler() else "install a C++ compiler (g++ or clang++), then: "
    return _Loaded(Status(None, "they were not built", hint=lacking + _build()))


def _build() -> str:
    return f"{sys.executable} -m model.native"


class _Unusable(Exception):
    """A library that is there and cannot be used, and why."""


def _open(name: str) -> ctypes.CDLL | None:
    """A variant's library, checked; None where it is not there, or is for other processors."""
    path = LIB / f"dbrx-{name}.so"
    if not path.is_symlink() and not path.exists():
        return None
    if reason := untrusted(path):
        raise _Unusable(reason)
    try:
        found = ctypes.CDLL(str(path))
        found.dbrx_abi.restype = ctypes.c_int
        if found.dbrx_abi() != abi.ABI:
            raise _Unusable(f"{path} belongs to another version of this program")
        abi.declare(found)
    except (OSError, AttributeError) as error:
        raise _Unusable(f"{path} cannot be loaded: {error}") from None
    if not found.dbrx_runs_here():
        return None
    if fault := _wrong(found):
        raise _Unusable(f"computes wrong numbers here: {fault}")
    return found


def _wrong(found: ctypes.CDLL) -> str | None:
    """What differs when small known answers are computed again, or None."""
    vectors = VECTORS.read_bytes()
    said = ctypes.create_string_buffer(200)
    threads = Pool(found, 1)
    failed = found.dbrx_replay(threads.handle, vectors, len(vectors), said, len(said))
    return said.value.decode("utf-8", "replace") if failed else None


@dataclass(eq=False)
class Pool:
    """Threads of a library, and memory for what lies between two products; the caller is one of them.

    One call at a time. They end with the object, or with the process.
    """

    library: ctypes.CDLL
    threads: int
    handle: ctypes.c_void_p = field(init=False)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"{self.threads} threads compute nothing")
        made = self.library.dbrx_pool_create(self.threads)
        if not made:
            raise ValueError(self.library.dbrx_error().decode("utf-8", "replace"))
        self.handle = ctypes.c_void_p(made)
        weakref.finalize(self, _destroy, self.library, self.handle, os.getpid()).atexit = False

    def counters(self, thread: int) -> abi.Counters:
        """What a thread did since the pool was made."""
        counted = abi.Counters()
        self.library.dbrx_pool_counters(self.handle, thread, ctypes.byref(counted))
        return counted


def _destroy(library: ctypes.CDLL, handle: ctypes.c_void_p, owner: int) -> None:
    if os.getpid() == owner:  # threads do not live on in a process that was forked off
        library.dbrx_pool_destroy(handle)


_pool: tuple[int, Pool] | None = None


def pool(threads: int) -> Pool:
    """The pool of this process with so many threads; another number ends those of before, once nobody holds them."""
    global _pool
    found = library()
    if found is None:
        raise ValueError(f"there are no native kernels: {why_not()}")
    if _pool is None or _pool[0] != os.getpid() or _pool[1].threads != threads or _pool[1].library is not found:
        _pool = os.getpid(), Pool(found, threads)
    return _pool[1]
