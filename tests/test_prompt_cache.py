"""Saved keys and values: the same to the bit, private, and refused where anything differs."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dbrx_cli.engine import Done, Request
from dbrx_cli.engine import fingerprint as fingerprint_module
from dbrx_cli.engine import saved as saved_module
from dbrx_cli.engine.fingerprint import fingerprint
from dbrx_cli.engine.local import LocalEngine
from dbrx_cli.options import ModelOptions, OutputOptions
from dbrx_cli.report import Report
from model import Message, SamplingParams
from model.errors import DbrxError, InputError, ResourceError
from tests.cli import Cli

pytestmark = pytest.mark.slow  # whole runs and sessions

torch.set_num_threads(1)

PARAMS = SamplingParams(temperature=0, max_tokens=12)
TEXT = "Which rivers flow through Basel, Köln and Rotterdam?"


def engine_of(folder: Path, notices: list[str] | None = None, **options: Any) -> LocalEngine:
    engine = LocalEngine.load(
        ModelOptions(model=str(folder), **({"quantize": "none"} | options)), Report(OutputOptions(quiet=True))
    )
    if notices is not None:
        engine.notice = notices.append
    return engine


def ask(engine: LocalEngine, *texts: str, params: SamplingParams = PARAMS) -> Done:
    """The reply to a conversation, user and assistant in turn, with the numbers behind each token."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], text) for i, text in enumerate(texts)]  # type: ignore[arg-type]
    *_, done = engine.stream(Request(messages, params, logprobs=3))
    assert isinstance(done, Done)
    return done


@pytest.fixture
def saved(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Done]:
    """A cache that was saved after one reply, and the reply."""
    engine = engine_of(tiny_checkpoint)
    done = ask(engine, TEXT)
    engine.save_cache(tmp_path / "cache")
    return tmp_path / "cache", done


def test_a_hit_equals_a_miss_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    """The same prompt again: every logprob of every token, not only the text."""
    engine, params = engine_of(checkpoint), replace(PARAMS, max_tokens=6)
    miss = ask(engine, TEXT, params=params)
    engine.save_cache(tmp_path / "cache")
    other = engine_of(checkpoint)
    assert other.load_cache(tmp_path / "cache") == miss.usage.prompt_tokens + 5
    hit = ask(other, TEXT, params=params)
    assert hit.usage.cached_tokens == miss.usage.prompt_tokens
    assert (hit.token_ids, hit.logprobs) == (miss.token_ids, miss.logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversation_goes_on_as_if_it_had_never_left_memory(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    engine = engine_of(tiny_checkpoint, dtype=dtype)
    first = ask(engine, TEXT)
    engine.save_cache(tmp_path / "cache")
    stayed = ask(engine, TEXT, first.text, "And through Wien?")
    other = engine_of(tiny_checkpoint, dtype=dtype)
    other.load_cache(tmp_path / "cache")
    taken_up = ask(other, TEXT, first.text, "And through Wien?")
    assert taken_up.usage == stayed.usage and stayed.usage.cached_tokens > 0
    assert (taken_up.token_ids, taken_up.logprobs) == (stayed.token_ids, stayed.logprobs)
    if dtype == "float32":
        afresh = ask(engine_of(tiny_checkpoint, dtype=dtype), TEXT, first.text, "And through Wien?")
        assert afresh.token_ids == taken_up.token_ids


def test_only_what_is_used_is_stored(saved: tuple[Path, Done], tiny_checkpoint: Path) -> None:
    """The file is safetensors, as the library of that name reads it."""
    path, done = saved
    tokens = done.usage.prompt_tokens + 11
    with safe_open(path, "pt") as file:
        assert {tuple(file.get_slice(f"{kind}.{layer}").get_shape()) for kind in "kv" for layer in range(3)} == {
            (tokens, 1, 8)
        }
        assert len(file.get_tensor("ids")) == tokens
        size = sum(file.get_tensor(name).nbytes for name in file.keys())
        assert set(json.loads(file.metadata()["made_by"])) >= {"revision", "model", "tokenizer", "chat template"}
    assert path.stat().st_size < size + 3000


NAMES = (
    "version of dbrx", "version of PyTorch", "revision", "configuration", "model", "adapter", "chat template",
    "tokenizer", "dtype", "quantization", "kernels", "attention", "device",
)  # fmt: skip


def test_every_part_of_the_fingerprint_counts(
    saved: tuple[Path, Done], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    engine = engine_of(tiny_checkpoint, notices)
    real = fingerprint(engine)
    assert tuple(real) == NAMES
    for name in NAMES:
        monkeypatch.setattr(fingerprint_module, "fingerprint", lambda _, name=name: real | {name: "other"})
        assert engine.load_cache(saved[0]) == 0
        assert notices.pop() == f"{saved[0]} was made with another {name}; the text is read anew"
    monkeypatch.setattr(fingerprint_module, "fingerprint", lambda _: real)
    assert engine.load_cache(saved[0]) > 0 and not notices


def real_changes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Change a checkpoint in one way after another: what a notice must name, and the options to load it with."""
    yield "dtype", {"dtype": "float32"}
    yield "attention", {"attn": "eager"}
    yield "revision", {"revision": "v2"}
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    yield "chat template", {}
    (folder / "chat_template.jinja").unlink()
    added = {"100300": {"content": "<|new|>", "special": True}}
    config = folder / "tokenizer_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"added_tokens_decoder": added}))
    yield "tokenizer", {}
    config.write_text(before)
    network = folder / "config.json"
    before = network.read_text()
    values = json.loads(before)
    values["attn_config"]["rope_theta"] = 10000
    network.write_text(json.dumps(values))
    yield "configuration", {}
    network.write_text(before)
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    yield "model", {}


def test_a_changed_checkpoint_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TiktokenTokenizerWrapper"}')
    engine = engine_of(folder)
    ask(engine, TEXT)
    engine.save_cache(tmp_path / "cache")
    for name, options in real_changes(folder):
        notices: list[str] = []
        engine = engine_of(folder, notices, **options)
        assert engine.load_cache(tmp_path / "cache") == 0
        assert notices == [f"{tmp_path / 'cache'} was made with another {name}; the text is read anew"]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_no_flipped_byte_is_trusted(saved: tuple[Path, Done], tiny_checkpoint: Path, count: int) -> None:
    path, _ = saved
    good, rng = path.read_bytes(), random.Random(8)
    header = 8 + int.from_bytes(good[:8], "little")
    notices: list[str] = []
    engine = engine_of(tiny_checkpoint, notices)
    for i in range(count):
        place = rng.randrange(header) if i % 2 else rng.randrange(len(good))
        bad = bytearray(good)
        bad[place] ^= rng.randrange(1, 256)
        path.write_bytes(bad)
        try:
            assert engine.load_cache(path) == 0, place
            assert str(path) in notices.pop()
        except InputError as error:  # not even known as one of ours
            assert "no file of saved keys" in error.message and place < 64
    assert not engine.session.ids and not notices


def test_no_shortened_or_lengthened_file_is_trusted(saved: tuple[Path, Done], tiny_checkpoint: Path) -> None:
    path, _ = saved
    good, notices = path.read_bytes(), list[str]()
    engine = engine_of(tiny_checkpoint, notices)
    for bad in (b"", good[:70], good[:1000], good[:-1], good + b"\0", good + good):
        path.write_bytes(bad)
        assert engine.load_cache(path) == 0 and "damaged" in notices.pop()
    path.write_bytes(good)
    assert engine.load_cache(path) > 0


def test_files_are_private_and_links_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_of(tiny_checkpoint)
    ask(engine, TEXT)
    mask = os.umask(0)
    try:
        engine.save_cache(tmp_path / "cache")
    finally:
        os.umask(mask)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o600
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    for act in (engine.save_cache, engine.load_cache):
        with pytest.raises(DbrxError, match="link"):
            act(tmp_path / "link")
        with pytest.raises(InputError, match="no file of saved"):
            act(tmp_path / "precious")
    for path in (tmp_path / "none" / "cache", tmp_path):
        with pytest.raises(DbrxError) as fault:
            engine.save_cache(path)
        assert fault.value.exit_code in (1, 2)
    assert (tmp_path / "precious").read_text() == "precious"
    assert engine.load_cache(tmp_path / "missing") == 0


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_save_that_fails_leaves_the_old_file(
    saved: tuple[Path, Done], tiny_checkpoint: Path, stopped_by: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    before = path.read_bytes()
    engine = engine_of(tiny_checkpoint)
    ask(engine, "Something else.")

    def fail(_: int) -> None:
        raise stopped_by

    monkeypatch.setattr(saved_module.os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, ResourceError)):
        engine.save_cache(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["cache"]


def test_a_reply_that_was_whole_leaves_a_cache_and_one_that_never_began_none(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    common = ("generate", "-m", tiny_checkpoint, "-t", "0", "-n", "4", "--json", TEXT)
    resume, cache = ("--resume", tmp_path / "state"), ("--prompt-cache", tmp_path / "cache")
    assert cli(*common, *resume).code == 0
    assert "holds the whole reply" in cli(*common, *resume, *cache).fault
    again = cli(*common, *cache)
    usage = json.loads(again.out)["usage"]
    assert not again.err and usage["cached_tokens"] == usage["prompt_tokens"] - 1
    engine = engine_of(tiny_checkpoint)
    reading = engine.stream(Request(TEXT, PARAMS, on_read=interrupted))
    assert next(reading).finish_reason == "interrupted"  # type: ignore[union-attr]
    engine.save_cache(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def interrupted(*_: int) -> None:
    raise KeyboardInterrupt


def test_generate_reads_only_what_is_new(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    common = ("generate", "-m", tiny_checkpoint, "-t", "0", "-n", "8", "--json", "--prompt-cache", tmp_path / "cache")
    first, again, other = (json.loads(cli(*common, text).out) for text in (TEXT, TEXT, TEXT + " And why?"))
    assert first["usage"]["cached_tokens"] == 0 and again["usage"]["cached_tokens"] == again["usage"]["prompt_tokens"]
    assert again["token_ids"] == first["token_ids"]
    assert 5 < other["usage"]["cached_tokens"] < other["usage"]["prompt_tokens"]
    stale = cli(*common, "--attn", "eager", TEXT)
    assert stale.code == 0 and "another attention" in stale.fault
    (tmp_path / "cache").write_text("a diary")
    refused = cli(*common, TEXT)
    assert refused.code == 2 and "name another file" in refused.fault and refused.out == ""
