"""A whole checkpoint from the Hub: all files of one commit, several at a time."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..errors import InputError, ModelError
from .client import Hub
from .fetch import disk_fault, fetch
from .layout import (
    CacheSnapshot,
    Place,
    cached_commit,
    make_folder,
    missing_files,
    tree_of,
    write_ref,
    write_tree,
)
from .listing import HubFile
from .partial import sweep
from .plain_folder import CHANGED, DAMAGED, PlainFolder
from .plan import DEFAULT_REVISION, DownloadPlan, check_disk, check_name, is_offline, place_of, plan_download
from .progress import Progress, Silent
from .retry import RetryPolicy, run
from .verify import remove, verify_cached

READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM)
ROUNDS = 3  # how often a file is fetched that another program removes while others come


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    to: Path | None = None,
    patterns: Sequence[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    workers: int = 4,
) -> Path:
    """Bring the files of a Hub repository that match `patterns` here, and return their folder.

    Into the shared cache, or as plain files into `to`. Continues where an earlier attempt stopped, in whichever
    process. Each fetched file is checked against its checksum; `verify` checks those that were there before, too,
    removes the damaged ones and names them in a `ModelError`. Raises also `InputError` (a file of the user's own would
    be replaced), `AccessError`, `ResourceError` (disk), `ConnectionFault`; Ctrl-C stops within a second and keeps what
    came. Offline: what the cache or `to` has.
    """
    progress = progress or Silent()
    if is_offline():
        folder = _offline(name, revision, patterns, to, progress)
    else:
        plan = plan_download(name, revision=revision, token=token, patterns=patterns, to=to, relist=verify)
        place, folder = place_of(name, plan.commit, to), plan.folder
        _keep_own_files(plan, place, verify, progress)
        check_disk(plan)
        _carry_out(plan, place, Hub.connect(name, token), progress, workers)
        if patterns is None:
            _check_whole(plan)
    if verify:
        _verify(folder, progress)
    return folder


def cached(name: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    """The complete snapshot in the cache, without network; `ModelError` says what is missing and what to type."""
    check_name(name, revision)
    command = f"dbrx download {name}" + (f" --revision {revision}" if revision else "")
    if is_offline():
        command = f"unset HF_HUB_OFFLINE, then: {command}"
    commit = cached_commit(name, revision or DEFAULT_REVISION)
    folder = CacheSnapshot(name, commit).root if commit else None
    if folder is None or not folder.is_dir():
        which = f"{name} (revision {revision})" if revision else name
        raise ModelError(f"{which} is not on this machine", f"to fetch it: {command}")
    missing = missing_files(folder, patterns)
    if missing:
        raise ModelError(
            f"{name} is not complete on this machine: {shortened(missing)} missing", f"to continue: {command}"
        )
    return folder


def _offline(
    name: str, revision: str | None, patterns: Sequence[str] | None, to: Path | None, progress: Progress
) -> Path:
    """What is here already: in the plain folder `to`, or in the cache."""
    check_name(name, revision)
    plain = Path(os.path.expanduser(to)) if to is not None else None
    if plain is not None and _holds_download(plain, revision, patterns):
        progress.notice(f"HF_HUB_OFFLINE is set: {name} was not looked up on the Hub, what {to} holds is used")
        return plain
    folder = cached(name, revision, patterns)
    if to is not None:
        raise InputError(
            f"HF_HUB_OFFLINE is set: nothing is fetched into {to}",
            f"unset it, or copy what the cache has: cp -rL {shlex.quote(f'{folder}/.')} {shlex.quote(str(to))}",
        )
    progress.notice(f"HF_HUB_OFFLINE is set: {name} was not looked up on the Hub, the cached files are used")
    return folder


def _holds_download(folder: Path, revision: str | None, patterns: Sequence[str] | None) -> bool:
    """Whether a plain folder holds a whole download; its notes say of which commit, and not of which repository."""
    kept = tree_of(folder) if revision is None else PlainFolder(folder, revision).kept()
    return kept is not None and not missing_files(folder, patterns)


def _carry_out(plan: DownloadPlan, place: Place, hub: Hub, progress: Progress, workers: int) -> None:
    """Fetch what is missing; the branch or tag points to the commit once all of it is there."""
    on_disk = {file.path: file.done for file in plan.files}  # each key is written by one worker at a time
    told = dict(on_disk)
    begun: list[HubFile] = []
    notices: list[str] = []

    def job(file: HubFile, policy: RetryPolicy) -> None:
        begun.append(file)
        fetch(hub, file, place, policy, on_disk.__setitem__, notices.append)

    def tick() -> None:
        while begun:
            file = begun.pop(0)
            progress.file(file.path, file.size, told[file.path])
        while notices:
            progress.notice(notices.pop(0))
        for path, done in list(on_disk.items()):
            if done != told[path]:
                progress.advance(path, done - told[path])
                told[path] = done

    _publish_present(plan, place)
    progress.start(plan.total_bytes, sum(told.values()), len(plan.files))
    for round_ in itertools.count():
        missing = [file for file in plan.files if not place.holds(file)]
        if not missing:
            break
        if round_ == ROUNDS:
            raise ModelError(f"another program keeps removing {missing[0].path}", "run the same command again later")
        if round_:
            progress.notice(f"another program removed {missing[0].path} meanwhile: it is fetched again")
        _note_commit(plan, place, first=True)
        # Small files first: a wrong repository or a refused access shows before the shards begin.
        jobs: list[Callable[[RetryPolicy], None]] = [
            partial(job, file) for file in sorted(missing, key=lambda file: file.sha256 is not None)
        ]
        try:
            run(jobs, workers, tick)
        finally:
            tick()
    _note_commit(plan, place, first=False)
    sweep(place, plan.files)


def _keep_own_files(plan: DownloadPlan, place: Place, verify: bool, progress: Progress) -> None:
    """`InputError` before the first byte if a file of the user's own would be replaced.

    A damaged copy is set aside, and with `verify` also what was changed since it was downloaded.
    """
    gives_way = {DAMAGED, CHANGED} if verify else {DAMAGED}
    changed: list[HubFile] = []
    for file in (file for file in plan.files if not file.present):
        if isinstance(place, PlainFolder) and place.in_the_way(file) in gives_way:
            changed.append(file)
        else:
            place.refuse(file)
    for file in changed:
        assert isinstance(place, PlainFolder)
        try:
            aside = place.set_aside(file)
        except OSError as error:
            raise disk_fault(error, file, place) from None
        progress.notice(f"{file.path} is not what the Hub has: kept as {aside.name}, and fetched anew")


def _check_whole(plan: DownloadPlan) -> None:
    """`ModelError` if what the Hub lists is no whole checkpoint, or less than its index names."""
    missing = missing_files(plan.folder)
    if missing:
        hint = "run the same command again later, or choose another --revision"
        if any(file.path.endswith(".gguf") for file in plan.listing):
            hint = f"it holds GGUF files, which are chosen by name: hf download {plan.name} FILE.gguf"
        raise ModelError(f"{plan.name} is not complete on the Hub: {shortened(missing)} missing", hint)


def shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _publish_present(plan: DownloadPlan, place: Place) -> None:
    """Name and note the files that are here already, so that they need no look at their bytes again."""
    for file in (file for file in plan.files if file.present):
        try:
            place.publish(file)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise disk_fault(error, file, place) from None


def _note_commit(plan: DownloadPlan, place: Place, first: bool) -> None:
    """Keep the listing and the ref. An older complete snapshot stays the one in use until the new one is complete."""
    try:
        if place.kept() != list(plan.listing):
            write_tree(place.tree_path, plan.listing)
        if isinstance(place, CacheSnapshot) and not (first and cached_commit(plan.name, plan.revision)):
            make_folder(place.root)
            if cached_commit(plan.name, plan.revision) != plan.commit:
                write_ref(place.storage, plan.revision, plan.commit)
    except OSError as error:
        if first or error.errno not in READ_ONLY:  # a cache that is only read is fine
            raise disk_fault(error, plan.files[0], place) from None


def _verify(folder: Path, progress: Progress) -> None:
    problems = verify_cached(folder, progress)
    for problem in problems:
        remove(folder, problem)
    if problems:
        raise ModelError(
            f"{len(problems)} damaged file{'s' * (len(problems) > 1)} in {folder}, now removed: "
            + "; ".join(map(str, problems)),
            "run the same command again: it fetches them anew",
        )
