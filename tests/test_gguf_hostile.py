"""Hostile and damaged GGUF files: refused with one line that names the file; nothing hangs, grows or crashes."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.errors import ModelError
from model.formats import open_weights
from model.formats.gguf_file import MAX_HEADER, open_gguf
from model.tokenizer import Tokenizer
from tests.gguf_files import write_gguf

torch.set_num_threads(1)

STRING, ARRAY, U32 = 8, 9, 4
PAIR = ("general.architecture", STRING, struct.pack("<Q", 4) + b"dbrx")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str = "t", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(256),
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file from its parts; `counts` of tensors and pairs may lie."""
    pairs = [pair(*PAIR)] if pairs is None else pairs
    tensors = [tensor()] if tensors is None else tensors
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "four_bytes": (b"GGUF", "too short"),
    "other_magic": (raw(magic=b"GGML"), "is not a GGUF file"),
    "version_1": (raw(version=1), "GGUF version 1"),
    "version_9": (raw(version=9), "GGUF version 9"),
    "big_endian": (raw(version=3 << 24), "big-endian"),
    "many_tensors": (raw(counts=(2**60, 1)), "claims"),
    "many_pairs": (raw(counts=(1, 2**63)), "claims"),
    "one_pair_too_many": (raw(counts=(1, 2)), "unknown type|truncated|more than"),
    "one_tensor_too_many": (raw(counts=(2, 1)), "dimensions|truncated|more than"),
    "key_twice": (raw([pair(*PAIR), pair(*PAIR)]), "general.architecture twice"),
    "key_too_long": (raw([pair("k" * 300, U32, bytes(4))]), "text of 300 bytes"),
    "key_beyond_the_file": (raw([struct.pack("<Q", 200) + b"k"], [], b""), "truncated"),
    "key_of_2_to_63": (raw([struct.pack("<Q", 2**63)]), "text of 9223372036854775808 bytes"),
    "key_not_utf8": (raw([pair(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "text_beyond_the_file": (raw([pair("k", STRING, struct.pack("<Q", 10**6))]), "truncated"),
    "text_beyond_the_limit": (raw([pair("k", STRING, struct.pack("<Q", 2**40))]), "text of"),
    "text_not_utf8": (raw([pair("k", STRING, text(b"\xc3\x28"))]), "not UTF-8"),
    "value_of_unknown_type": (raw([pair("k", 13, bytes(8))]), "unknown type 13"),
    "array_of_2_to_63": (raw([pair("k", ARRAY, struct.pack("<IQ", U32, 2**63))]), "arrays of more than"),
    "array_beyond_the_file": (raw([pair("k", ARRAY, struct.pack("<IQ", U32, 900_000))]), "truncated"),
    "array_of_texts_beyond": (raw([pair("k", ARRAY, struct.pack("<IQ", STRING, 900_000))]), "truncated|text of"),
    "array_of_arrays": (raw([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))]), "array of the type 9"),
    "array_of_unknown": (raw([pair("k", ARRAY, struct.pack("<IQ", 99, 1))]), "array of the type 99"),
    "alignment_0": (raw([pair("general.alignment", U32, bytes(4))]), "alignment is 0"),
    "alignment_odd": (raw([pair("general.alignment", U32, struct.pack("<I", 33))]), "alignment is 33"),
    "alignment_huge": (raw([pair("general.alignment", U32, struct.pack("<I", 2**31))]), "alignment is 2147483648"),
    "alignment_text": (raw([pair("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "alignment_float": (raw([pair("general.alignment", 6, struct.pack("<f", 32))]), r"alignment is 32\.0"),
    "tensor_name_too_long": (raw(tensors=[tensor("n" * 300)]), "text of 300 bytes"),
    "tensor_name_twice": (raw(tensors=[tensor(), tensor(offset=256)], data=bytes(512)), "tensor t twice"),
    "no_dimensions": (raw(tensors=[tensor(dims=())]), "0 dimensions"),
    "five_dimensions": (raw(tensors=[tensor(dims=(1, 1, 1, 1, 64))]), "5 dimensions"),
    "million_dimensions": (raw(tensors=[text("t") + struct.pack("<I", 10**6)]), "1000000 dimensions"),
    "dimension_0": (raw(tensors=[tensor(dims=(32, 0))]), "impossible shape"),
    "dimension_huge": (raw(tensors=[tensor(dims=(2**63, 2))]), "impossible shape"),
    "product_wraps": (raw(tensors=[tensor(dims=(2**32, 2**32))]), "impossible shape"),
    "unknown_tensor_type": (raw(tensors=[tensor(kind=4)]), "unknown type 4"),  # once Q4_2
    "half_a_block": (raw(tensors=[tensor(dims=(16, 4), kind=2)]), "rows of 16, which Q4_0 cannot have"),
    "offset_beyond": (raw(tensors=[tensor(offset=2**62)]), "hole"),
    "offset_negative": (raw(tensors=[tensor(offset=2**64 - 32)]), "hole"),
    "offset_not_aligned": (raw(tensors=[tensor(offset=8)], data=bytes(264)), "hole"),
    "overlap": (raw(tensors=[tensor("a"), tensor("b", offset=128)], data=bytes(512)), "tensor b overlaps"),
    "same_place": (raw(tensors=[tensor("a"), tensor("b")], data=bytes(512)), "overlaps"),
    "hole": (raw(tensors=[tensor("a"), tensor("b", offset=512)], data=bytes(1024)), "tensor b leaves a hole"),
    "data_cut": (raw(data=bytes(255)), "truncated: tensor t ends at"),
    "data_absent": (raw(data=b""), "truncated"),
    "longer_than_it_says": (raw(data=bytes(257)), "its header describes"),
    "header_cut": (raw()[:60], "truncated"),
    "no_architecture": (raw([]), "says no general.architecture"),
    "architecture_is_a_number": (raw([pair("general.architecture", U32, bytes(4))]), "general.architecture is 0"),
    "architecture_with_escapes": (raw([pair("general.architecture", STRING, text("\x1b[31m"))]), r"\\x1b"),
    "only_an_architecture": (raw(), "says no dbrx"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64, "Git LFS pointer"),
    "web_page": (b"<!DOCTYPE html><html></html>", "web page"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_by_name(tmp_path: Path, defect: str) -> None:
    content, message = DEFECTS[defect]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as error:
        open_weights(path)
    assert error.value.exit_code == 3
    assert error.value.message.startswith(f"{path}: ") and error.value.message.isprintable()
    assert re.search(message, error.value.message), error.value.message
    assert len(error.value.message) < 600


def lies_about_count(folder: Path) -> Path:
    """A single file that says it is one of three."""
    first = write_gguf(folder / "m.gguf", split=8)
    return first.rename(folder / "renamed.gguf")


def swapped(folder: Path) -> Path:
    first = write_gguf(folder / "m.gguf", split=8)
    second = first.with_name("m-00002-of-00003.gguf")
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return first


def missing(folder: Path) -> Path:
    first = write_gguf(folder / "m.gguf", split=8)
    gone = first.with_name("m-00002-of-00003.gguf")
    gone.unlink()
    return gone


def truncated(folder: Path) -> Path:
    write_gguf(folder / "m.gguf", split=8)
    third = folder / "m-00003-of-00003.gguf"
    os.truncate(third, third.stat().st_size - 100)
    return third


def from_another_split(folder: Path) -> Path:
    write_gguf(folder / "m.gguf", split=8)
    (folder / "other").mkdir()
    write_gguf(folder / "other" / "m.gguf", split=10)
    os.replace(folder / "other" / "m-00002-of-00002.gguf", folder / "m-00002-of-00003.gguf")
    return folder / "m-00002-of-00003.gguf"


def tensors_twice(folder: Path) -> Path:
    first = write_gguf(folder / "m.gguf", split=8)
    second = (folder / "m-00002-of-00003.gguf").read_bytes()
    third = folder / "m-00003-of-00003.gguf"
    number = struct.pack("<H", 1)
    at = second.index(b"split.no") + len("split.no") + 4
    assert second[at : at + 2] == number
    third.write_bytes(second[:at] + struct.pack("<H", 2) + second[at + 2 :])
    return first.with_name(third.name)


def links_outside(folder: Path) -> Path:
    write_gguf(folder / "m.gguf", split=8)
    second, outside = folder / "m-00002-of-00003.gguf", folder.parent / "outside.gguf"
    second.rename(outside)
    second.symlink_to(outside)
    return second


def fifo(folder: Path) -> Path:
    write_gguf(folder / "m.gguf", split=8)
    second = folder / "m-00002-of-00003.gguf"
    second.unlink()
    os.mkfifo(second)
    return second


SPLITS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "renamed": (lies_about_count, "is part 1 of 3, which its name does not say"),
    "swapped": (swapped, "is part 2, not 1 as its name says"),
    "missing": (missing, "part 2 of 3 is missing"),
    "truncated": (truncated, "is truncated"),
    "from_another_split": (from_another_split, "is part 2 of 2"),
    "tensors_twice": (tensors_twice, "is also in m-00002-of-00003.gguf"),
    "links_outside": (links_outside, "links to a place outside"),
    "fifo": (fifo, "not a regular file"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("defect", SPLITS)
def test_a_damaged_split_names_the_part(tmp_path: Path, defect: str) -> None:
    damage, message = SPLITS[defect]
    folder = tmp_path / "model"
    folder.mkdir()
    named = damage(folder)
    given = named if named.is_file() and not named.is_symlink() else min(folder.glob("*.gguf"))
    with pytest.raises(ModelError, match=message) as error:
        open_weights(given)
    assert error.value.message.startswith(f"{named}: ")


@pytest.mark.parametrize("name", ["m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-99999.gguf"])
def test_parts_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(raw())
    with pytest.raises(ModelError, match="there cannot be a part"):
        open_weights(tmp_path / name)


def test_a_file_that_shrinks_while_in_use_is_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    weights = open_weights(path)
    os.truncate(path, 5000)
    with pytest.raises(ModelError, match="became shorter"):
        weights.read("lm_head.weight")


def tokenizer_file(path: Path, **changes: bytes | None) -> Path:
    """A file with a tokenizer of two tokens; `changes` replace the payload of a key, None leaves it out."""
    strings = struct.pack("<IQ", STRING, 2) + text("a") + text("<|im_end|>")
    pairs: dict[str, tuple[int, bytes | None]] = {
        "model": (STRING, text("gpt2")), "pre": (STRING, text("dbrx")), "tokens": (ARRAY, strings),
        "token_type": (ARRAY, struct.pack("<IQII", U32, 2, 1, 3)),
        "merges": (ARRAY, struct.pack("<IQ", STRING, 0)), "eos_token_id": (U32, struct.pack("<I", 1)),
    }  # fmt: skip
    for key, payload in changes.items():
        pairs[key] = (pairs[key][0], payload)
    written = [pair(f"tokenizer.ggml.{key}", kind, data) for key, (kind, data) in pairs.items() if data is not None]
    path.write_bytes(raw([pair(*PAIR), *written]))
    return path


TOKENIZERS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no_tokens": ({"tokens": None}, "says no tokenizer.ggml.tokens"),
    "tokens_are_numbers": ({"tokens": struct.pack("<IQII", U32, 2, 1, 3)}, "does not hold str"),
    "types_are_text": ({"token_type": struct.pack("<IQ", STRING, 2) + text("a") * 2}, "does not hold int"),
    "too_few_types": ({"token_type": struct.pack("<IQI", U32, 1, 1)}, "2 tokens and 1 token types"),
    "eos_beyond": ({"eos_token_id": struct.pack("<I", 2)}, "eos_token_id is 2, but there are 2"),
    "unknown_model": ({"model": text("llama")}, "the tokenizer llama/dbrx"),
    "unknown_pre": ({"pre": text("qwen2")}, "the tokenizer gpt2/qwen2"),
    "unknown_pre_of_openai": ({"pre": text("gpt-4o")}, "gpt2/gpt-4o, which is none of DBRX's"),
    "same_token_twice": (
        {"tokens": struct.pack("<IQ", STRING, 2) + text("a") * 2, "token_type": struct.pack("<IQII", U32, 2, 1, 1)},
        "same token twice",
    ),
    "merge_of_unknown": ({"merges": struct.pack("<IQ", STRING, 1) + text("a b")}, "not in the vocabulary"),
    "merge_of_three": ({"merges": struct.pack("<IQ", STRING, 1) + text("a b c")}, "'a b c' is not of two tokens"),
}


@pytest.mark.parametrize("defect", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, defect: str) -> None:
    changes, message = TOKENIZERS[defect]
    path = tokenizer_file(tmp_path / "m.gguf", **changes)
    with pytest.raises(ModelError, match=message) as error:
        Tokenizer.from_gguf(path)
    assert error.value.message.startswith(f"{path}: ")


def test_the_undamaged_tokenizer_is_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tokenizer_file(tmp_path / "m.gguf"))
    assert tokenizer.encode("aba") == [0, 0] and tokenizer.eos_token_ids == (1,)


BOMBS = """
import sys
from pathlib import Path
from model.errors import ModelError
from model.formats import open_weights
from model.tokenizer import Tokenizer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = None
for path in sorted(Path(sys.argv[1]).iterdir()):
    for way in (open_weights, Tokenizer.from_gguf):
        try:
            way(path)
            print("accepted", path.name)
        except ModelError as error:
            pass
    if before is None:
        before = peak()
    if peak() - before > int(sys.argv[2]):
        print("grew by", peak() - before, "KiB at", path.name)
        break
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.soak)])
def test_bombs_stay_below_300_mb(tmp_path: Path, share: float) -> None:
    """In full, and a tenth of it below a tenth of that, and 10 MB for what Python takes."""
    many, count = int(share * 990_000), int(share * 50_000)
    wide = "\U0001f600" + "a" * (int(share * MAX_HEADER) - 2_000)
    bombs = {
        "a_first": raw(),  # loads the packages
        "numbers": raw([pair("k", ARRAY, struct.pack("<IQ", 0, many) + bytes(many))]),
        "texts": raw([pair("k", ARRAY, struct.pack("<IQ", STRING, many) + bytes(8) * many)]),
        "wide_text": raw([pair("k", STRING, text(wide))]),
        "pairs": raw([pair(str(i), U32, bytes(4)) for i in range(1_000)]),
        "tensors": raw(tensors=[tensor(str(i), (1, 1, 1, 8), 0, 32 * i) for i in range(count)], data=bytes(32 * count)),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sparse").write_bytes(raw([pair("k", STRING, struct.pack("<Q", int(share * 30 * 2**20)))], [])[:-256])
    os.truncate(tmp_path / "sparse", 10**11)
    ran = subprocess.run(
        [sys.executable, "-c", BOMBS, tmp_path, str(int((300 * share + 10) * 1024))],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def mutate(content: bytes, end: int, rng: random.Random) -> bytes:
    """One to four random changes of a header."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(4, end)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, end]))
        elif kind == 2:
            changed[at : at + 4] = struct.pack("<I", rng.randrange(40))
        else:
            other = rng.randrange(4, end)
            changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed)


def check_mutations(folder: Path, seeds: range) -> None:
    """Refused by name, or everything can be read."""
    path = write_gguf(folder / "valid.gguf", "q8_0")
    content = path.read_bytes()
    end = min(info.start for info in open_gguf(path).tensors.values())
    changed, refused = folder / "m.gguf", 0
    for seed in seeds:
        print("seed", seed)
        changed.write_bytes(mutate(content, end, random.Random(seed)))
        try:
            Tokenizer.from_gguf(changed).encode("hello world")
            with open_weights(changed) as weights:
                weights.expert(1, 4)
                weights.read("transformer.norm_f.weight")
        except ModelError as error:
            assert error.message.startswith(f"{changed}: ") and error.message.isprintable()
            refused += 1
    assert refused > len(seeds) // 3


def test_random_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(100))


@pytest.mark.soak
def test_many_random_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(2_000))
