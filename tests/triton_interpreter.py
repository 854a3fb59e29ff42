"""Triton's interpreter, quicker, and as numpy 2.4 wants it."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def prepare() -> None:
    """For a process of its own that was started with TRITON_INTERPRET=1, before its first kernel."""
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
