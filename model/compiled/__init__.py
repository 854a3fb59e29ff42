"""A choice: a decode step through functions that PyTorch compiled for this processor, once."""

from .block import compile_into, form_of
from .compiler import Compiler

__all__ = ["Compiler", "compile_into", "form_of"]
