"""Which answers in a file of `--output` still count, and lines that fail beside others."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dbrx_cli.batch import stream_jobs
from dbrx_cli.engine import Delta, Done, Request, Timings, Usage
from dbrx_cli.engine.remote import RemoteEngine
from model.errors import ConnectionFault, ContextError, DbrxError, InputError
from model.sampling import SamplingParams
from tests.cli import Cli, Result, start
from tests.stub_server import Server

DONE = Done("", [], "stop", Usage(1, 0, 1), Timings(0, 0, 0, 0, 0), "m", None, "remote", "remote", "remote", 0)


class Engine(RemoteEngine):
    """Answers with the prompt, but where it names a fault."""

    name = "named by the server"
    context = 1000
    faults: ClassVar[dict[str, DbrxError]] = {
        "refused": DbrxError("the server refuses the request (400): temperature must be at most 2", "leave it out"),
        "long": ContextError("the prompt has 9999 tokens"),
        "stuck": InputError("no token could come next"),
        "gone": ConnectionFault("the server cannot be reached"),
    }

    def __init__(self) -> None:
        self.defaults = SamplingParams()
        self.asked = list[Request]()

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        self.asked.append(request)
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
        if text in self.faults:
            raise self.faults[text]
        text = text.removeprefix("silence")
        yield Delta(text, None)
        yield replace(DONE, text=text, model=self.name)

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr("dbrx_cli.commands.generate.open_engine", lambda *_: engine)
    return engine


class Batch:
    """`generate --batch` of some lines, again and again into one file."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self.cli, self.folder, self.out = cli, folder, folder / "out.jsonl"
        (folder / "schema").write_text('{"type": "object"}')
        (folder / "other").write_text('{"type": "array"}')

    def __call__(self, lines: list[Any], *flags: str | Path) -> Result:
        (self.folder / "prompts").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.cli(
            "generate", "--batch", self.folder / "prompts", "--output", self.out, "--batch-size", "1", *flags
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture
def batch(cli: Cli, tmp_path: Path, engine: Engine) -> Batch:
    return Batch(cli, tmp_path)


URL = ("--url", "http://127.0.0.1:1")
LINES = [{"id": "a", "prompt": "one"}, {"prompt": "two", "temperature": 0.5}]
CHANGES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "system": (("-s", "French."), ("-s", "German."), "--system"),
    "system left out": (("-s", "French."), (), "--system"),
    "no system": ((), ("--no-system",), "--no-system"),
    "raw": ((), ("--raw",), "--raw"),
    "schema": (("--schema", "{tmp}/schema"), ("--schema", "{tmp}/other"), "--schema"),
    "temperature": (("-t", "0"), ("-t", "1.5"), "--temperature"),
    "seed": (("--seed", "1"), ("--seed", "2"), "--seed"),
    "length": (("-n", "3"), ("-n", "4"), "--max-tokens"),
    "stop": (("--stop", "x"), ("--stop", "x", "--stop", "y"), "--stop"),
    "penalty": ((), ("--presence-penalty", "1"), "--presence-penalty"),
    "two at once": (("-t", "0"), ("--top-p", "0.5"), "--top-p, --temperature"),
    "log-probabilities": ((), ("--logprobs", "2"), "--logprobs"),
    "context": ((), ("--context", "64"), "--context"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_that_were_asked_otherwise_do_not_count(
    batch: Batch, engine: Engine, tmp_path: Path, name: str
) -> None:
    first, then, told = CHANGES[name]
    first, then = (tuple(flag.replace("{tmp}", str(tmp_path)) for flag in flags) for flags in (first, then))
    assert batch(LINES, *URL, *first).code == 0
    before = batch.out.read_text()
    again = batch(LINES, *URL, *first)
    assert again.code == 0 and "all 2 prompts were answered before" in again.fault and len(engine.asked) == 2
    changed = batch([*LINES, {"prompt": "three"}], *URL, *then)
    assert changed.code == 2 and f"asked with another {told} (line 1)" in changed.fault and "--output" in changed.fault
    assert batch.out.read_text() == before and len(engine.asked) == 2


def test_what_a_line_asks_of_its_own_counts(batch: Batch) -> None:
    assert batch(LINES, *URL, "-t", "0.5").code == 0
    assert batch([LINES[0], {"prompt": "two"}], *URL, "-t", "0.5").code == 0  # the same by another way
    assert "--top-k (line 2)" in batch([LINES[0], LINES[1] | {"top_k": 3}], *URL, "-t", "0.5").fault
    assert "--stop (line 1)" in batch([LINES[0] | {"stop": "x"}, LINES[1]], *URL, "-t", "0.5").fault
    assert "other prompts (line 1)" in batch([LINES[0] | {"prompt": "x"}, LINES[1]], *URL, "-t", "0.5").fault


def test_a_model_here_is_told_by_its_files_and_form(batch: Batch, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A folder of the same name with other weights, another template or another adapter is another model."""
    folder, adapter = tmp_path / "m", tmp_path / "adapter"
    shutil.copytree(tiny_checkpoint, folder)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    Engine.name, name = str(folder), Engine.name
    try:
        ask = ("-m", folder, "--adapter", adapter)
        assert batch(LINES, *ask).code == 0
        assert "all 2" in batch(LINES, *ask, "--threads", "2", "--attn", "eager", "--lookup", "4").fault
        assert "another --dtype" in batch(LINES, *ask, "--dtype", "float32").fault
        assert "another --quantize" in batch(LINES, *ask, "--quantize", "int8").fault
        assert "another --adapter" in batch(LINES, *ask[:2]).fault
        (adapter / "adapter_config.json").write_text('{"r": 8}')
        assert "another --adapter" in batch(LINES, *ask).fault
        (adapter / "adapter_config.json").write_text("{}")
        (folder / "generation_config.json").write_text('{"temperature": 0.1}')
        assert "another version of the model's files" in batch(LINES, *ask).fault
        assert "another model's answers" in batch(LINES, "-m", tiny_checkpoint).fault
    finally:
        Engine.name = name


def test_a_server_may_move(batch: Batch, engine: Engine) -> None:
    """Without -m the model is the one that the server names, also when the file is gone on with."""
    assert batch(LINES, *URL).code == 0 and batch.records[0]["model"] == engine.name
    assert "all 2" in batch(LINES, "--url", "http://127.0.0.1:2").fault
    engine.name = "another"
    assert "another model's answers" in batch(LINES, *URL).fault


def test_answers_that_do_not_say_how_they_were_asked(batch: Batch) -> None:
    assert batch(LINES, *URL).code == 0
    old = [{key: value for key, value in record.items() if key != "asked"} for record in batch.records]
    batch.out.write_text("".join(json.dumps(record) + "\n" for record in old))
    again = batch(LINES, *URL)
    assert again.code == 2 and "an earlier version" in again.fault and len(batch.records) == 2


def test_an_id_is_never_taken_for_an_index(batch: Batch, engine: Engine) -> None:
    lines = [{"prompt": "a"}, {"id": "#0", "prompt": "b"}, {"id": 0, "prompt": "c"}, {"id": "0", "prompt": "d"},
             {"id": "", "prompt": "e"}, {"id": "#5", "prompt": "f"}, {"prompt": "g"}]  # fmt: skip
    assert batch(lines, *URL).code == 0
    again = batch(lines, *URL)
    assert again.code == 0 and "all 7 prompts" in again.fault and len(engine.asked) == 7


def test_an_answer_moves_with_its_id(batch: Batch, engine: Engine) -> None:
    lines = [{"id": name, "prompt": name} for name in ("a", "b")]
    assert batch(lines, *URL, "--seed", "5").code == 0
    before = batch.records
    assert batch([{"id": "new", "prompt": "new"}, *lines], *URL, "--seed", "5").code == 0 and len(engine.asked) == 3
    assert {record["id"]: record["index"] for record in batch.records} == {"new": 0, "a": 1, "b": 2}
    assert batch.records[:2] == [record | {"index": record["index"] + 1} for record in before]


def test_a_file_that_another_process_has_replaced_is_opened_anew(
    batch: Batch, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one mends the file between this one's opening it and locking it."""
    assert batch(LINES, *URL).code == 0
    lock, mended = fcntl.flock, batch.folder / "mended"

    def replace_first(file: int, how: int) -> None:
        if mended.exists():
            mended.replace(batch.out)
        lock(file, how)

    shutil.copy(batch.out, mended)
    monkeypatch.setattr(fcntl, "flock", replace_first)
    assert batch([*LINES, {"prompt": "three"}], *URL).code == 0 and len(engine.asked) == 3
    assert [record["text"] for record in batch.records] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "line",
    ['{"index": 0, "id": [1], "text": ""}', '{"index": 0, "id": {}, "text": ""}', '{"index": [0], "text": ""}',
     '{"index": 0, "id": true, "text": ""}', '{"index": null, "text": ""}', '{"index": 0, "id": 1.5, "error": {}}',
     '{"index": ' + "[" * 99_999, '{"index": 0}'],
)  # fmt: skip
def test_lines_of_a_wrong_sort_are_no_answers(batch: Batch, line: str) -> None:
    batch.out.write_text(line + "\n")
    result = batch(LINES, *URL)
    assert result.code == 2 and "no file of answers (line 1)" in result.fault
    assert batch.out.read_text() == line + "\n"


@pytest.mark.parametrize("word", ["refused", "long", "stuck"])
def test_a_line_that_is_refused_does_not_end_the_batch(batch: Batch, engine: Engine, word: str) -> None:
    lines = [{"prompt": "one"}, {"prompt": word}, {"prompt": "three"}]
    result = batch(lines, *URL)
    assert result.code == 1 and "a prompt got no answer" in result.fault
    assert [record.get("text") for record in batch.records] == ["one", None, "three"]
    assert batch.records[1]["error"]["code"] == engine.faults[word].exit_code
    assert batch(lines, *URL).code == 1 and len(engine.asked) == 4  # the fault alone is tried again


def test_empty_replies_are_counted(batch: Batch) -> None:
    result = batch([{"prompt": "one"}, {"prompt": "silence"}, {"prompt": "silence"}], *URL)
    assert result.code == 0 and "2 of 3 replies are empty" in result.fault


def test_a_server_that_is_gone_ends_the_batch(batch: Batch) -> None:
    result = batch([{"prompt": "one"}, {"prompt": "gone"}, {"prompt": "three"}], *URL)
    texts = [record["text"] for record in batch.records]  # the third prompt is answered at the same time, or not at all
    assert result.code == 7 and texts in (["one"], ["one", "three"])


def test_an_empty_reply_is_told(cli: Cli, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"stop": "the model ended it", "length": "--max-tokens ended it", "stop_string": "a stop string ended it"}

    def say(done: Done) -> None:
        def stream(request: Request) -> Generator[Delta | Done, None, None]:
            yield Delta(done.text, None)
            yield done

        monkeypatch.setattr(engine, "stream", stream)

    for text in ("", " \n"):
        for reason, told in reasons.items():
            say(replace(DONE, text=text, finish_reason=reason))  # type: ignore[arg-type]
            for flags in ((), ("--raw",), ("--json",), ("--no-stream",)):
                result = cli("generate", *URL, "--no-log", *flags, "hi")
                assert result.code == 0 and f"the reply is empty: {told} before any text" in result.fault
            assert cli("generate", *URL, "--no-log", "-q", "hi").err == ""
            assert "no fenced code block" in cli("generate", *URL, "--no-log", "-x", "hi").fault
    say(replace(DONE, text="```\n```"))
    result = cli("generate", *URL, "--no-log", "-x", "hi")
    assert result.code == 0 and "the code block is empty" in result.fault


def test_a_stream_is_answered_as_it_comes(server: Server) -> None:
    """The other end sends its next prompt only when it has the answer to the last."""
    process = start("generate", "--url", server.url, "-m", "dbrx-a", "--no-log", "--batch", "-")
    assert process.stdin and process.stdout and process.stderr
    for number in range(3):
        process.stdin.write(b'{"prompt": "hi"}\n\n{"prompt":' if number else b'{"prompt": "hi"}\n{"prompt":')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"]
        process.stdin.write(b' "there"}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"]
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")


def test_streams_of_something_else_end() -> None:
    noise = io.BytesIO(b"x\n" * 10**5)
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        next(stream_jobs(noise, "stdin", "strict"))
    assert noise.tell() < 10**5
    blank = io.BytesIO(b" \n" * 10**6 * 2)
    with pytest.raises(InputError, match="holds no prompt"):
        next(stream_jobs(blank, "stdin", "strict"))
    assert blank.tell() < 3 * 10**6
    with pytest.raises(InputError, match=r"line 1 has \d+ entries"):
        next(stream_jobs(io.BytesIO(b"[" + b"[]," * 10**6 + b"[]]"), "stdin", "strict"))
    line = io.BytesIO(b"x" * 2 * 10**7)
    with pytest.raises(InputError, match="line 1 has more than"):
        next(stream_jobs(line, "stdin", "strict"))
    assert line.tell() < 10**7
    jobs = stream_jobs(io.BytesIO(b'\n{"prompt": "a", "id": 1}\n' * 2), "stdin", "strict")
    with pytest.raises(InputError, match="lines 2 and 4 have the same id 1"):
        next(jobs)
