"""What was typed at earlier prompts, in a file for the user alone: a JSON string a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from dbrx_cli.private import open_private, private_folder
from model.errors import DbrxError

FILE = "history"
READ = 1 << 20  # bytes at the end of the file that are read


class PrivateHistory(History):
    """Raises `DbrxError` or `OSError` when it is made if the file cannot be had; later faults are passed over.

    JSON escapes what is no character (lone surrogates, from bytes that are not UTF-8), so nothing that was typed
    breaks the file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = private_folder(folder) / FILE
        os.close(open_private(self._path))

    def load_history_strings(self) -> Iterable[str]:
        """The newest first, each text once."""
        try:
            with open(open_private(self._path), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - READ))
                lines = file.read().splitlines()
        except (OSError, DbrxError):
            return []
        texts = filter(None, map(_parse, reversed(lines)))
        return list(dict.fromkeys(texts))

    def store_string(self, string: str) -> None:
        try:
            descriptor = open_private(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except (OSError, DbrxError):
            return
        with open(descriptor, "ab", buffering=0) as file:  # in one piece: other chats write to it, too
            file.write(json.dumps(string).encode("ascii") + b"\n")


def _parse(line: bytes) -> str | None:
    """None for a line that is none of ours, such as the rest of one at the beginning."""
    try:
        text = json.loads(line)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
