"""Text files that the command line names: read whole, bounded, and put into a prompt under their names."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence

from dbrx_cli.stdin import InputErrors, decode
from model.errors import InputError
from model.messages import MAX_TEXT, check_size

KINDS = (  # how files begin that hold no text
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|....ftyp(avif|heic|mif1)", "an image"),
    (rb"%PDF-", "a PDF file"),
    (rb"PK\x03\x04", "an archive or an office document"),
    (rb"ID3|OggS|fLaC|RIFF....WAVE", "a recording"),
    (rb"....ftyp|\x1aE\xdf\xa3", "a film"),
)


def read_file(path: str, limit: int = MAX_TEXT) -> bytes:
    """A plain file's bytes; `InputError` if there is none, it cannot be read, or it has more than `limit` bytes."""
    try:
        # Without waiting: a pipe without a writer would hold the program up for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is not a plain file", "write it to a file first")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path!r} cannot be read: {reason}", "check the name") from None
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit // 2**20} MiB", "give a part of it")
    return data


def attached(paths: Sequence[str], errors: InputErrors | None = None) -> str:
    """The files as a prompt shows them: each under its name, between fences that nothing in it can close.

    Raises `InputError` as `read_file`, for bytes that are not UTF-8, and if all of them are too long for any model.
    """
    parts = []
    for path in paths:
        data = read_file(path)
        if kind := next((kind for mark, kind in KINDS if re.match(mark, data, re.DOTALL)), None):
            raise InputError(f"{path} is {kind}, and this model reads text only", "give its text instead")
        text = decode(data, path, errors)
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        end = "" if text.endswith("\n") else "\n"
        parts.append(f"{path}:\n{fence}\n{text}{end}{fence}")
    whole = "\n\n".join(parts)
    check_size(len(whole.encode()))
    return whole


# A file as `attached` has it and the blank line behind it: its fence is longer than any within.
ATTACHED = re.compile(r"([^\n]+):\n(`{3,})\n.*?^\2\n\n", re.DOTALL | re.MULTILINE)


def apart(message: str) -> tuple[list[str], str]:
    """The names of the files that were put before a message, and its own words: what a person remembers of it."""
    names, at = [], 0
    while found := ATTACHED.match(message, at):
        names.append(found[1])
        at = found.end()
    return names, message[at:]
