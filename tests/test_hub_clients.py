"""The cache that `dbrx download` fills works for the other Hub clients, offline too, and theirs for it."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from model import hub as models

from .conftest import TINY
from .hub_server import FakeHub, checkpoint
from .test_hub import NAME
from .test_hub import server as hub_of_this_process
from .weights import make_checkpoint

server = hub_of_this_process  # the fixture


def test_huggingface_hub_offline(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though code, pickles and .gitattributes are listed and never fetched."""
    server.add(NAME, checkpoint() | {".gitattributes": b"*.safetensors filter=lfs\n"})
    folder, here = models.download(NAME), models.download(NAME, to=tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", folder.name):
        assert huggingface_hub.snapshot_download(NAME, revision=revision) == str(folder)
        assert huggingface_hub.snapshot_download(NAME, revision=revision, local_files_only=True) == str(folder)
        assert huggingface_hub.hf_hub_download(NAME, "config.json", revision=revision) == str(folder / "config.json")
        assert huggingface_hub.snapshot_download(NAME, revision=revision, local_dir=here) == str(here)
    assert not (folder.parents[1] / "trees").exists()  # that is where the library would look what is missing
    cached = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert [repo.repo_id for repo in cached.repos] == [NAME] and not cached.warnings and not cached.incomplete_files


def test_huggingface_hub_completes_what_is_there(server: FakeHub) -> None:
    """Online it fetches what was left out, and keeps a listing of its own; both listings are right."""
    folder = models.download(NAME)
    sent = server.bytes_sent
    assert huggingface_hub.snapshot_download(NAME, endpoint=server.endpoint) == str(folder)
    left_out = ("modeling_dbrx.py", "pytorch_model.bin")
    assert server.bytes_sent - sent == sum(len(checkpoint()[name]) for name in left_out)
    assert models.download(NAME, verify=True) == folder


LIBRARIES = {
    "transformers, torch": """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        assert AutoConfig.from_pretrained(name).d_model == 48
        assert AutoTokenizer.from_pretrained(name)("hi")["input_ids"] == [71, 72]
        assert AutoModelForCausalLM.from_pretrained(name).config.n_layers == 3
    """,
    "mlx_lm": """
        from mlx_lm import load
        network, tokenizer = load(name)
        assert tokenizer.encode("hi") == [71, 72]
    """,
    "huggingface_hub": """
        import huggingface_hub
        folder = huggingface_hub.snapshot_download(name)
        assert huggingface_hub.hf_hub_download(name, "config.json") == folder + "/config.json"
        assert not huggingface_hub.scan_cache_dir().warnings
    """,
}


@pytest.mark.reference
@pytest.mark.timeout(900)
@pytest.mark.parametrize("library", LIBRARIES)
def test_other_programs_offline(server: FakeHub, tmp_path: Path, library: str) -> None:
    """Needs REFERENCE_PYTHONS: interpreters, with : between them; those that lack the library are left out."""

    source = make_checkpoint(tmp_path / "source", TINY | {"vocab_size": 264}, seed=7, dtype="bfloat16", shards=2)
    (source / "tokenizer.json").write_text(json.dumps(bytes_tokenizer()))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    server.add(NAME, files | {".gitattributes": b"x\n", "modeling_dbrx.py": b"1\n", "pytorch_model.bin": b"x"})
    models.download(NAME)
    environment = os.environ | {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    tried = 0
    for python in filter(None, os.environ.get("REFERENCE_PYTHONS", "").split(":")):
        found = f"from importlib.util import find_spec; exit(not all(map(find_spec, {library.split(', ')})))"
        if subprocess.run([python, "-c", found]).returncode:
            continue
        code = f"name = {NAME!r}\n" + textwrap.dedent(LIBRARIES[library])
        ran = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, (python, ran.stderr[-2000:])
        tried += 1
    if not tried:
        pytest.skip("REFERENCE_PYTHONS names no interpreter that has it")


def bytes_tokenizer() -> dict[str, object]:
    """Each byte is a token, by its rank in the order of GPT-2's alphabet."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(other))]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    return {
        "version": "1.0", "normalizer": None, "pre_tokenizer": step, "post_processor": None, "decoder": step,
        "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
