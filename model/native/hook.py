"""The build hook of `pip install` and of wheels: builds the native kernels, and has a wheel carry them.

A wheel with libraries is for this platform only; one without, made where there is no compiler, is for all.
DBRX_NATIVE_BUILD=all builds all variants of the architecture (`make wheel`), instead of this processor's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface[Any]):  # type: ignore[misc]  # hatchling is there while a wheel is built
    """Runs before the files of a wheel are collected, and before an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root, "model", "native")
        everything = ["--all"] if os.environ.get("DBRX_NATIVE_BUILD") == "all" else []
        done = subprocess.run([sys.executable, str(folder / "build.py"), *everything], check=False)
        if done.returncode and everything:
            raise RuntimeError("a wheel for others carries all variants, and not all could be built (see above)")
        if version != "editable" and any(folder.glob("lib/dbrx-*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
