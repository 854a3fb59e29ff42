"""A checkpoint that is whole: found in each layout, read without a copy, and equal to what safetensors reads."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, expected_tensors
from model.config import DbrxConfig
from model.errors import ModelError
from tests.weights import make_checkpoint, make_weights, parameter_shapes

torch.set_num_threads(1)

# Every dimension differs, so that no swap can hide.
CONFIG = DbrxConfig.from_dict(
    {
        "d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 50, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 10, "moe_num_experts": 3, "moe_top_k": 2},
    }
)  # fmt: skip
REAL = DbrxConfig.from_dict(
    {
        "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352, "max_seq_len": 32768,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
)  # fmt: skip
W1 = "transformer.blocks.0.ffn.experts.mlp.w1"
QKV = "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in expected_tensors(CONFIG).items()}


def write_single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def hub_snapshot(cache: Path, source: Path, *, shared: bool = False) -> Path:
    """The folder as the Hub's cache keeps it: snapshot files link to blobs, which may link to a shared store."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        if shared:
            store = cache / "blobs" / "ab" / f"ab{i:062x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, store)
            blob.symlink_to(f"../../blobs/ab/{store.name}")
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_the_real_model_has_the_published_size() -> None:
    shapes = expected_tensors(REAL)
    assert len(shapes) == 40 * 8 + 3
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 131_596_523_520
    assert shapes["transformer.blocks.39.norm_attn_norm.attn.Wqkv.weight"] == (6144 + 2 * 8 * 128, 6144)
    assert shapes["transformer.blocks.0.ffn.experts.mlp.w2"] == (16 * 10752, 6144)
    assert shapes["lm_head.weight"] == (100352, 6144)


def test_the_table_is_that_of_the_golden_weights(tmp_path: Path) -> None:
    assert expected_tensors(CONFIG) == parameter_shapes(CONFIG.to_dict())
    with Checkpoint.open(make_checkpoint(tmp_path, CONFIG.to_dict(), seed=0)) as checkpoint:
        checkpoint.check(CONFIG)
        assert checkpoint.read(W1).numpy().tobytes() == make_weights(CONFIG.to_dict(), seed=0)[W1].tobytes()


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_tensor_equals_what_safetensors_reads(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], Path]
) -> None:
    folder = write(tmp_path, weights())
    expected = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check(CONFIG)
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())
        assert checkpoint.dtypes() == Counter({"BF16": checkpoint.nbytes})


def test_every_dtype_equals_what_safetensors_reads(tmp_path: Path) -> None:
    names = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16",
             "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz",
             "float8_e5m2fnuz"]  # fmt: skip
    data = torch.arange(240, dtype=torch.uint8).view(2, 120) % 2
    tensors = {name: data.clone().view(getattr(torch, name)) for name in names}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    with Checkpoint.open(write_single(tmp_path, tensors)) as checkpoint:
        for name, expected in load_file(tmp_path / SINGLE_NAME).items():
            read = checkpoint.read(name)
            assert read.dtype == expected.dtype and read.shape == expected.shape
            assert torch.equal(read.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
        assert checkpoint.tensors["int8"].shape == (2, 120)
        info = checkpoint.tensors["float64"]
        assert (tmp_path / SINGLE_NAME).read_bytes()[info.start :][: info.nbytes] == bytes(data.flatten().tolist())


def test_reading_can_convert(tmp_path: Path) -> None:
    with Checkpoint.open(write_single(tmp_path, weights())) as checkpoint:
        stored = checkpoint.read(W1)
        assert torch.equal(checkpoint.read(W1, dtype=torch.float32), stored.float())
        assert checkpoint.read(W1, dtype=torch.float16).dtype == torch.float16
        assert checkpoint.read(W1, device="meta").shape == stored.shape
        with pytest.raises(KeyError):
            checkpoint.read("no such tensor")


def status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_reading_copies_nothing(tmp_path: Path) -> None:
    write_single(tmp_path, {"big": torch.ones(16 * 2**20, dtype=torch.float32)})
    checkpoint = Checkpoint.open(tmp_path)
    before = status_kib("RssAnon")
    tensor = checkpoint.read("big")
    assert tensor.sum() == tensor.numel()
    assert status_kib("RssAnon") - before < 8 * 1024  # of 64 MiB
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if SINGLE_NAME in line]
    ranges = [[int(part, 16) for part in span[0].split("-")] for span in spans]
    assert any(low <= tensor.data_ptr() < high for low, high in ranges)
    assert tensor[5:9].data_ptr() == tensor.data_ptr() + 20
    assert spans[0][1] == "rw-p"


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    write_single(tmp_path, weights())
    content = (tmp_path / SINGLE_NAME).read_bytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        tensor = checkpoint.read(W1).zero_()
    assert not tensor.any()
    assert (tmp_path / SINGLE_NAME).read_bytes() == content


def test_a_tensor_outlives_the_checkpoint(tmp_path: Path) -> None:
    write_single(tmp_path, weights())
    checkpoint = Checkpoint.open(tmp_path)
    tensor = checkpoint.read(W1)
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read(W1)
    del checkpoint
    (tmp_path / SINGLE_NAME).unlink()
    assert torch.equal(tensor, weights()[W1])


def test_data_that_is_not_aligned_is_read_all_the_same(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 3.25])
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    write_raw(tmp_path / SINGLE_NAME, header + b" " * (3 - len(header) % 4), values.numpy().tobytes())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["x"].start % 4 == 3
        tensor = checkpoint.read("x")
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub_cache_loads(tmp_path: Path, shared: bool) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", write_sharded(tmp_path / "source", weights()), shared=shared)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        with Checkpoint.open(folder) as checkpoint:
            checkpoint.check(CONFIG)
            assert torch.equal(checkpoint.read(W1), weights()[W1])


def test_a_missing_blob_of_the_hub_cache_names_the_download(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", write_sharded(tmp_path / "source", weights()))
    (snapshot / "model-00002-of-00003.safetensors").resolve().unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors: shard 2 of 3 is missing") as error:
        Checkpoint.open(snapshot)
    assert error.value.hint == "fetch it again: dbrx download org/name"


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    write_single(tmp_path / "weights", weights())
    (tmp_path / SINGLE_NAME).symlink_to(f"weights/{SINGLE_NAME}")
    Checkpoint.open(tmp_path).check(CONFIG)


def test_types_may_be_mixed_and_saved_buffers_are_harmless(tmp_path: Path) -> None:
    tensors = weights(torch.float16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["transformer.blocks.0.norm_attn_norm.attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(3)
    checkpoint = Checkpoint.open(write_single(tmp_path, tensors))
    checkpoint.check(CONFIG)
    assert set(checkpoint.dtypes()) == {"F16", "F32"}


def test_other_files_beside_are_no_concern(tmp_path: Path) -> None:
    write_sharded(tmp_path, weights())
    for name in ("pytorch_model.bin", "modeling_dbrx.py", "other.safetensors", "model.gguf", "consolidated.pth"):
        (tmp_path / name).write_bytes(b"anything")
    Checkpoint.open(tmp_path).check(CONFIG)


def test_the_full_size_opens_in_no_memory(tmp_path: Path) -> None:
    """61 sparse shards of the real shapes: 263 GB of addresses, a few KB of disk."""
    names = list(expected_tensors(REAL).items())
    weight_map = {}
    for i in range(61):
        file = f"model-{i + 1:05d}-of-00061.safetensors"
        header, offset = {}, 0
        for name, shape in names[i::61]:
            end = offset + torch.Size(shape).numel() * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        content = json.dumps(header).encode()
        write_raw(tmp_path / file, content + b" " * (-len(content) % 8))
        os.truncate(tmp_path / file, (tmp_path / file).stat().st_size + offset)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.check(REAL)
        assert checkpoint.nbytes == 263_193_047_040
        last = checkpoint.read("transformer.blocks.39.ffn.experts.mlp.w2").view(16, 10752, 6144)
        assert last[15, -1].count_nonzero() == 0


def test_importing_needs_no_torch() -> None:
    code = "import sys, model.checkpoint; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in weights().items()}


def split_experts(pattern: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in weights().items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        prefix, matrix = name.split(".experts.mlp.")
        tensors |= {prefix + pattern.format(e=e, w=matrix): piece.clone() for e, piece in enumerate(tensor.chunk(3))}
    return tensors


def of_another_width(router: int) -> dict[str, torch.Tensor]:
    """As transformers 5.0 to 5.14 make them: experts of ffn_config.hidden_size columns, a router over `router`."""
    experts = {n: torch.zeros(3 * 10, 7) for n in weights() if ".experts." in n}
    return weights() | experts | {n: torch.zeros(3, router) for n in weights() if ".router." in n}


def eight_bit() -> dict[str, torch.Tensor]:
    return {n: t.to(torch.float8_e4m3fn) if ".experts." in n else t for n, t in weights().items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (split_experts(".local_experts.{e}.{w}.weight"), "experts under names that are not known"),
        (split_experts(".experts.mlp.experts.{e}.{w}.qweight"), "AWQ"),
        (split_experts(".experts.{e}.{w}.absmax"), "quantized weights of another program"),
        (renamed("Wqkv.weight", "Wqkv.weight_scale"), "quantized weights of another program"),
        (renamed("mlp.w1", "mlp.w1_scale_inv"), "quantized weights of another program"),
        (renamed("Wqkv.weight", "Wqkv.lora_A.weight"), "LoRA adapter"),
        (renamed("transformer.blocks", "model.layers"), "another architecture"),
        (of_another_width(router=24), r"the experts have \[7\] columns, d_model is 24"),
        (of_another_width(router=10), r"the experts have \[7\] columns, d_model is 24"),
        (eight_bit(), r"6 tensors \(\S+ \(F8_E4M3\), .* and 3 more\) have no float type"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path, tensors))
    with pytest.raises(ModelError, match=message) as error:
        checkpoint.check(CONFIG)
    assert error.value.message.startswith(str(tmp_path / SINGLE_NAME))
    assert error.value.hint


def test_a_config_of_another_size_is_told_in_one_line(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path, weights()))
    with pytest.raises(ModelError) as error:
        checkpoint.check(DbrxConfig.from_dict({**CONFIG.to_dict(), "n_layers": 3}))
    assert error.value.message.count("transformer.blocks.2.") == 3
    assert "8 tensors" in error.value.message and "and 5 more) are missing" in error.value.message
    with pytest.raises(ModelError, match=r"19 tensors, too few for 2000 layers"):
        checkpoint.check(DbrxConfig.from_dict({**CONFIG.to_dict(), "n_layers": 2000}))
    with pytest.raises(
        ModelError, match=r"lm_head.weight has shape|wte.weight has shape \[50, 24\].*asks for \[51, 24\]"
    ):
        checkpoint.check(DbrxConfig.from_dict({**CONFIG.to_dict(), "vocab_size": 51}))


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        ([], "holds no weights", "dbrx download"),
        (["pytorch_model.bin"], r"pytorch_model\.bin: pickle files are not loaded", "convert"),
        (["dbrx.gguf"], "holds a GGUF file", r"-m .*dbrx\.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter", "--adapter"),
        (["model-00001-of-00002.safetensors"], "index.json is missing", "copy the files again"),
        (["dbrx.safetensors"], r"dbrx\.safetensors: is not called model\.safetensors", "rename"),
    ],
)
def test_a_folder_without_the_files_says_what_it_holds(
    tmp_path: Path, names: list[str], message: str, hint: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert error.value.hint is not None
    assert re.search(hint, error.value.hint)


def test_what_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match="is a GGUF file"):
        Checkpoint.open(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="no such folder"):
        Checkpoint.open(tmp_path / "missing")


def test_a_tensor_that_is_not_finite_is_found_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.first_not_finite(60) is None
        wanted = list(checkpoint.tensors.values())[7]
        assert checkpoint.first_not_finite(-1) is None  # no time
    with wanted.file.open("r+b") as file:
        file.seek(wanted.start + wanted.nbytes - 2)
        file.write(b"\xc0\x7f")  # NaN of bfloat16
    with Checkpoint.open(folder) as checkpoint:
        found = checkpoint.first_not_finite(60)
        assert found is not None and (found.name, found.file) == (wanted.name, wanted.file)
