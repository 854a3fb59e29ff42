"""Compiled functions: found in a folder, or made once and kept there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from .call import Function, alone, beside
from .form import Form

LAST_LINES = 3  # of what a compiler says
FORM, LIBRARIES, SAID = "form.json", "libraries", "said"  # in the folder of a process that compiles


@dataclass(frozen=True)
class Compiler:
    """A folder of compiled functions, which are machine code: nobody else may write there.

    building: called before something is compiled, which takes a minute or two on two cores.
    """

    folder: Path
    building: Callable[[], object]

    def functions(self, form: Form) -> Mapping[str, Function]:
        """Those of a form, by name; `ModelError` where they cannot be made."""
        folders = [(part, self.folder / part.key) for part in form.parts()]
        missing = [(part, found) for part, found in folders if not found.is_dir()]
        if missing:
            self.building()
            self._build(missing)
        return {path.stem: _load(path) for _, found in folders for path in found.glob("*.so")}

    def _build(self, missing: Sequence[tuple[Form, Path]]) -> None:
        """Compile parts side by side: much of it is done on one core."""
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ModelError("--compile needs a C++ compiler, and there is none", "install g++, or leave out --compile")
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".building-") as scratch:
            builds = [(_start(part, Path(scratch, found.name)), found) for part, found in missing]
            try:
                for process, found in builds:
                    if process.wait():
                        said = Path(scratch, found.name, SAID).read_text("utf-8", "replace").strip().splitlines()
                        raise ModelError(
                            f"the decode step cannot be compiled: {'; '.join(said[-LAST_LINES:])}",
                            "leave out --compile",
                        )
            finally:
                for process, _ in builds:
                    process.kill()
                    process.wait()
            for _, found in builds:
                with contextlib.suppress(OSError):  # another process was quicker
                    Path(scratch, found.name, LIBRARIES).rename(found)


def _start(part: Form, folder: Path) -> subprocess.Popen[bytes]:
    """A process that compiles a part, in a folder of its own."""
    (folder / LIBRARIES).mkdir(parents=True)
    (folder / FORM).write_text(json.dumps(part.to_dict()), "utf-8")
    here = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    with (folder / FORM).open("rb") as form, (folder / SAID).open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "model.compiled.build", str(folder / LIBRARIES)],
            stdin=form,
            stdout=said,
            stderr=said,
            env=os.environ
            | {"PYTHONPATH": here, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
            | {"AOT_INDUCTOR_ENABLE_LINE_TABLES": "0"},  # three quarters of a package
        )


def _load(path: Path) -> Function:
    try:
        return beside(path) if path.stem == "expert" else alone(path)
    except (OSError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path.parent}: compiled functions cannot be loaded: {str(error).strip().splitlines()[0]}",
            f"rm -r '{path.parent}'",
        ) from None
