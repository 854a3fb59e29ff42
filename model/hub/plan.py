"""What a download would do: which files of which commit, what is there already, whether the disk has room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ..errors import ConnectionFault, InputError, ModelError, ResourceError
from .client import Hub
from .layout import CacheSnapshot, Place, matching, missing_files
from .listing import HubFile, is_safe
from .partial import resumable
from .plain_folder import PlainFolder
from .retry import RetryPolicy, run

T = TypeVar("T")

# Weights, configuration, tokenizer and the texts that belong to them; no code, no pickles.
CHECKPOINT_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.tiktoken", "LICENSE*", "README*")
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class DownloadPlan:
    """The files of one commit that are wanted, and how much of them is on disk."""

    name: str
    revision: str
    commit: str
    folder: Path  # what a program loads from, once all files are present
    files: tuple[HubFile, ...]
    listing: tuple[HubFile, ...] = field(repr=False)  # all files of the commit

    @property
    def total_bytes(self) -> int:
        """Size of all wanted files."""
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What has to be fetched, less what earlier attempts left."""
        return sum(file.size - file.done for file in self.files)


def plan_download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    patterns: Sequence[str] | None = None,
    to: Path | None = None,
    relist: bool = False,
) -> DownloadPlan:
    """Ask the Hub what `name` holds, and look what is there already; nothing is written.

    `patterns` None: what a DBRX checkpoint needs. A commit's listing never changes, so one that was kept is not asked
    for again where all that it names is here; `relist` asks all the same. Raises `AccessError`, `ModelError` (no such
    revision, no file that matches) or `ConnectionFault`.
    """
    check_name(name, revision)
    if is_offline():
        raise ConnectionFault(f"HF_HUB_OFFLINE is set, so {name} was not looked up on the Hub", "unset HF_HUB_OFFLINE")
    hub = Hub.connect(name, token)
    commit = _ask(lambda policy: hub.commit(revision or DEFAULT_REVISION, policy))
    place = place_of(name, commit, to)
    listing = None if relist else place.kept()
    files = _wanted(place, listing or [], patterns)
    # Only a listing that came true is believed: so one that was wrong costs a request, and does not stay for good.
    if not files or not all(file.present for file in files) or missing_files(place.root, patterns):
        told = _ask(lambda policy: hub.tree(commit, policy))
        if told != listing:
            listing, files = told, _wanted(place, told, patterns)
    if not files:
        raise ModelError(
            f"{name} holds no file that matches {', '.join(patterns or CHECKPOINT_PATTERNS)}",
            "choose a repository with safetensors weights",
        )
    return DownloadPlan(name, revision or DEFAULT_REVISION, commit, place.root, files, tuple(listing or ()))


def place_of(name: str, commit: str, to: Path | None) -> Place:
    """The shared cache, or a plain folder."""
    return CacheSnapshot(name, commit) if to is None else PlainFolder(Path(os.path.expanduser(to)), commit)


def check_disk(plan: DownloadPlan) -> None:
    """`ResourceError` if the disk has no room for what is missing."""
    folder = plan.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if plan.missing_bytes > free:
        raise ResourceError(
            f"{plan.name} needs {readable(plan.missing_bytes)} more on disk, {folder} has {readable(free)} free",
            "free some space, or choose another place: --to DIR, or set HF_HOME",
        )


def check_name(name: str, revision: str | None) -> None:
    """`ModelError` if `name` cannot be a Hub id, `InputError` if `revision` cannot be a revision."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        fits = name.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise ModelError(f"{name!r} is neither a folder nor a Hub id", "a Hub id looks like org/name")
    check_revision(revision)


def check_revision(revision: str | None) -> None:
    """`InputError` if `revision` cannot be one, None aside; an empty one is none."""
    if revision is not None and not is_safe(revision):
        raise InputError(f"{revision!r} cannot be a revision", "give a branch, a tag or a commit")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def readable(n_bytes: int) -> str:
    """Bytes in decimal units, as disks are sold and the Hub shows them."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _ask(question: Callable[[RetryPolicy], T]) -> T:
    """The answer to one question to the Hub, found in a worker thread."""
    answers: list[T] = []
    run([lambda policy: answers.append(question(policy))])
    return answers[0]


def _wanted(place: Place, listing: Sequence[HubFile], patterns: Sequence[str] | None) -> tuple[HubFile, ...]:
    """The files of a listing that match, and how much of each is on disk."""
    names = set(matching((file.path for file in listing), patterns or CHECKPOINT_PATTERNS))
    return tuple(_on_disk(place, file) for file in listing if file.path in names)


def _on_disk(place: Place, file: HubFile) -> HubFile:
    if place.holds(file) or place.has_blob(file):
        return replace(file, present=True, done=file.size)
    return replace(file, done=resumable(place, file))
