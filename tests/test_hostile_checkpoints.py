"""Hostile and damaged checkpoints: refused with one line that names the file; nothing runs, hangs, grows or leaks."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from model.errors import ModelError
from tests.test_checkpoint import CONFIG, W1, hub_snapshot, weights, write_raw, write_sharded, write_single

torch.set_num_threads(1)

SHARD = "model-00002-of-00003.safetensors"
NORM = "transformer.norm_f.weight"
FIRST = "transformer.wte.weight"  # in shard 1 of 3
Header = dict[str, Any]


def split(path: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def edit_header(change: Callable[[Header], object]) -> Callable[[Path], str]:
    """A defect in the parsed header of the single file."""

    def damage(folder: Path) -> str:
        write_single(folder, weights())
        header, data = split(folder / SINGLE_NAME)
        change(header)
        write_raw(folder / SINGLE_NAME, json.dumps(header).encode(), data)
        return SINGLE_NAME

    return damage


def edit_text(old: str, new: str) -> Callable[[Path], str]:
    """A defect in the text of the header."""

    def damage(folder: Path) -> str:
        write_single(folder, weights())
        header, data = split(folder / SINGLE_NAME)
        text = json.dumps(header)
        assert old in text
        write_raw(folder / SINGLE_NAME, text.replace(old, new, 1).encode("utf-8", "surrogateescape"), data)
        return SINGLE_NAME

    return damage


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    """A defect in the bytes of one of three shards."""

    def damage(folder: Path) -> str:
        write_sharded(folder, weights())
        (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))
        return SHARD

    return damage


def edit_index(change: Callable[[Header], object], named: str = INDEX_NAME) -> Callable[[Path], str]:
    """A defect in the index."""

    def damage(folder: Path) -> str:
        write_sharded(folder, weights())
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index)
        (folder / INDEX_NAME).write_text(json.dumps(index))
        return named

    return damage


def index_text(text: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        write_sharded(folder, weights())
        (folder / INDEX_NAME).write_text(text)
        return INDEX_NAME

    return damage


def file_name(name: str) -> Callable[[Path], str]:
    """The index sends one tensor to a file of this name."""
    return edit_index(lambda index: index["weight_map"].update({FIRST: name}))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], str]:
    """A valid file whose tensors are not the model's."""

    def damage(folder: Path) -> str:
        tensors = weights()
        change(tensors)
        write_single(folder, tensors)
        return SINGLE_NAME

    return damage


def instead(make: Callable[[Path], object], name: str = SHARD) -> Callable[[Path], str]:
    """Something else in place of a file."""

    def damage(folder: Path) -> str:
        write_sharded(folder, weights())
        (folder / name).unlink()
        make(folder / name)
        return name

    return damage


def link_to_copy(path: Path) -> None:
    """A link to a valid shard that lies outside the folder."""
    outside = path.parent.parent / "outside"
    write_sharded(outside, weights())
    path.symlink_to(outside / path.name)


def link_in_fake_snapshot(folder: Path) -> str:
    """A snapshot of the Hub's cache that links past the cache's own blobs."""
    snapshot = hub_snapshot(folder / "hub", write_sharded(folder / "source", weights()))
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(folder / "source" / SHARD)
    return f"hub/models--org--name/snapshots/{'a' * 40}/{SHARD}"


def two_shards_with_one_tensor(folder: Path) -> str:
    write_sharded(folder, weights())
    save_file(load_file(folder / SHARD) | {FIRST: weights()[FIRST]}, folder / SHARD)
    return SHARD


def unlisted_tensor(folder: Path) -> str:
    write_sharded(folder, weights())
    save_file(load_file(folder / SHARD) | {"extra": torch.ones(2)}, folder / SHARD)
    return SHARD


def entry(header: Header, **values: object) -> None:
    header[NORM].update(values)


def moved(header: Header, by_start: int, by_end: int) -> None:
    start, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [start + by_start, end + by_end]


def without(header: Header, key: str) -> None:
    del header[NORM][key]


def swap_shards(index: Header) -> None:
    index["weight_map"][FIRST] = SHARD


def lie_about_length(length: int) -> Callable[[bytes], bytes]:
    return lambda content: length.to_bytes(8, "little") + content[8:]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
DEEP = "[" * 200_000

DEFECTS: dict[str, tuple[Callable[[Path], str], str]] = {
    # where the files lie
    "traversal": (file_name("../outside/model.safetensors"), "weight_map names"),
    "traversal_backslash": (file_name("..\\model.safetensors"), "weight_map names"),
    "absolute": (file_name("/etc/passwd"), "weight_map names"),
    "absolute_safetensors": (file_name("/tmp/model.safetensors"), "weight_map names"),
    "subfolder": (file_name("sub/model.safetensors"), "weight_map names"),
    "hidden": (file_name(".model.safetensors"), "weight_map names"),
    "nul_in_name": (file_name("a\0.safetensors"), "weight_map names"),
    "escape_in_name": (file_name("\x1b]0;x\x07.safetensors"), r"weight_map names '\\x1b"),
    "surrogate_in_name": (file_name("\ud800.safetensors"), "half of a surrogate pair"),
    "long_name": (file_name("a" * 5000 + ".safetensors"), "weight_map names"),
    "pickle_in_index": (file_name("pytorch_model.bin"), "weight_map names"),
    "name_is_a_number": (edit_index(lambda i: i["weight_map"].update({FIRST: 7})), "weight_map names"),
    "link_outside": (instead(link_to_copy), "links to a place outside"),
    "link_past_the_cache": (link_in_fake_snapshot, "links to a place outside"),
    "link_to_device": (instead(lambda path: path.symlink_to("/dev/zero")), "links to a place outside"),
    "link_in_a_circle": (instead(lambda path: path.symlink_to(path.name)), "shard 2 of 3 is missing"),
    "link_to_nothing": (instead(lambda path: path.symlink_to("gone")), "shard 2 of 3 is missing"),
    "index_links_outside": (instead(link_to_copy, INDEX_NAME), "links to a place outside"),
    "fifo": (instead(os.mkfifo), "not a regular file"),
    "index_is_fifo": (instead(os.mkfifo, INDEX_NAME), "not a regular file"),
    "folder_for_file": (instead(Path.mkdir), "not a regular file"),
    "missing_shard": (instead(lambda path: None), "shard 2 of 3 is missing"),
    # the index
    "index_not_json": (index_text("{"), "not valid JSON"),
    "index_not_an_object": (index_text("[]"), "not a JSON object"),
    "index_without_map": (index_text("{}"), "has no weight_map"),
    "index_map_is_a_list": (index_text('{"weight_map": []}'), "has no weight_map"),
    "index_map_is_empty": (index_text('{"weight_map": {}}'), "has no weight_map"),
    "index_key_twice": (index_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'), "occurs twice"),
    "index_too_deep": (index_text(DEEP), "nested too deeply"),
    "index_is_lfs_pointer": (index_text(LFS.decode()), "Git LFS pointer"),
    "index_is_huge": (index_text(" " * (5 * 2**20)), "more than any such file"),
    "listed_but_not_held": (edit_index(lambda i: i["weight_map"].update(more=SHARD), SHARD), "lacks tensor more"),
    "listed_in_another_shard": (edit_index(swap_shards, SHARD), f"lacks tensor {FIRST}"),
    "held_but_not_listed": (unlisted_tensor, "holds tensor extra"),
    "tensor_in_two_shards": (two_shards_with_one_tensor, "is also in model-00001-of-00003"),
    # the file as a whole
    "empty": (edit_bytes(lambda c: b""), "not a safetensors file"),
    "four_bytes": (edit_bytes(lambda c: c[:4]), "not a safetensors file"),
    "only_a_length": (edit_bytes(lambda c: c[:8]), "truncated"),
    "truncated_in_header": (edit_bytes(lambda c: c[:100]), "truncated"),
    "truncated_in_data": (edit_bytes(lambda c: c[:-1]), r"truncated: \d+ of \d+ bytes"),
    "longer_than_it_says": (edit_bytes(lambda c: c + b"\0"), r"\d+ bytes, but its header describes \d+"),
    "length_max": (edit_bytes(lie_about_length(2**64 - 1)), "not a safetensors file"),
    "length_100_mb": (edit_bytes(lie_about_length(100_000_000)), "not a safetensors file"),
    "length_zero": (edit_bytes(lie_about_length(0)), "not a safetensors file"),
    "length_short": (edit_bytes(lie_about_length(50)), "not valid JSON"),
    "lfs_pointer": (edit_bytes(lambda c: LFS), "Git LFS pointer"),
    "zip": (edit_bytes(lambda c: b"PK\x03\x04" + c), "pickle"),
    "gguf": (edit_bytes(lambda c: b"GGUF" + c), "is a GGUF file"),
    "web_page": (edit_bytes(lambda c: b"<!DOCTYPE html><html></html>"), "web page"),
    "header_deep": (
        edit_bytes(lambda c: (100_005).to_bytes(8, "little") + b'{"a":' + DEEP[: 10**5].encode()),
        "deeply",
    ),
    "header_not_utf8": (edit_text("BF16", "BF\udcff"), "not UTF-8"),
    "header_a_list": (edit_text("{", "[{"), "does not begin with"),
    "header_key_twice": (edit_text(f'"{FIRST}"', f'"{NORM}"'), "occurs twice"),
    "header_inner_key_twice": (edit_text('"dtype": "BF16"', '"dtype": "F32", "dtype": "BF16"'), "occurs twice"),
    "header_nan": (edit_text("[50, 24]", "[NaN, 24]"), "must have a shape"),
    "header_long_number": (edit_text("[50, 24]", f"[{'9' * 5000}, 24]"), "thousands of digits"),
    "header_empty": (edit_header(dict.clear), "holds no tensors"),
    # one entry
    "metadata_nested": (edit_header(lambda h: h.update(__metadata__={"a": {}})), "text to text"),
    "metadata_a_list": (edit_header(lambda h: h.update(__metadata__=["a"])), "text to text"),
    "entry_a_list": (edit_header(lambda h: h.update({NORM: []})), "must hold dtype"),
    "entry_without_dtype": (edit_header(lambda h: without(h, "dtype")), "must hold dtype"),
    "entry_without_shape": (edit_header(lambda h: without(h, "shape")), "must hold dtype"),
    "entry_without_offsets": (edit_header(lambda h: without(h, "data_offsets")), "must hold dtype"),
    "entry_with_more": (edit_header(lambda h: entry(h, code="x")), "must hold dtype"),
    "entry_name_too_long": (edit_header(lambda h: h.update({"n" * 300: h.pop(NORM)})), "too long a name"),
    "dtype_unknown": (edit_header(lambda h: entry(h, dtype="BF17")), "unknown type BF17"),
    "dtype_not_text": (edit_header(lambda h: entry(h, dtype=["BF16"])), "unknown type"),
    "dtype_of_other_size": (edit_header(lambda h: entry(h, dtype="F64")), "48 bytes, but its type and shape need 192"),
    "shape_negative": (edit_header(lambda h: entry(h, shape=[-24])), "shape"),
    "shape_two_negatives": (edit_header(lambda h: entry(h, shape=[-4, -6])), "shape"),
    "shape_float": (edit_header(lambda h: entry(h, shape=[24.0])), "shape"),
    "shape_bool": (edit_header(lambda h: entry(h, shape=[True, 24])), "shape"),
    "shape_text": (edit_header(lambda h: entry(h, shape="24")), "shape"),
    "shape_huge": (edit_header(lambda h: entry(h, shape=[2**62, 2**62])), "too large"),
    "shape_wraps_to_zero": (edit_header(lambda h: entry(h, shape=[2**32, 2**32])), "too large"),
    "shape_hides_behind_zero": (edit_header(lambda h: entry(h, shape=[0, 2**62, 4])), "too large"),
    "shape_of_100_sizes": (edit_header(lambda h: entry(h, shape=[24] + [1] * 99)), "shape"),
    "offsets_three": (edit_header(lambda h: entry(h, data_offsets=[0, 1, 2])), "two data_offsets"),
    "offsets_negative": (edit_header(lambda h: entry(h, data_offsets=[-48, 0])), "two data_offsets"),
    "offsets_float": (edit_header(lambda h: entry(h, data_offsets=[0.0, 48.0])), "two data_offsets"),
    "offsets_huge": (edit_header(lambda h: entry(h, data_offsets=[2**70, 2**70 + 48])), "two data_offsets"),
    "offsets_reversed": (edit_header(lambda h: h[NORM]["data_offsets"].reverse()), "-48 bytes"),
    "offsets_short": (edit_header(lambda h: moved(h, 0, -1)), "47 bytes"),
    "overlap": (edit_header(lambda h: moved(h, -2, -2)), "overlaps"),
    "same_range_twice": (edit_header(lambda h: h.update(alias=h[NORM])), "overlaps"),
    "hole": (edit_header(lambda h: h.pop(NORM)), "leaves a hole|describes"),
    "beyond_the_end": (edit_header(lambda h: moved(h, 10**6, 10**6)), "hole"),
    # a valid file, but not of this model
    "missing_tensor": (edit_tensors(lambda t: t.pop(NORM)), rf"1 tensor \({NORM}\) is missing"),
    "extra_tensor": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), r"1 tensor \(extra\) does not belong"),
    "extra_layer": (edit_tensors(lambda t: t.update({W1.replace(".0.", ".2."): t[W1].clone()})), "does not belong"),
    "renamed_tensor": (
        edit_tensors(lambda t: t.update({"\x1b[31m": t.pop(NORM)})),
        "is missing; 1 others are unexpected",
    ),
    "wrong_shape": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(25)})),
        r"norm_f.weight has shape \[25\], config.json asks for \[24\]",
    ),
    "transposed": (edit_tensors(lambda t: t.update({FIRST: t[FIRST].T.contiguous()})), r"has shape \[24, 50\]"),
    "integers": (edit_tensors(lambda t: t.update({W1: t[W1].to(torch.int8)})), r"w1 \(I8\)\) has no float type"),
    "doubles": (
        edit_tensors(lambda t: t.update({W1: t[W1].double()})),
        r"w1 \(F64\)\) has 64 bits, which are not read",
    ),
}


def load(folder: Path) -> None:
    """All that a load does with the files."""
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check(CONFIG)
        for name in checkpoint.tensors:
            checkpoint.read(name).view(torch.uint8).sum()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_by_name(tmp_path: Path, defect: str) -> None:
    damage, message = DEFECTS[defect]
    folder = tmp_path / "model"
    folder.mkdir()
    named = folder / damage(folder)
    with pytest.raises(ModelError) as error:
        load(named.parent)
    assert error.value.exit_code == 3
    assert error.value.message.startswith(f"{named}: ")
    assert re.search(message, error.value.message)
    assert error.value.message.isprintable()
    assert len(error.value.message) < 600


def test_there_are_enough_defects() -> None:
    assert len(DEFECTS) >= 40


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that the process opens while the fixture is in use."""
    paths: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "os.listdir", "os.scandir"):
            paths.append(str(arguments[0]))

    sys.addaudithook(hook)  # it cannot be removed, only silenced
    yield paths
    active = False


def test_nothing_outside_the_folder_is_opened(tmp_path: Path, opened: list[str]) -> None:
    valid = write_sharded(tmp_path / "valid", weights())
    load(valid)
    assert str(valid / SHARD) in opened  # the fixture sees
    for name, (damage, _) in DEFECTS.items():
        folder = tmp_path / name
        folder.mkdir()
        named = folder / damage(folder)
        opened.clear()
        with pytest.raises(ModelError):
            load(named.parent)
        allowed = folder if "hub" in named.parts else named.parent
        outside = [path for path in opened if not Path(path).is_relative_to(allowed)]
        assert not outside, name
        assert not any(path.startswith(str(folder / "source")) for path in opened)


class Canary:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    fired, folder = tmp_path / "fired", tmp_path / "model"
    write_sharded(folder, weights())
    script = f"from pathlib import Path\nPath({str(fired)!r}).touch()\n"
    for name in ("modeling_dbrx.py", "configuration_dbrx.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(script)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_dbrx.DbrxForCausalLM"}}))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Canary(fired)))
    load(folder)
    for file in (SHARD, INDEX_NAME):
        (folder / file).write_bytes(pickle.dumps(Canary(fired)))
        with pytest.raises(ModelError):
            load(folder)
        (folder / file).unlink()
        with pytest.raises(ModelError):
            load(folder)
    assert not fired.exists()
    pickle.loads(pickle.dumps(Canary(fired)))
    assert fired.exists()  # the canary was alive


def test_a_file_that_shrinks_while_in_use_is_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path, weights()))
    os.truncate(tmp_path / SINGLE_NAME, 100)
    with pytest.raises(ModelError, match="became shorter"):
        checkpoint.read(W1)


def test_a_type_that_torch_lacks_is_told(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_NAME, b'{"x":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}', b"ab")
    with pytest.raises(ModelError, match="x has type F4"):
        Checkpoint.open(tmp_path).read("x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    write_single(tmp_path, weights())
    (tmp_path / SINGLE_NAME).chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        load(tmp_path)


BOMBS = """
import sys
from pathlib import Path
from model.checkpoint import Checkpoint
from model.config import DbrxConfig
from model.errors import ModelError

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
config = DbrxConfig.from_dict({"n_layers": 2000})
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        Checkpoint.open(folder).check(config)
        print("accepted", folder.name)
    except ModelError as error:
        pass
    if peak() - before > int(sys.argv[2]):
        print("grew by", peak() - before, "KiB at", folder.name)
        break
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.soak)])
def test_bombs_stay_below_200_mb(tmp_path: Path, share: float) -> None:
    """In full, and a tenth of it below a tenth of that, and 10 MB for what Python takes."""
    limit = int(share * 4 * 2**20) - 64  # just below what is parsed at all
    tensors = int(share * 45_000)
    entries = b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(tensors))
    headers = {
        "objects": b'{"a":[' + b'{"":0},' * (limit // 7) + b"0]}",
        "lists": b'{"a":[' + b"[0]," * (limit // 4) + b"0]}",
        "dimensions": b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + b"1," * (limit // 2 - 50) + b"1]}}",
        "keys": b"{" + b",".join(b'"%x":{}' % i for i in range(limit // 12)) + b"}",
        "tensors": b"{" + entries + b"}",
        "one_name": b'{"' + b"experts." * (limit // 8) + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    }
    for name, header in headers.items():
        (tmp_path / name).mkdir()
        write_raw(tmp_path / name / SINGLE_NAME, header)
        if name in ("objects", "keys"):
            (tmp_path / f"index_{name}").mkdir()
            (tmp_path / f"index_{name}" / INDEX_NAME).write_bytes(b'{"weight_map":' + header + b"}")
    (tmp_path / "many").mkdir()
    weight_map = {}
    for shard in range(20):  # more tensors than a checkpoint may have, a few in each file
        file = f"model-{shard:05d}-of-00020.safetensors"
        names = [b"%x.%x" % (shard, i) for i in range(4 * tensors // 45)]
        fields = [b'"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % name for name in names]
        write_raw(tmp_path / "many" / file, b"{" + b",".join(fields) + b"}")
        weight_map[str(shard)] = file
    (tmp_path / "many" / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "sparse").mkdir()
    write_raw(tmp_path / "sparse" / SINGLE_NAME, b"")
    (tmp_path / "sparse" / SINGLE_NAME).write_bytes((99_000_000).to_bytes(8, "little"))
    os.truncate(tmp_path / "sparse" / SINGLE_NAME, 10**11)
    ran = subprocess.run(
        [sys.executable, "-c", BOMBS, tmp_path, str(int((200 * share + 10) * 1024))],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four random changes of a file's first bytes: length and header."""
    changed = bytearray(content)
    end = 8 + int.from_bytes(content[:8], "little")
    tokens = [b"{", b"}", b"[", b"]", b",", b'"', b":", b"-", b"0", b"9" * 30, b"null", b"1e3", b"\\u0000", b"\xff",
              b"BF16", b"F64", b"F4", b"[0,0]", b"__metadata__", b" "]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(8, end) if rng.random() < 0.9 else rng.randrange(8)
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + rng.randint(1, 20)] = rng.choice(tokens)
        elif kind == 2:
            changed[at:at] = rng.choice(tokens)
        elif kind == 3:
            other = rng.randrange(8, end)
            changed[at : at + 8] = changed[other : other + 8]
        else:  # a number
            digits = [match.start() for match in re.finditer(rb"\d", bytes(changed[8:end]))]
            changed[8 + rng.choice(digits)] = rng.choice(b"0123456789")
    if rng.random() < 0.5:  # keep the length right, so that the JSON itself is reached
        changed[:8] = (end - 8 + len(changed) - len(content)).to_bytes(8, "little")
    return bytes(changed)


def check_mutations(folder: Path, seeds: range) -> None:
    """Refused by name; or accepted, and then safetensors accepts the file too and reads the same values."""
    content = (write_single(folder, weights()) / SINGLE_NAME).read_bytes()
    refused = 0
    for seed in seeds:
        print("seed", seed)
        (folder / SINGLE_NAME).write_bytes(mutate(content, random.Random(seed)))
        try:
            load(folder)
        except ModelError as error:
            assert error.message.startswith(f"{folder / SINGLE_NAME}: ") and error.message.isprintable()
            refused += 1
            continue
        expected = load_file(folder / SINGLE_NAME)
        with Checkpoint.open(folder) as checkpoint:
            assert expected.keys() == checkpoint.tensors.keys()
            for name, tensor in expected.items():
                assert torch.equal(checkpoint.read(name).view(torch.uint8), tensor.view(torch.uint8))
    assert refused > len(seeds) // 2


def test_random_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(100))


@pytest.mark.soak
def test_many_random_mutations(tmp_path: Path) -> None:
    check_mutations(tmp_path, range(2_000))
