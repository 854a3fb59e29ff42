"""The clipboard: through a program of the desktop, else through the terminal itself."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys

from dbrx_cli.output import moves_cursor
from dbrx_cli.repl.phrases import count
from model.errors import InputError

# What must be set for a program to reach a clipboard, and how it is called.
PROGRAMS = (
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard"]),
    ("DISPLAY", ["xsel", "--clipboard", "--input"]),
    ("", ["pbcopy"]),
    ("WSL_DISTRO_NAME", ["clip.exe"]),
)
LARGEST = 74_994  # bytes that terminals commonly take in one escape sequence, in base64 a bit under 100 kB
PATIENCE_S = 5


def copy_text(text: str, *, terminal: bool) -> str:
    """Copy, and say how. `terminal`: stdout is one, so that it can be asked."""
    size = count(len(text), "character")
    for variable, command in PROGRAMS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]) and _run(command, text):
            return f"copied {size} with {command[0]}"
    if not terminal or not moves_cursor(sys.stdout):
        raise InputError("there is no clipboard", "install wl-copy or xclip, or use a terminal that knows OSC 52")
    data = text.encode("utf-8")
    if len(data) > LARGEST:
        raise InputError(
            f"{size} are too many for the terminal's clipboard", "install wl-copy or xclip, or use /export"
        )
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07")
    sys.stdout.flush()
    return f"asked the terminal to copy {size} (OSC 52; some terminals must be allowed to)"


def _run(command: list[str], text: str) -> bool:
    try:
        quiet = subprocess.DEVNULL
        done = subprocess.run(command, input=text.encode("utf-8"), stdout=quiet, stderr=quiet, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
