"""Where the answers of a batch go: stdout, or a file that another run of the same command goes on with.

Each answer is written in one piece as soon as it is there, so that after a crash all but the last line are whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

from dbrx_cli.output import say_json, to_json
from dbrx_cli.private import refuse_link
from model.errors import InputError, ResourceError

OTHER_PROMPTS = "answers to other prompts"
FIRST = b'{"index": '  # every record begins so: how a torn one is told from a file that is something else

Key = tuple[str | int | None, int | None]  # the id of a prompt, or the index where it has none


def key(id: str | int | None, index: int) -> Key:
    """By what a prompt is found again. An id never means an index, whatever it is."""
    return (id, None) if id is not None else (None, index)


@dataclass(frozen=True)
class Wanted:
    """A prompt of the file: its place, its digest, and all else that decides about its answer: names -> values."""

    index: int
    digest: str
    asked: Mapping[str, Any]


class Answers(Protocol):
    """Takes records, JSON objects of which `index` comes first."""

    answered: frozenset[int]  # the indexes of prompts that need no answer any more
    advice: str  # behind "so many are answered" when the work is broken off

    def write(self, line: Mapping[str, Any]) -> None:
        """Keep one record."""

    def close(self) -> None:
        """No more will come."""


class StandardOutput:
    """Answers on stdout."""

    answered: frozenset[int] = frozenset()
    advice = ""

    def write(self, line: Mapping[str, Any]) -> None:
        say_json(line)

    def close(self) -> None:
        pass


class AnswerFile:
    """A file of answers, locked against other processes; what it held before counts as answered, faults excepted."""

    advice = "; the same command goes on"

    def __init__(self, path: Path, wanted: Mapping[Key, Wanted], model: str) -> None:
        """`InputError` if the file cannot be written, is something else, or answers what is not asked now: other
        prompts, another model, other settings.
        """
        self.path = path
        self.answered: frozenset[int] = frozenset()
        self._file = self._open()
        try:
            self._take_up(wanted, model)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            _write(self._file, to_json(line).encode() + b"\n")
        except OSError as error:
            raise ResourceError(
                f"{self.path} cannot be written: {error.strerror}", "the same command goes on"
            ) from None

    def close(self) -> None:
        os.close(self._file)

    def _open(self) -> int:
        refuse_link(self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            file = os.open(self.path, flags, 0o600)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(f"--output {str(self.path)!r} cannot be written: {reason}", "choose another") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise InputError(f"--output {self.path} is not a plain file", "leave --output out to write to stdout")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_at_path(file):
                return file
        except BlockingIOError:
            os.close(file)
            raise InputError(f"another process is writing {self.path}", "wait for it, or choose another file") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # another process has put a mended file in its place since it was opened
        return self._open()

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _take_up(self, wanted: Mapping[Key, Wanted], model: str) -> None:
        with open(self.path, "rb") as file:
            data = file.read()
        *lines, tail = data.split(b"\n")  # tail: empty, or torn when a process was killed
        if not tail.startswith(FIRST[: len(tail)]):
            raise self._foreign(len(lines) + 1)
        answered, kept = set(), []
        for number, line, values in self._answers(lines):
            prompt = wanted.get(key(values.get("id"), values["index"]))
            if prompt is None or (other := _otherwise(values, prompt, model)):
                what = other if prompt is not None else OTHER_PROMPTS
                fault = f"--output {self.path} holds {what} (line {number})"
                raise InputError(fault, "choose another file, or delete this one to ask anew")
            answered.add(prompt.index)
            # An id may have moved to another line.
            head, moved = (FIRST + str(index).encode() for index in (values["index"], prompt.index))
            kept.append(moved + line.removeprefix(head) + b"\n")
        self.answered = frozenset(answered)
        if b"".join(kept) != data:
            self._replace(b"".join(kept))

    def _answers(self, lines: Sequence[bytes]) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Number, bytes and content of each line that is an answer; those that are faults are left out."""
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                raise self._foreign(number) from None
            if not line.startswith(FIRST) or not ({"text", "error"} & set(values)) or not _is_key(values):
                raise self._foreign(number)
            if "error" not in values:
                yield number, line, values

    def _foreign(self, number: int) -> InputError:
        return InputError(f"--output {self.path} is no file of answers (line {number})", "choose another")

    def _replace(self, data: bytes) -> None:
        """Put other content in the file's place at once, so that a crash leaves the one or the other."""
        try:
            new, name = tempfile.mkstemp(dir=self.path.resolve().parent, prefix=f".{self.path.name}.")
            try:
                _write(new, data)
                shutil.copymode(self.path, name)
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fsync(new)
                os.replace(name, self.path.resolve())
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise ResourceError(f"{self.path} cannot be mended: {error.strerror}", "make room beside it") from None
        os.close(self._file)
        self._file = new
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_APPEND)


def _is_key(values: Mapping[str, Any]) -> bool:
    return type(values["index"]) is int and type(values.get("id")) in (str, int, NoneType)


def _otherwise(answer: Mapping[str, Any], prompt: Wanted, model: str) -> str:
    """How what was asked differs from what is asked now, if it does."""
    if answer.get("model") != model:
        return "another model's answers"
    if answer.get("prompt_sha256") != prompt.digest:
        return OTHER_PROMPTS
    before, now = answer.get("asked"), prompt.asked
    if not isinstance(before, dict):
        return "answers of an earlier version, which do not say how they were asked"
    changed = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return f"answers that were asked with another {', '.join(changed)}" if changed else ""


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
