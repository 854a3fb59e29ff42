"""The name that a user gave -> the folder to load from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import AccessError, ConnectionFault, ModelError
from ..formats.locate import locate
from ..formats.ollama import PREFIX, manifest_of
from .download import cached, download
from .plan import is_offline
from .progress import Progress, Silent


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    patterns: Sequence[str] | None = None,
    progress: Progress | None = None,
    download: bool = True,
) -> Path:
    """The folder of a checkpoint or its GGUF file: by a local path, ollama's name, or a Hub id's snapshot in the cache.

    With `download`, the Hub is asked and what is missing is fetched; if it cannot be reached or refuses, a complete
    cached snapshot is used and that is announced. Without, nothing touches the network, and a `ModelError` says
    what is missing and what to type. Raises what `download()` raises.
    """
    local = Path(os.path.expanduser(name_or_path))
    if os.path.exists(local):  # False for a name that is too long, or has a NUL
        return locate(local)
    name = str(name_or_path)
    if name.startswith(PREFIX) and (manifest := manifest_of(name)):
        return manifest.weights
    if isinstance(name_or_path, Path) or _is_path(name):
        raise ModelError(f"{name} does not exist", "give the folder of a checkpoint or a Hub id (org/name)")
    if not download or is_offline():
        return locate(cached(name, revision, patterns))
    return _newest(name, revision, token, patterns, progress or Silent())


def _newest(
    name: str, revision: str | None, token: str | bool | None, patterns: Sequence[str] | None, progress: Progress
) -> Path:
    try:
        return download(name, revision=revision, token=token, patterns=patterns, progress=progress)
    except (ConnectionFault, AccessError) as fault:
        try:
            folder = cached(name, revision, patterns)
        except ModelError:
            raise fault from None
        progress.notice(f"{fault.message}; using the copy from an earlier download (commit {folder.name[:12]})")
        return folder


def _is_path(name: str) -> bool:
    separators = name.count("/") + (name.count(os.altsep) if os.altsep else 0)
    return name.startswith((".", "/", "~")) or separators > 1 or name.endswith(".gguf")
