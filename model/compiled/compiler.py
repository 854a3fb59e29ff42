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
from typing import cast

import torch
from torch import Tensor

from ..errors import ModelError
from .form import Form

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # what the arguments hold, one tensor after the other
LAST_LINES = 3  # of what a compiler says


@dataclass(frozen=True)
class Compiler:
    """A folder of compiled functions, which are machine code: nobody else may write there.

    building: called before something is compiled, which takes about a minute on two cores.
    """

    folder: Path
    building: Callable[[], object]

    def functions(self, form: Form) -> Mapping[str, Function]:
        """Those of a form, by name; `ModelError` where they cannot be made."""
        folders = [(part, self.folder / part.key) for part in form.parts()]
        missing = [(part, found) for part, found in folders if not found.is_dir()]
        if missing:
            self.building()
        for part, found in missing:
            self._build(part, found)
        return {path.stem: _load(path) for _, found in folders for path in found.glob("*.pt2")}

    def _build(self, form: Form, found: Path) -> None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ModelError("--compile needs a C++ compiler, and there is none", "install g++, or leave out --compile")
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".building-") as scratch:
            packages = Path(scratch) / "packages"
            packages.mkdir()
            here = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
            made = subprocess.run(
                [sys.executable, "-P", "-m", "model.compiled.build", str(packages)],
                input=json.dumps(form.to_dict()),
                env={**os.environ, "PYTHONPATH": here, "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor")},
                capture_output=True,
                text=True,
            )
            if made.returncode:
                said = "; ".join(made.stderr.strip().splitlines()[-LAST_LINES:])
                raise ModelError(f"the decode step cannot be compiled: {said}", "leave out --compile")
            with contextlib.suppress(OSError):  # another process was quicker
                packages.rename(found)


def _load(path: Path) -> Function:
    """Without `torch._inductor.aoti_load_package`, which imports PyTorch's compiler: a second."""
    try:
        package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise ModelError(
            f"{path.parent}: compiled functions cannot be loaded: {str(error).strip().splitlines()[0]}",
            f"rm -r '{path.parent}'",
        ) from None
    return cast("Function", package.run)
