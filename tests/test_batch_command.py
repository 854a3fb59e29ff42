"""`generate --batch`: the same answers as one by one, files that can be gone on with, lines that are no prompts."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli import Cli, Result
from tests.forks import FileFork, Forks

pytestmark = pytest.mark.slow  # whole runs and sessions

COMMON = ("-t", "0", "-n", "8", "--dtype", "float32", "--batch-size", "3")
QUESTIONS = ["What is the capital of France?", "Count to five.", "hi", "Name a fruit. " * 20, "Who wrote Hamlet?"]


def write_lines(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), "utf-8")
    return path


def records(text: str) -> list[dict[str, Any]]:
    """In the order of the prompts."""
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda record: record["index"])


def run(cli: Cli, folder: Path, prompts: Path, *args: str | Path) -> Result:
    return cli("generate", "-m", folder, *COMMON, "--batch", prompts, *args)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])


def test_answers_are_those_of_one_by_one(cli: Cli, tiny_checkpoint: Path, prompts: Path) -> None:
    result = run(cli, tiny_checkpoint, prompts)
    assert (result.code, result.err) == (0, "")
    together = records(result.out)
    assert [record["index"] for record in together] == list(range(len(QUESTIONS)))
    for question, record in zip(QUESTIONS, together, strict=True):
        alone = json.loads(cli("generate", "-m", tiny_checkpoint, *COMMON[:-2], "--json", "--no-log", question).out)
        assert {"index", "prompt_sha256", "asked", *alone} == set(record)
        for key in ("text", "token_ids", "finish_reason", "model", "dtype"):
            assert record[key] == alone[key], key
        assert record["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    # Beside the first one all take over what the template puts before each message.
    assert together[0]["usage"]["cached_tokens"] == 0
    assert all(record["usage"]["cached_tokens"] >= 3 for record in together[1:3])


def test_messages_ids_and_own_sampling(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def one(*args: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            cli("generate", "-m", tiny_checkpoint, "--dtype", "float32", "--json", "--no-log", *args).out
        )
        return answer

    text = one("-t", "0", "-n", "8", "hi")["text"]
    lines = [
        {"id": "a", "prompt": "hi", "max_tokens": 3},
        {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
        {"prompt": "hi", "temperature": 1.5, "top_p": 1, "seed": 4},
        {"prompt": "hi", "stop": text[3:6]},
        {"prompt": "hi", "temperature": 1.5, "top_p": 1, "stop": ["~none~"]},
    ]
    result = run(cli, tiny_checkpoint, write_lines(tmp_path / "p", lines), "--seed", "11", "--logprobs", "2")
    a, b, c, d, e = records(result.out)
    assert a["id"] == "a" and a["usage"]["completion_tokens"] == 3 and len(a["logprobs"]) == 3
    assert b["id"] == 7 and b["text"] == one("-t", "0", "-n", "8", "-s", "Be brief.", "hi")["text"]
    assert "id" not in c and c["text"] == one("-t", "1.5", "--top-p", "1", "-n", "8", "--seed", "4", "hi")["text"]
    assert d["finish_reason"] == "stop_string" and d["text"] == text[: text.index(text[3:6])]
    again = one("-t", "1.5", "--top-p", "1", "-n", "8", "--seed", "15", "hi")
    assert e["seed"] == 11 + 4 and e["text"] == again["text"]


def test_schema_and_raw(cli: Cli, tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no", 3]}')
    for record in records(run(cli, tiny_checkpoint, prompts, "--schema", schema, "--raw").out):
        assert json.loads(record["text"]) in ("yes", "no", 3) and record["finish_reason"] == "stop"


def test_a_reply_that_gets_stuck_is_one_fault_in_one_line(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No letter can be spelled that the pattern wants: what came is kept, and in a batch each line tells it."""
    schema = tmp_path / "schema.json"
    properties = {"k": {"const": 1}, "s": {"type": "string", "pattern": r"^a[^\b\t\n\f\r\x20-\u{10ffff}]$"}}
    schema.write_text(json.dumps({"type": "object", "properties": properties, "required": ["k", "s"]}))
    lines = [{"prompt": "hi"}, {"prompt": "ho"}, {"prompt": "long " * 700}]
    result = run(cli, tiny_checkpoint, write_lines(tmp_path / "p", lines), "-n", "40", "--schema", schema)
    assert result.code == 1 and [record["error"]["code"] for record in records(result.out)] == [2, 2, 6]
    alone = ("generate", "-m", tiny_checkpoint, *COMMON[:-2], "-n", "40", "--schema", schema, "hi")
    answer = json.loads(cli(*alone, "--json").out)
    assert answer["text"].startswith("{") and answer["error"]["code"] == 2
    for flags in ((), ("--no-stream",)):
        stuck = cli(*alone, *flags)
        assert (stuck.code, stuck.out) == (2, answer["text"] + "\n") and "cannot be completed" in stuck.fault


def test_an_output_file_is_gone_on_with(cli: Cli, tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(cli, tiny_checkpoint, prompts, "--output", out) == Result(0, "", "")
    whole = records(out.read_text())
    lines = out.read_bytes().splitlines(keepends=True)
    for cut in (0, 1, 9, 60, len(lines[3]) - 1):
        out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
        again = run(cli, tiny_checkpoint, prompts, "--output", out)
        assert again.code == 0 and "3 of 5 prompts were answered before" in again.fault
        assert out.read_bytes().startswith(b"".join(lines[:3]))
        assert [(r["index"], r["text"]) for r in records(out.read_text())] == [(r["index"], r["text"]) for r in whole]
    before = out.read_bytes()
    assert "all 5 prompts" in run(cli, Path(str(tiny_checkpoint)), prompts, "--output", out).fault
    assert out.read_bytes() == before


def test_ids_say_what_is_answered_wherever_it_stands(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", [{"id": name, "prompt": name * 3} for name in "abc"]
    run(cli, tiny_checkpoint, write_lines(tmp_path / "p", lines[:2]), "--output", out)
    result = run(cli, tiny_checkpoint, write_lines(tmp_path / "p", [lines[2], lines[1], lines[0]]), "--output", out)
    assert result.code == 0 and "2 of 3" in result.fault
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == ["a", "b", "c"]


def test_lines_that_are_no_prompts_do_not_keep_the_others(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ("{", "valid"), ("[]", "no JSON object"), ({}, "either prompt or messages"), ({"prompt": " "}, "not empty"),
        ({"prompt": "x", "promt": 1}, "'promt'"), ({"prompt": "x", "id": 1.5}, "id must be"),
        ({"prompt": "x", "temperature": -1}, "temperature"), ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "top_p": "1"}, "top_p"), ({"prompt": "x", "stop": [""]}, "stop"),
        ({"messages": [{"role": "user"}]}, "role"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"),
        ('{"prompt": "\\ud800"}', "Unicode"), ('{"prompt": "x", "id": "\\ud800"}', "Unicode"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"), ('{"prompt": "x", "seed": ' + "9" * 400 + "}", "seed"),
        ({"id": "long", "prompt": "word " * 700}, "the context is 640"), ("[" * 99_999, "deeply"),
    ]  # fmt: skip
    good = {"prompt": "hi", "max_tokens": 1}
    out = tmp_path / "out"
    file = write_lines(tmp_path / "p", [good, "", *(line for line, _ in bad), good])
    result = run(cli, tiny_checkpoint, file, "--output", out)
    assert result.code == 1 and f"{len(bad)} of {len(bad) + 2} prompts got no answer: line 3" in result.fault
    answers = records(out.read_text())
    assert "text" in answers[0] and "text" in answers[-1] and answers[-1]["index"] == len(bad) + 2
    for (_, word), record in zip(bad, answers[1:-1], strict=True):
        assert word in record["error"]["message"] and record["error"]["code"] in (2, 6), record
    # They are tried again, and their old records go.
    file = write_lines(tmp_path / "p", [good, "", *([good] * len(bad)), good])
    assert run(cli, tiny_checkpoint, file, "--output", out).code == 0
    assert [record["index"] for record in records(out.read_text())] == [0, *range(2, len(bad) + 3)]
    assert "error" not in out.read_text()


REFUSED: dict[str, tuple[list[str], str]] = {
    "missing file": (["--batch", "{tmp}/none"], "none"),
    "a folder": (["--batch", "{tmp}"], "Is a directory"),
    "a pipe": (["--batch", "{tmp}/pipe"], "not a plain file"),
    "an empty file": (["--batch", "{tmp}/empty"], "no prompt"),
    "no JSON at all": (["--batch", "{tmp}/text"], "line 1 is not valid JSON"),
    "an id twice": (["--batch", "{tmp}/twice"], "lines 1 and 2 have the same id"),
    "a prompt beside it": (["--batch", "{tmp}/good", "hi"], "--batch and a prompt"),
    "a file beside it": (["--batch", "{tmp}/good", "-f", "{tmp}/text"], "--batch and --file"),
    "another form": (["--batch", "{tmp}/good", "--jsonl"], "--batch and --jsonl"),
    "extract": (["--batch", "{tmp}/good", "-x"], "--batch and --extract"),
    "output alone": (["--output", "{tmp}/new", "hi"], "--output belongs to --batch"),
    "output is a folder": (["--batch", "{tmp}/good", "--output", "{tmp}"], "cannot be written"),
    "output in no folder": (["--batch", "{tmp}/good", "--output", "{tmp}/no/such"], "cannot be written"),
    "output is a pipe": (["--batch", "{tmp}/good", "--output", "{tmp}/pipe"], "not a plain file"),
    "output is something else": (["--batch", "{tmp}/good", "--output", "{tmp}/text"], "no file of answers"),
    "output is other JSON": (["--batch", "{tmp}/good", "--output", "{tmp}/good"], "no file of answers"),
    "output without an end": (["--batch", "{tmp}/good", "--output", "{tmp}/short"], "no file of answers"),
    "answers to other prompts": (["--batch", "{tmp}/good", "--output", "{tmp}/others"], "other prompts"),
    "answers of another model": (["--batch", "{tmp}/good", "--output", "{tmp}/model"], "another model"),
    "size": (["--batch", "{tmp}/good", "--batch-size", "0"], "--batch-size"),
    "bad schema": (["--batch", "{tmp}/good", "--schema", "{tmp}/text"], "is not valid JSON"),
    "bad sampling": (["--batch", "{tmp}/good", "--top-p", "7"], "top_p"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_said_at_once(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "good", [{"prompt": "hi"}])
    write_lines(tmp_path / "twice", [{"id": 1, "prompt": "hi"}, {"id": 1, "prompt": "ho"}])
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "text").write_text("dear diary\n")
    (tmp_path / "short").write_text("dear diary")
    other = {"index": 0, "text": "x", "model": str(tiny_checkpoint), "prompt_sha256": "0"}
    write_lines(tmp_path / "others", [other])
    write_lines(tmp_path / "model", [{**other, "model": "else"}])
    os.mkfifo(tmp_path / "pipe")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    args, message = REFUSED[name]
    result = cli("generate", "-m", tiny_checkpoint, "-n", "1", *(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert (result.code, result.out) == (2, "") and message in result.fault
    assert {path: path.read_bytes() for path in kept} == kept


def test_prompts_from_stdin(cli: Cli, tiny_checkpoint: Path) -> None:
    result = cli("generate", "-m", tiny_checkpoint, "-n", "1", "--batch", "-", stdin='{"prompt": "hi"}')
    assert result.code == 0 and len(records(result.out)) == 1


def test_two_processes_do_not_write_one_file(cli: Cli, tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    from dbrx_cli.answers import AnswerFile

    first = AnswerFile(tmp_path / "out", {}, "m")
    result = run(cli, tiny_checkpoint, prompts, "--output", tmp_path / "out")
    assert result.code == 2 and "another process" in result.fault
    first.close()


LONG = 30


def long_batch(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "p", [{"prompt": f"Say {i}.", "max_tokens": 1 + i * 5 % 60} for i in range(LONG)])


def begin(forks: Forks, folder: Path, tmp_path: Path) -> FileFork:
    """A batch of which some prompts are answered."""
    out = tmp_path / "out"
    process = forks.start("generate", "-m", folder, "-t", "0", "--batch", long_batch(tmp_path), "--output", out)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline, process.err
        time.sleep(0.02)
    return process


def test_ctrl_c_keeps_what_is_finished(forks: Forks, tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = begin(forks, tiny_checkpoint, tmp_path)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert process.wait() == 130 and time.monotonic() - asked < 20
    kept = records((tmp_path / "out").read_text())
    assert process.out == b"" and 3 <= len(kept) < LONG
    assert process.err == f"dbrx: {len(kept)} of {LONG} prompts are answered; the same command goes on\n"


def test_kill_9_and_the_same_command_again(cli: Cli, forks: Forks, tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = begin(forks, tiny_checkpoint, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    out = tmp_path / "out"
    with out.open("ab") as file:  # as if the kill had come in the middle of a write
        file.write(b'{"index": 5, "text": "never fin')
    again = cli("generate", "-m", tiny_checkpoint, "-t", "0", "--batch", tmp_path / "p", "--output", out)
    assert again.code == 0 and f"of {LONG} prompts were answered before" in again.fault
    assert [record["index"] for record in records(out.read_text())] == list(range(LONG))


def test_a_reader_that_leaves_is_no_fault(forks: Forks, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with forks.piped("generate", "-m", tiny_checkpoint, "-t", "0", "--batch", long_batch(tmp_path)) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == b""
