"""The native kernels around their sources: what is built, which library is loaded, and what is refused."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dbrx_cli import doctor
from model import native
from model.errors import DbrxError
from model.native import abi, build
from model.native.tensors import Experts, address, matrix
from model.trust import untrusted
from tests import make_native_vectors

BUILT = [path.stem.removeprefix("dbrx-") for path in sorted(build.LIB.glob("dbrx-*.so"))]
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
needs_library = pytest.mark.skipif(not BUILT, reason="needs native kernels: python -m model.native")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for libraries, in which there are none yet."""
    found = tmp_path / "lib"
    found.mkdir(mode=0o755)
    monkeypatch.setattr(native, "LIB", found)
    monkeypatch.delenv(native.FORCED, raising=False)
    native._load.cache_clear()
    yield found
    native._load.cache_clear()


@needs_compiler
def test_structs_lie_in_memory_as_the_header_says(tmp_path: Path) -> None:
    printed, wanted = [], []
    for struct in abi.STRUCTS:
        name = "dbrx_" + struct.__name__.lower()
        printed.append(f'std::printf("%zu\\n", sizeof({name}));')
        wanted.append(ctypes.sizeof(struct))
        for field, *_ in struct._fields_:
            member = f"(({name} *)0)->{field}"
            printed.append(f'std::printf("%zu %zu\\n", offsetof({name}, {field}), sizeof({member}));')
            wanted += [getattr(struct, field).offset, getattr(struct, field).size]
    source = "\n".join(("#include <cstddef>", "#include <cstdio>", '#include "dbrx.h"', "int main() {", *printed, "}"))
    (tmp_path / "sizes.cpp").write_text(source)
    command = [*(build.compiler() or []), f"-I{build.SRC}", str(tmp_path / "sizes.cpp"), "-o", str(tmp_path / "sizes")]
    subprocess.run(command, check=True)
    said = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    assert list(map(int, said.split())) == wanted


def test_functions_take_what_the_header_says() -> None:
    header = re.sub(r"//.*", "", (build.SRC / "dbrx.h").read_text())
    found = re.findall(r"^([\w *]+?)\b(dbrx_\w+)\(([^)]*)\);", header, re.MULTILINE)
    kinds = {"int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    assert {name for _, name, _ in found} == {*abi.ANSWERS, *abi.CALLS}
    for result, name, arguments in found:
        taken = abi.CALLS[name] if name in abi.CALLS else abi.ANSWERS[name][1:]
        wanted = [argument.strip() for argument in arguments.split(",") if argument.strip() != "void"]
        assert len(taken) == len(wanted), name
        for kind, argument in zip(taken, wanted, strict=True):
            if "*" in argument:
                pointed = re.search(r"dbrx_(matrix|expert|block|kv|counters)\b", argument)
                if pointed:
                    assert kind._type_.__name__.lower() == pointed[1], (name, argument)
                else:
                    assert kind in (ctypes.c_void_p, ctypes.c_char_p), (name, argument)
            else:
                assert kind is kinds[argument.split()[0]], (name, argument)
        assert name in abi.ANSWERS or result.strip() == "int"
    numbers = dict(re.findall(r"#define (DBRX_\w+)\s+(\d+)", header))
    assert (numbers["DBRX_ABI"], numbers["DBRX_GEMV_MAX_ROWS"]) == (str(abi.ABI), str(abi.GEMV_MAX_ROWS))
    values = dict(re.findall(r"DBRX_(\w+) = (\d+)", header))
    enums = abi.Format, abi.Activation, abi.Ranges
    assert values == {name: str(int(member)) for enum in enums for name, member in enum.__members__.items()}


def test_the_recorded_answers_are_what_numpy_finds() -> None:
    """Words that differ are floats that differ in their last digits: numpy may use another library elsewhere."""
    kept = np.fromfile(make_native_vectors.PATH, np.int32)
    made = np.frombuffer(b"".join(make_native_vectors.cases()), np.int32)
    assert len(kept) == len(made) and make_native_vectors.PATH.stat().st_size < 250_000
    differ = kept != made
    np.testing.assert_allclose(kept[differ].view(np.float32), made[differ].view(np.float32), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", BUILT)
def test_the_driver(name: str) -> None:
    plan = build.Plan(tuple(build.compiler() or ()), build.LIB, ("-O1",), "")
    plan.driver()
    library = build.LIB / f"dbrx-{name}.so"
    done = subprocess.run([build.LIB / "driver", library, native.VECTORS], capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 77), done.stdout + done.stderr
    assert done.stdout.startswith(name)


@needs_library
def test_the_best_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.FORCED, raising=False)
    found = native.status()
    assert found.variant in BUILT and found.faults == () and native.why_not() is None
    library = native.library()
    assert library is not None and library.dbrx_variant().decode() == found.variant
    pool = native.pool(2)
    assert pool is native.pool(2) and pool.counters(1).barriers >= 0
    with pytest.raises(ValueError, match="no such thread"):
        pool.counters(2)
    with pytest.raises(ValueError):
        native.pool(0)


@needs_library
def test_a_library_that_computes_wrong_numbers_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(build.LIB / f"dbrx-{BUILT[-1]}.so", folder)
    assert native.status().variant == BUILT[-1]
    vectors = bytearray(native.VECTORS.read_bytes())
    vectors[-2] ^= 0x40
    (tmp_path / "vectors.bin").write_bytes(vectors)
    monkeypatch.setattr(native, "VECTORS", tmp_path / "vectors.bin")
    native._load.cache_clear()
    assert native.library() is None
    assert "computes wrong numbers here" in (native.why_not() or "") and native.status().faults
    (check,) = doctor.native_kernels()
    assert "wrong numbers" in check.text and "-m model.native" in (check.hint or "")


@needs_library
def test_a_library_that_fails_here_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong numbers or a crash: the build asks each library in a process of its own."""
    library = build.LIB / f"dbrx-{BUILT[0]}.so"
    assert build._answers(library)
    recorded = bytearray(build.VECTORS.read_bytes())
    recorded[-2] ^= 0x40
    monkeypatch.setattr(build, "VECTORS", tmp_path / "vectors.bin")
    build.VECTORS.write_bytes(recorded)
    assert not build._answers(library)
    monkeypatch.setattr(build, "ANSWERS", "import os; os.abort()")
    assert not build._answers(library)


def test_what_is_no_library_is_passed_over(folder: Path) -> None:
    (folder / "dbrx-plain.so").write_bytes(b"no library")
    (folder / "dbrx-plain.so").chmod(0o644)
    assert native.library() is None and "cannot be loaded" in (native.why_not() or "")


@pytest.mark.parametrize("value", ["none", "sse9", "plain"])
def test_a_variant_can_be_forced(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(native.FORCED, value)
    if value == "none":
        assert native.library() is None and native.status().hint == "unset DBRX_NATIVE"
        return
    with pytest.raises(DbrxError, match=value) as raised:
        native.library()
    assert raised.value.hint and raised.value.exit_code == (2 if value == "sse9" else 3)


def test_only_files_of_the_owner_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    library = folder / "dbrx-plain.so"
    library.touch(0o644)
    assert untrusted(library) is None
    for path in (library, folder):
        for mode in (0o777, 0o757):
            path.chmod(mode)
            assert "others can write" in (untrusted(library) or "")
        path.chmod(0o755)
    os.link(library, folder / "dbrx-avx2.so")
    assert untrusted(folder / "dbrx-avx2.so") is None  # as uv installs files
    (folder / "dbrx-neon.so").symlink_to(library)
    assert "link" in (untrusted(folder / "dbrx-neon.so") or "")
    (tmp_path / "other").symlink_to(folder)
    assert "link" in (untrusted(tmp_path / "other" / "dbrx-plain.so") or "")
    os.mkfifo(folder / "dbrx-pipe.so")
    assert "no plain file" in (untrusted(folder / "dbrx-pipe.so") or "")
    real = os.lstat

    def of_another(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result((*found[:4], 4712, *found[5:]))

    monkeypatch.setattr("model.trust.os.lstat", of_another)
    assert "another user" in (untrusted(library) or "")


def test_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    environment = {**os.environ, "PATH": str(folder)}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(build.HERE)!r}); import build, pathlib;"
               f"build.LIB = pathlib.Path({str(folder)!r}); sys.exit(not build.build())"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    (line,) = done.stdout.splitlines()
    assert done.returncode == 0 and "no C++ compiler" in line and list(folder.iterdir()) == []
    monkeypatch.setenv("PATH", str(folder))
    (check,) = doctor.native_kernels()
    assert check.state == "note" and "slower" in check.text and "install a C++ compiler" in (check.hint or "")


@needs_compiler
def test_a_source_that_does_not_compile_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "broken.cpp").write_text("int broken( {\n")
    monkeypatch.setattr(build, "SRC", tmp_path / "src")
    plan = build.Plan(tuple(build.compiler() or ()), folder, build.RELEASE, "")
    with pytest.raises(build.BuildError, match=r"broken\.cpp:1"):
        plan.library("plain", build.Variant())
    assert list(folder.iterdir()) == []
    (tmp_path / "src" / "broken.cpp").write_text('extern "C" int whole() { return 0; }\n')
    assert plan.library("plain", build.Variant()).startswith("built in")
    assert plan.library("plain", build.Variant()) == "is up to date"
    (tmp_path / "src" / "more.h").touch()
    assert plan.library("plain", build.Variant()).startswith("built in")


def test_tensors_are_checked_before_their_addresses_are_taken() -> None:
    floats, whole, odd = torch.ones(6, 64), torch.ones(6, 64, dtype=torch.int8), torch.ones(6, 32, dtype=torch.uint8)
    scale, parts = torch.ones(6), torch.ones(6, 2, dtype=torch.bfloat16)
    assert matrix(floats).inputs == 64 and matrix(floats, transposed=True).inputs == 6
    assert matrix(whole, scale).format == abi.Format.INT8
    packed = matrix(odd, parts, parts, group=32)
    assert (packed.format, packed.outputs, packed.inputs) == (abi.Format.INT4, 6, 64)
    wrong = [
        lambda: matrix(floats[0]),
        lambda: matrix(floats.double()),
        lambda: matrix(floats.t()),
        lambda: matrix(floats[:, ::2]),
        lambda: matrix(floats[:0]),
        lambda: matrix(floats, scale),
        lambda: matrix(floats.to("meta")),
        lambda: matrix(whole),
        lambda: matrix(whole, scale[:5]),
        lambda: matrix(whole, scale.double()),
        lambda: matrix(whole, scale, transposed=True),
        lambda: matrix(odd, parts, parts),
        lambda: matrix(odd, parts, parts, group=48),
        lambda: matrix(odd, parts, parts, group=64),
        lambda: matrix(odd, parts, None, group=32),
        lambda: matrix(odd, parts.float(), parts, group=32),
        lambda: address(torch.ones(9, dtype=torch.uint8)[1:].view(torch.uint8), torch.uint8, 9),
        lambda: address(torch.frombuffer(bytearray(9), dtype=torch.float32, offset=1), torch.float32, 2),
        lambda: Experts([]),
        lambda: Experts([(matrix(floats), matrix(floats), matrix(floats))]),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()
    w2 = torch.ones(64, 6)
    assert len(Experts([(matrix(floats), matrix(floats), matrix(w2))])) == 1


def test_doctor_finds_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path))
    assert "old cache" not in {check.name for check in doctor.folders()}
    (tmp_path / "compiled" / "one").mkdir(parents=True)
    (tmp_path / "compiled" / "one" / "expert.so").write_bytes(bytes(3_000_000))
    check = next(check for check in doctor.folders() if check.name == "old cache")
    assert "3.0 MB" in check.text and check.hint == f"rm -r {tmp_path / 'compiled'}"
