"""The user's own editor on a text."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbrx_cli.output import tell_lines
from model.errors import InputError

DEFAULT = "vi"


def edit_text(text: str, suffix: str = ".md") -> str:
    """What the editor leaves of a text. Raises `InputError` if it cannot be run, fails, or leaves no text."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or DEFAULT
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"the editor {command!r} cannot be understood: {error}", "check $VISUAL and $EDITOR") from None
    descriptor, name = tempfile.mkstemp(prefix="dbrx-", suffix=suffix)  # mode 0600
    path = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text + "\n")
        with _interrupts_are_the_editors():
            code = subprocess.run([*words, name]).returncode
        if code == -signal.SIGINT:
            tell_lines("")  # behind the ^C
            raise InputError(f"the editor {command!r} was stopped by Ctrl-C; nothing is changed")
        if code < 0:
            raise InputError(f"the editor {command!r} was ended by {signal.Signals(-code).name}; nothing is changed")
        if code:
            raise InputError(f"the editor {command!r} ended with {code}; nothing is changed")
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"the editor {command!r} cannot be run: {error.strerror}", "set $EDITOR") from None
    except UnicodeDecodeError:
        raise InputError("the editor left text that is not UTF-8; nothing is changed") from None
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _interrupts_are_the_editors() -> Iterator[None]:
    """Ctrl-C reaches both programs. A handler that does nothing, since a program that is run keeps SIG_IGN.

    Nor does the prompt's event loop hear of it, which listens to the file that signals are noted in.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    noted = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(noted)
        signal.signal(signal.SIGINT, before)
