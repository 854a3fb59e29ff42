"""What a download tells the program that asked for it."""

from typing import Protocol


class Progress(Protocol):
    """Called from the thread that called `download`, never from a worker."""

    def start(self, total_bytes: int, done_bytes: int, files: int) -> None:
        """Once, when the sizes are known; `done_bytes` are already on disk."""

    def file(self, name: str, size: int, done: int) -> None:
        """A file begins, with `done` of its `size` bytes on disk."""

    def advance(self, name: str, n_bytes: int) -> None:
        """More bytes of a file are on disk; negative when it has to start again."""

    def notice(self, text: str) -> None:
        """A line for the user."""


class Silent:
    """A `Progress` that tells nothing."""

    def start(self, total_bytes: int, done_bytes: int, files: int) -> None: ...

    def file(self, name: str, size: int, done: int) -> None: ...

    def advance(self, name: str, n_bytes: int) -> None: ...

    def notice(self, text: str) -> None: ...
