"""Whose hands a file went through: native libraries, caches and settings are used only if nobody else can have
written them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def untrusted(path: Path) -> str | None:
    """Why a file must not be used, or None: it and its folder are no links, and only their owner writes there.

    The owner is root, this user, or whoever owns the program's own files. A file that is not there is as its folder.
    """
    owners = {0, os.geteuid(), os.stat(__file__).st_uid}
    for part, kind, is_kind in ((path.parent, "folder", stat.S_ISDIR), (path, "file", stat.S_ISREG)):
        try:
            found = os.lstat(part)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(found.st_mode):
            return f"{part} is a link, which is not followed"
        if not is_kind(found.st_mode):
            return f"{part} is no plain {kind}"
        if found.st_uid not in owners:
            return f"{part} belongs to another user"
        if found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _alone(found)):
            return f"others can write to {part}"
    return None


def _alone(found: os.stat_result) -> bool:
    """Whether a group that may write is the owner's own, as systems with a umask of 002 give each user one."""
    import grp
    import pwd

    try:
        group, owner = grp.getgrgid(found.st_gid), pwd.getpwuid(found.st_uid)
    except KeyError:
        return False
    return owner.pw_gid == group.gr_gid and group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name}
