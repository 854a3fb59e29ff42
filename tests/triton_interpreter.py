"""Triton's interpreter, quicker, and as numpy 2.4 wants it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from triton.language import core
from triton.runtime import interpreter

from model.kernels import cuda_block, cuda_glu, cuda_linear


def prepare() -> None:
    """For a process of its own that was started with TRITON_INTERPRET=1, before its first kernel."""
    # One program for all of a small expert: they cost a tenth of a second each, whatever their tiles.
    cuda_glu.DOWN = cuda_linear.Tile(256, 16, 4, 255)
    cuda_glu.tile = cuda_linear.tile = lambda tokens, bits: cuda_glu.DOWN
    cuda_block.SPLITS = 2
    # Checked twice for numbers of 32 bits that overflow, each product of integers takes six times as long.
    interpreter.interpreter_builder.options.__dict__["sanitize_overflow"] = False

    def patch_tensor(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        """Triton 3.6 makes an int of an array of one number, which numpy 2.4 refuses."""
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    patched: set[str] = set()

    def patch_language(function: Any, patch: Any = interpreter._patch_lang) -> Any:
        """For good, once a module: Triton does so at each call of a function, which takes longer than most of these."""
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()  # holds nothing that a kernel's end would restore

    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_language
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, lambda dtype: dtype.scalar.name)
    _make_once(core.block_type, lambda element_ty, shape: (element_ty.name, *map(int, shape)))
    _make_once(core.tensor, lambda handle, type: type.name, own=("handle",))


def _remembered(function: Any, key: Callable[..., Hashable]) -> Any:
    """A function that makes the same of arguments with the same key."""
    made: dict[Hashable, Any] = {}

    def call(*args: Any) -> Any:
        found = key(*args)
        if found not in made:
            made[found] = function(*args)
        return made[found]

    return call


def _make_once(kind: Any, key: Callable[..., Hashable], own: tuple[str, ...] = ()) -> None:
    """Objects of a class whose first arguments are its `own` attributes are alike in all else if their keys are."""
    made: dict[Hashable, dict[str, Any]] = {}

    def init(self: Any, *args: Any, make: Any = kind.__init__) -> None:
        found = made.get(name := key(*args))
        if found is None:
            make(self, *args)
            made[name] = dict(self.__dict__)
        else:
            self.__dict__.update(found, **dict(zip(own, args, strict=False)))

    kind.__init__ = init
