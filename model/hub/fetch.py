"""One file from the Hub: ranged GETs into a partial file, checked before it gets its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConnectionFault, DbrxError, ModelError, ResourceError
from .client import Hub, NoSuchFile
from .layout import Place, make_folder
from .listing import HubFile
from .partial import Partial, resumable
from .retry import AGAIN, RetryPolicy, Transient

WHOLE_TRIES = 3  # how often a file whose checksum is wrong is fetched from the start
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
LOCK_POLL_SECONDS = 0.2
Report = Callable[[str, int], None]  # path, bytes on disk


def fetch(
    hub: Hub, file: HubFile, place: Place, policy: RetryPolicy, report: Report, notice: Callable[[str], None]
) -> None:
    """Bring one file into its place, whole and checked, or raise.

    Safe against other processes that want the same file: a lock makes them wait, and where a file system's locks do
    not hold, each still writes a file of its own.
    """
    lock = place.lock(file)
    try:
        with _locked(lock, policy, lambda: notice(f"{file.path}: another process fetches it, waiting")):
            if not place.has_blob(file):
                partial = Partial(place, file, policy, notice, alone=_keeps_others_out(lock))
                try:
                    _fill(partial, hub, hub.file_url(file.path, place.commit), policy, report)
                    place.refuse(file)
                    partial.finish()
                finally:
                    partial.close()
            place.publish(file)
    except NoSuchFile as error:
        answer = error.message.partition(": ")[2]
        raise ModelError(
            f"{file.path}, which the listing of {hub.name} names, is not there: {answer}",
            "run the same command again later, or choose another --revision",
        ) from None
    except OSError as error:
        raise disk_fault(error, file, place) from None
    report(file.path, file.size)


def disk_fault(error: OSError, file: HubFile, place: Place) -> DbrxError:
    """What went wrong while a file was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full: {file.path} needs {file.size - resumable(place, file):,} more bytes in {place.root}",
            "free some space and run the same command again: it continues where this one stopped",
        )
    return DbrxError(f"{place.root}: {file.path} cannot be written: {error.strerror or type(error).__name__}")


def _fill(partial: Partial, hub: Hub, url: str, policy: RetryPolicy, report: Report) -> None:
    """Complete a partial file; a wrong checksum starts it again, a few times."""
    for _ in range(WHOLE_TRIES):
        while partial.size < partial.file.size:
            try:
                _receive(partial, hub, url, policy, report)
            except Transient as transient:
                if transient.restart:
                    partial.restart()
                policy.pause(transient)
        if partial.is_right():
            return
        partial.restart()
    raise ModelError(
        f"{partial.file.path} does not have the checksum that the Hub gives for it, {WHOLE_TRIES} times in a row",
        "try again later, or from another network: something between here and the Hub changes the bytes",
    )


def _receive(partial: Partial, hub: Hub, url: str, policy: RetryPolicy, report: Report) -> None:
    """One request for what is missing."""
    file = partial.file
    with hub.get(url, policy, partial.size) as response:
        _line_up(partial, response)
        report(file.path, partial.size)
        for chunk in response.iter_raw():
            policy.reached(partial.size + len(chunk))
            if partial.size + len(chunk) > file.size:
                raise _odd_answer(file, "more bytes than the Hub lists")
            partial.write(chunk)
            report(file.path, partial.size)
    if partial.size < file.size:
        raise Transient(ConnectionFault(f"the server ended {file.path} after {partial.size:,} bytes", AGAIN))


def _line_up(partial: Partial, response: Any) -> None:
    """Check that the answer begins where the partial file ends; a whole file (200) begins again."""
    if response.status_code == 200:
        if response.headers.get("content-length", str(partial.file.size)) != str(partial.file.size):
            raise Transient(ConnectionFault(f"the server sent something else for {partial.file.path}", AGAIN))
        if partial.size:
            partial.restart()
        return
    match = CONTENT_RANGE.match(response.headers.get("content-range", ""))
    if not match or int(match[1]) != partial.size or match[2] not in ("*", str(partial.file.size)):
        raise _odd_answer(partial.file, "another part of the file than was asked for")


def _odd_answer(file: HubFile, what: str) -> Transient:
    return Transient(ConnectionFault(f"the server sent {what} for {file.path}", AGAIN), restart=True)


@contextlib.contextmanager
def _locked(path: Path, policy: RetryPolicy, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock as all Hub clients do; while another process has it, wait for as long as it takes."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    make_folder(path.parent)
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            try:
                stack.enter_context(WeakFileLock(path, timeout=LOCK_POLL_SECONDS))
                break
            except TimeoutError:
                if attempt == 0:
                    waiting()
                policy.check_stop()
                policy.restart()
        policy.restart()
        yield


def _keeps_others_out(path: Path) -> bool:
    """Whether a lock that is held does lock: on some network file systems every caller gets it."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
