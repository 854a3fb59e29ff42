"""Faults that a person can do something about: what is wrong, what to type next, and how the process ends."""

from .foreign_text import on_one_line


class DbrxError(Exception):
    """A fault told to the user in one line; `hint` says what to do next, `exit_code` how the command ends."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def one_line(self) -> str:
        """What is wrong; what to type next. Names and values of others in it are escaped, and cut if they are long."""
        return on_one_line(self.message.rstrip(".") + (f"; {self.hint}" if self.hint else ""))


class InputError(DbrxError):
    """Wrong usage, or input that cannot be read (not UTF-8)."""

    exit_code = 2


class ModelError(DbrxError):
    """The model is missing, corrupt or unsupported, or a backend cannot run here."""

    exit_code = 3


class NotFiniteError(ModelError):
    """The network computed numbers that no sound one makes."""


class AccessError(DbrxError):
    """The Hub refuses: no token, no permission, approval pending."""

    exit_code = 4


class ResourceError(DbrxError):
    """Not enough memory or disk."""

    exit_code = 5


class ContextError(DbrxError):
    """The prompt does not fit the context."""

    exit_code = 6


class ConnectionFault(DbrxError):
    """A server could not be reached or broke off."""

    exit_code = 7


def first_line(error: Exception) -> str:
    """Of what an error of another program says; the error's name where that is nothing."""
    return str(error).partition("\n")[0] or type(error).__name__
