"""Builds the native kernels with this machine's C++ compiler: one library for each set of instructions, side by side.

    python -m model.native [--all] [--sanitize address|undefined|thread] [--target aarch64]

Only the standard library is used: a build runs before anything is installed. Without a compiler there is nothing to
build, and that is no fault: the program then computes with PyTorch's kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SRC, LIB, DRIVER = HERE / "src", HERE / "lib", HERE / "tests" / "driver.cpp"
VECTORS = HERE / "vectors.bin"
COMPILERS = ("c++", "g++", "clang++")
LAST_LINES = 3  # of what a compiler says
PATIENCE = 1800  # seconds for one library, which takes 25 to 45 where nothing else runs
TARGETS = {"aarch64": "aarch64-linux-gnu-g++"}  # cross compilers, as Debian names them
SANITIZERS = ("address", "undefined", "thread")

COMMON = ("-std=c++20", "-Wall", "-Wextra", "-pthread", "-ffp-contract=off")
LIBRARY = ("-fPIC", "-shared", "-fvisibility=hidden")
RELEASE = ("-s",)
# Behind those of a variant: optimized, a sanitizer finds no more, and takes three times as long to compile.
SANITIZED = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")


ANSWERS = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if library.dbrx_runs_here():
    library.dbrx_pool_create.restype = ctypes.c_void_p
    with open(sys.argv[2], "rb") as file:
        vectors = file.read()
    size, said, room = ctypes.c_int64(len(vectors)), ctypes.create_string_buffer(200), ctypes.c_int64(200)
    sys.exit(library.dbrx_replay(ctypes.c_void_p(library.dbrx_pool_create(2)), vectors, size, said, room))
"""


@dataclass(frozen=True)
class Variant:
    """A set of instructions: how to compile for it, and what a compiler defines on a processor that has it."""

    flags: tuple[str, ...] = ()
    macros: tuple[str, ...] = ()


_AVX2 = ("-O3", "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16")))
# The best first; a plain one runs everywhere, and is rarely used: -O2 takes half the time to compile.
_PLAIN = Variant(("-O2",))
VARIANTS: dict[str, dict[str, Variant]] = {
    "x86_64": {
        "avx512": Variant(_AVX512, tuple(f"__AVX512{part}__" for part in ("F", "BW", "VL", "DQ", "VNNI", "BF16"))),
        "avx2": Variant(_AVX2, ("__AVX2__", "__FMA__", "__F16C__")),
        "plain": _PLAIN,
    },
    "aarch64": {
        "neon": Variant(("-O3", "-march=armv8.2-a+dotprod"), ("__ARM_FEATURE_DOTPROD",)),
        "plain": _PLAIN,
    },
}
OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """Why something was not built, in a line."""


def architecture() -> str:
    """This machine's: x86_64, aarch64, or another, for which there is a plain library only."""
    machine = platform.machine().lower()
    return OTHER_NAMES.get(machine, machine)


def variants(arch: str) -> dict[str, Variant]:
    return VARIANTS.get(arch, {"plain": _PLAIN})


def compiler() -> list[str] | None:
    """CXX, which may have arguments, else the first compiler there is."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in ((given[0],) if given else COMPILERS) if shutil.which(name)), None)
    return [found, *given[1:]] if found else None


def for_this_processor(command: Sequence[str]) -> list[str]:
    """The variants for this processor, as the compiler sees it, the best first: if one fails, the next computes."""
    arch = architecture()
    asked = ("-mcpu=native", "-march=native") if arch == "aarch64" else ("-march=native",)
    for native in asked:
        said = _run([*command, native, "-dM", "-E", "-x", "c++", os.devnull])
        if said.returncode == 0:
            defined = {line.split()[1] for line in said.stdout.splitlines() if line.startswith("#define ")}
            return [name for name, variant in variants(arch).items() if defined.issuperset(variant.macros)]
    return ["plain"]


@dataclass(frozen=True)
class Plan:
    """What is compiled, with what, and where it goes."""

    command: tuple[str, ...]
    folder: Path
    kind: tuple[str, ...]  # flags of a release, or of a sanitizer
    version: str  # of the compiler

    def library(self, name: str, variant: Variant) -> str:
        """Build a variant's library; returns what happened, in words."""
        sources = sorted(SRC.glob("*.cpp"))
        return self._make(f"dbrx-{name}.so", (*LIBRARY, *self._static(), *variant.flags), sources)

    def driver(self) -> str:
        """Build the program that replays recorded vectors through a library."""
        return self._make("driver", (), [DRIVER], ("-ldl",))

    def _static(self) -> tuple[str, ...]:
        """Libraries carry their C++ runtime, so that they run beside any other; sanitizers bring their own."""
        on_linux = platform.system() == "Linux" and self.kind == RELEASE
        return ("-static-libstdc++", "-static-libgcc") if on_linux else ()

    def _make(self, name: str, flags: tuple[str, ...], sources: list[Path], behind: tuple[str, ...] = ()) -> str:
        """Compile, unless what is there was made of the same sources in the same way."""
        target, mark = self.folder / name, self.folder / f"{name}.made-of"
        arguments = [*self.command, *COMMON, *flags, *self.kind, f"-I{SRC}", *map(str, sources), *behind]
        made_of = _digest(sources, arguments, self.version)
        if target.is_file() and mark.is_file() and mark.read_text() == made_of:
            return "is up to date"
        started = time.monotonic()
        scratch = target.with_name(f".{name}.{os.getpid()}")
        try:
            said = _run([*arguments[: -len(behind) or None], "-o", str(scratch), *behind])
            if said.returncode:
                lines = [line for line in said.stderr.splitlines() if "error" in line] or said.stderr.splitlines()
                raise BuildError("; ".join(lines[:LAST_LINES]) or f"the compiler ended with {said.returncode}")
            scratch.chmod(0o755)  # whatever the umask is: a library that others can write is not loaded
            mark.unlink(missing_ok=True)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
        mark.write_text(made_of)
        return f"built in {time.monotonic() - started:.0f} s"


def build(everything: bool = False, sanitize: str | None = None, target: str | None = None) -> bool:
    """Build what is asked for and say so, a line each; false if something could not be built.

    everything: all variants of the architecture, for a wheel, instead of this processor's and the plain one.
    sanitize, target: libraries and the driver of their tests, in folders of their own.
    """
    arch = target or architecture()
    folder = LIB.joinpath(*filter(None, (target, sanitize)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in (LIB, folder):
        made.chmod(0o755)
    command = [TARGETS[target]] if target else compiler()
    if command is None or not shutil.which(command[0]):
        _say(f"no C++ compiler ({', '.join(command[:1] if command else COMPILERS)}), so none are built")
        return target is None and sanitize is None
    kind = (*SANITIZED, f"-fsanitize={sanitize}") if sanitize else RELEASE
    plan = Plan(tuple(command), folder, kind, _run([*command, "--version"]).stdout)
    names = list(variants(arch)) if everything or target else for_this_processor(command)
    for old in folder.glob("dbrx-*.so*"):  # of other sources: not to be loaded, nor carried by a wheel
        if old.name.split(".")[0].removeprefix("dbrx-") not in names:
            old.unlink()

    def one(name: str) -> bool:
        try:
            done = plan.driver() if name == "driver" else plan.library(name, variants(arch)[name])
        except BuildError as error:
            _say(f"{name} cannot be built: {error}")
            return False
        if not (sanitize or target) and not _answers(folder / f"dbrx-{name}.so"):
            (folder / f"dbrx-{name}.so").unlink()
            done = "fails on this processor, and is left out"
        _say(f"{name} {done}")
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(list(pool.map(one, names + ["driver"] * bool(sanitize or target))))


def _answers(library: Path) -> bool:
    """Whether it computes the recorded answers, in a process of its own, or is for other processors."""
    return _run([sys.executable, "-P", "-c", ANSWERS, str(library), str(VECTORS)]).returncode == 0


def _digest(sources: Sequence[Path], arguments: Sequence[str], version: str) -> str:
    """Of all that a library is made of."""
    digest = hashlib.sha256("\0".join((*arguments, version)).replace(str(HERE), "").encode())
    for path in sorted({*sources, *SRC.rglob("*.h")}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"error: {command[0]} took more than {PATIENCE} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {error}")


def _say(text: str) -> None:
    print(f"native kernels: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model.native", description="Build the native kernels.")
    parser.add_argument("--all", action="store_true", help="all variants of this architecture, as for a wheel")
    parser.add_argument("--sanitize", choices=SANITIZERS, help="with this sanitizer, and the driver of the tests")
    parser.add_argument("--target", choices=TARGETS, help="for another architecture, and the driver of the tests")
    given = parser.parse_args()
    return 0 if build(given.all, given.sanitize, given.target) else 1


if __name__ == "__main__":
    sys.exit(main())
