"""Promises 8, 23, 24 and 28 by chance: whatever strangers write ends as it should, or in one clean line, and soon."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from model.speed import Rates
from tests.cli import Cli, Result
from tests.stub_server import Handler, Send, Server
from tests.test_foreign_text import OBEYED, SEQUENCES
from tests.test_json_text import FILES, WRONG, places
from tests.weights import make_checkpoint

CONFIG = FILES["config.json"] | {"quantization_config": None}
SEED = 20_240_327
LONGEST_S = 3.0  # of CPU


def clean(ran: Result, codes: tuple[int, ...], what: object) -> None:
    """One of these codes; and on stderr nothing but whole lines of the program's own, that no terminal obeys."""
    assert ran.code in codes, (what, ran)
    assert not OBEYED.search(ran.err) and "internal error" not in ran.err and "Traceback" not in ran.err, (what, ran)
    assert all(line.startswith("dbrx: ") and len(line) < 1000 for line in ran.err.splitlines()), (what, ran.err)
    assert ran.code == 0 or ran.err, what


def soak(few: int, many: int) -> pytest.MarkDecorator:
    """A twentieth always, all of them at length."""
    marks = [pytest.mark.soak, pytest.mark.timeout(3600)]
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=marks)])


# Checkpoints


def altered(chance: random.Random, value: Any) -> Any:
    """A value of JSON with something wrong somewhere."""
    value = copy.deepcopy(value)
    where, key = chance.choice(list(places(value)))
    way = chance.randrange(4)
    if way == 0:
        del where[key]
    elif way == 1 and isinstance(where, dict):
        where[chance.choice(SEQUENCES)] = where.pop(key)
    else:
        where[key] = chance.choice(WRONG)
    return value


def in_bytes(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) or 1)
    some = chance.randbytes(chance.choice((1, 8, 200)))
    return chance.choice((
        content[:at], content[:at] + some + content[at:], content[:at] + some + content[at + len(some) :], content[at:],
        b"", some, content + content, b"{" * 5000, b"[]," * 10**6, b"\xff\xfe" + content, content.replace(b"0", b"9"),
    ))  # fmt: skip


def in_its_place(chance: random.Random, path: Path) -> None:
    path.unlink()
    chance.choice((
        lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path), lambda: path.symlink_to("/etc/passwd"), lambda: path.symlink_to("gone"),
        lambda: path.with_name(path.name + chance.choice(SEQUENCES).replace("\0", "")).touch(),
    ))()  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "small"
    make_checkpoint(folder, CONFIG, seed=3, dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(FILES[name]))
    return folder


@pytest.mark.filterwarnings("default")  # which become notices
@soak(25, 500)
def test_defects_of_checkpoints(cli: Cli, small: Path, tmp_path: Path, count: int) -> None:
    """Each costs less than 3 s of CPU and 200 MB, both beyond what a sound one does."""
    chance = random.Random(SEED)
    whole = {path.name: path.read_bytes() for path in small.iterdir()}
    command = ("generate", "--no-log", "-n", "1", "-m")
    clean(cli(*command, small, "hi"), (0,), "sound")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        name = chance.choice(sorted(whole))
        path = folder / name
        way = chance.randrange(4)
        if way < 2 and name in FILES:
            path.write_text(json.dumps(altered(chance, CONFIG if name == "config.json" else FILES[name])), "utf-8")
        elif way == 3:
            in_its_place(chance, path)
        else:
            path.write_bytes(in_bytes(chance, path.read_bytes()))
        began = time.process_time()
        ran = cli(*command, folder, "hi")
        clean(ran, (0, 2, 3, 5, 6), (number, name))
        assert time.process_time() - began < LONGEST_S, (number, name, ran)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base < 200 * 1024


# Servers

CHUNK = {
    "id": "x", "object": "chat.completion.chunk", "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "The sea"}, "finish_reason": None,
                 "logprobs": {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b"}]}]},
                 "token_ids": [1, 2]}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
}  # fmt: skip
LAST = {"choices": [{"index": 0, "delta": {"content": "."}, "finish_reason": "stop"}]}
MODELS = {
    "object": "list",
    "data": [{"id": "m", "max_model_len": 4096, "owned_by": "vllm", "aliases": ["n"]}, {"id": "o"}],
}


def odd(chance: random.Random) -> Send:
    """A reply with something wrong somewhere."""
    way = chance.randrange(5)
    events = [json.dumps(each) for each in (altered(chance, CHUNK), CHUNK, altered(chance, LAST))]
    raw = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
    if way == 0:
        raw = in_bytes(chance, raw)

    def reply(handler: Handler) -> None:
        if way == 1:
            code = chance.choice((100, 204, 206, 301, 304, 400, 402, 404, 418, 429, 500, 503, 599, 600))
            handler.answer(code, altered(chance, {"error": {"message": chance.choice(SEQUENCES) + "no", "code": 1}}))
        elif way == 2:
            handler.wfile.write(in_bytes(chance, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + raw))
        else:
            handler.answer(200, raw, content_type="text/event-stream")

    return reply


@soak(10, 200)
def test_odd_answers_of_a_server(server: Server, cli: Cli, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    chance = random.Random(SEED)
    monkeypatch.setattr("dbrx_cli.engine.http_client.HEAD_SECONDS", 0.5)
    for number in range(count):
        server.models = altered(chance, MODELS) if chance.random() < 0.5 else MODELS
        server.reply = odd(chance)
        flags = chance.choice(([], ["--json"], ["--jsonl"], ["--json", "--logprobs", "2"], ["-m", "n"]))
        ran = cli("generate", "--no-log", *flags, "--url", server.url, "hi")
        clean(ran, (0, 1, 2, 3, 4, 6, 7), number)
        if "--json" in flags and ran.out:
            json.loads(ran.out)


# Command lines

NUMBERS = ("-1", "0", "1", "nan", "inf", "1e308", "", " ", "9" * 400, "true", "auto", "int8", "cpu")
PLACES = ("org/gone", "/gone", ".", "..", "/dev/null", "/etc/passwd", "~nobody-at-all/x", "http://[")


def value(chance: random.Random) -> str:
    letters = "".join(chance.choice((*SEQUENCES, "é", "a", "/", "=", "[bold]")) for _ in range(3))
    return chance.choice((chance.choice(NUMBERS), chance.choice(PLACES), letters.replace("\0", "")))


LEFT_OUT = {"serve", "doctor"}  # they go on, or examine the whole machine


def line(chance: random.Random, group: Any) -> list[str]:
    """A command with flags of its own, and values that mostly do not fit."""
    words: list[str] = []
    while hasattr(group, "commands"):
        name = chance.choice(sorted(group.commands.keys() - LEFT_OUT))
        words.append(name)
        group = group.commands[name]
    flags = [parameter for parameter in group.params if str(parameter.opts[0]).startswith("-")]
    for parameter in chance.sample(flags, min(len(flags), chance.randrange(4))):
        words.append(chance.choice(parameter.opts))
        if not getattr(parameter, "is_flag", False) or chance.random() < 0.1:
            words.append(value(chance))
    return [*words, *(value(chance) for _ in range(chance.randrange(3)))]


@pytest.mark.filterwarnings("default")
@soak(25, 500)
def test_random_command_lines(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from dbrx_cli.app import app

    chance = random.Random(SEED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # This machine is no stranger, and to measure it takes seconds.
    monkeypatch.setattr("model.rates.measure", lambda *_, **__: Rates(1e10, 1e10, 1e-4))
    commands = typer.main.get_command(app)
    for number in range(count):
        words = line(chance, commands)
        ran = cli(*words, stdin=b"hi\n")
        what = (number, words)
        assert ran.code in (0, 1, 2, 3, 4, 5, 6, 7) and not OBEYED.search(ran.err), (what, ran)
        assert "internal error" not in ran.err and "Traceback" not in ran.err, (what, ran)
        assert ran.code == 0 or ran.err.splitlines()[-1].startswith("dbrx: ") or "Usage" in ran.err, (what, ran)
