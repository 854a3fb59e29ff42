"""What goes into `dbrx generate`: files, stdin of any kind; and replies that a schema constrains."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from dbrx_cli.files import apart, attached
from model.errors import InputError
from model.messages import MAX_TEXT
from tests.cli import COMMAND, ROOT, Cli, environment
from tests.test_constrain import PERSON

pytestmark = pytest.mark.slow  # whole runs and sessions


def tokens(cli: Cli, folder: Path, *args: str | Path, stdin: bytes = b"") -> int:
    """How many tokens the prompt has."""
    result = cli("generate", "-m", folder, "-n", "1", "-t", "0", "--json", "--no-log", *args, stdin=stdin)
    assert (result.code, result.err) == (0, "")
    count: int = json.loads(result.out)["usage"]["prompt_tokens"]
    return count


def test_files_go_before_the_prompt_under_their_names(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "ü b.md").write_text("```\ncode\n````\n")
    (tmp_path / "empty").write_text("")
    names = [str(tmp_path / name) for name in ("a.txt", "ü b.md", "empty")]
    expected = (
        f"{names[0]}:\n```\none\ntwo\n```\n\n{names[1]}:\n`````\n```\ncode\n````\n`````\n\n{names[2]}:\n```\n\n```"
    )
    assert attached(names, "strict") == expected
    assert apart(f"{expected}\n\nwhat is it?\n```\n\n") == (names, "what is it?\n```\n\n")
    flags = [word for name in names for word in ("-f", name)]
    asked = tokens(cli, tiny_checkpoint, *flags, "What?")
    assert asked == tokens(cli, tiny_checkpoint, f"{expected}\n\nWhat?")
    assert tokens(cli, tiny_checkpoint, *flags, stdin=b"What?\n") == asked
    assert tokens(cli, tiny_checkpoint, *flags[:2]) == tokens(cli, tiny_checkpoint, attached(names[:1], "strict"))


FILES: dict[str, tuple[str, str]] = {
    "missing": ("none", "No such file"),
    "folder": ("", "Is a directory"),
    "pipe": ("pipe", "not a plain file"),
    "device": ("/dev/zero", "not a plain file"),
    "not UTF-8": ("latin", "latin is not UTF-8: byte 0xe9 at offset 3"),
    "too large": ("large", "more than 4 MiB"),
    "NUL in the name": ("a\0b", "cannot be read"),
    "unreadable name": ("\udcff", "cannot be read"),
}


@pytest.mark.parametrize("flag", ["--file", "--schema"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_text(cli: Cli, tmp_path: Path, name: str, flag: str) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "large").write_bytes(b"a" * (MAX_TEXT + 1))
    os.mkfifo(tmp_path / "pipe")
    file, message = FILES[name]
    result = cli("generate", "-m", "/no/model", flag, f"{tmp_path}/{file}" if file[:1] != "/" else file, "hi")
    assert (result.code, result.out) == (2, "") and message in result.fault


def test_files_that_are_not_utf8_can_be_let_in(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert tokens(cli, tiny_checkpoint, "-f", tmp_path / "latin", "--input-errors", "replace") > 0


def test_files_that_are_too_long_together() -> None:
    with pytest.raises(InputError, match="at most 4 MiB"):
        attached([str(ROOT / "LICENSE")] * 1000, "strict")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"a" * 100_000_000, 2), (b"a" * 1_000_000, 6), (b" " * 1_000_000 + b"a", 6), (b"\0" * 1_000_000, 6),
     ("🎉".encode() * 250_000, 6), (b"\xff" * 1_000_000, 2)],
    ids=["100 MB", "a million a", "a million spaces", "a million NUL", "a quarter million emoji", "a million 0xff"],
)  # fmt: skip
def test_huge_input_is_refused_in_time(cli: Cli, tiny_checkpoint: Path, data: bytes, code: int) -> None:
    """In ten seconds, of this process's own: other work on the machine does not count."""
    begun = time.process_time()
    result = cli("generate", "-m", tiny_checkpoint, "-n", "1", "-t", "0", "--no-log", stdin=data)
    assert time.process_time() - begun < 10
    assert (result.code, result.out) == (code, "") and result.fault.startswith("dbrx: ")


def test_input_without_an_end_is_refused(tiny_checkpoint: Path) -> None:
    script = f"yes | {' '.join(COMMAND)} generate -m {tiny_checkpoint}"
    done = subprocess.run(["bash", "-c", script], env=environment(), cwd=ROOT, capture_output=True, timeout=30)
    assert done.returncode == 2 and done.stderr.decode() == "dbrx: stdin holds more than 4 MiB; pipe a part of it\n"


@pytest.mark.parametrize("data", [b"\0", b"a\0b", b"\xef\xbb\xbfhi", b"\r\n x", "\u2028\ufffd\U0010ffff".encode()])
def test_odd_text_is_text(cli: Cli, tiny_checkpoint: Path, data: bytes) -> None:
    assert tokens(cli, tiny_checkpoint, stdin=data) > 0


def schema_file(tmp_path: Path, schema: Any) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return path


FLAGS = ((), ("--raw",), ("-t", "1.2", "--seed", "3"), ("--repetition-penalty", "1.5"))


@pytest.mark.parametrize(("kind", "flags"), [("demo", ()), *(("tiny", flags) for flags in FLAGS)])
def test_a_reply_fits_its_schema(
    request: pytest.FixtureRequest, cli: Cli, tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    bounded = {**PERSON, "properties": {**PERSON["properties"], "name": {"type": "string", "maxLength": 6}}}
    path = schema_file(tmp_path, bounded)
    result = cli(
        "generate", "-m", checkpoint, "-t", "0", "-n", "90", "--schema", path, "--json", "--no-log", *flags,
        "Invent a person, as JSON.",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["finish_reason"] == "stop"
    Draft202012Validator(bounded).validate(json.loads(answer["text"]))


def test_forms_of_a_constrained_reply(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    common = ("generate", "-m", tiny_checkpoint, "-t", "0", "--no-log", "--schema",
              schema_file(tmp_path, {"const": {"a": [1, "é"]}}), "hi")  # fmt: skip
    plain = cli(*common)
    assert plain.code == 0 and json.loads(plain.out) == {"a": [1, "é"]} and plain.out.endswith("}\n")
    assert cli(*common, "--no-stream").out == plain.out
    events = [json.loads(line) for line in cli(*common, "--jsonl").out.splitlines()]
    assert "".join(event["text"] for event in events if event["event"] == "token") + "\n" == plain.out
    assert events[-1]["finish_reason"] == "stop"
    cut = json.loads(cli(*common, "-n", "2", "--json").out)
    assert cut["finish_reason"] == "length" and plain.out.startswith(cut["text"])
    stopped = json.loads(cli(*common, "--stop", "1", "--json").out)
    assert stopped["finish_reason"] == "stop_string" and stopped["text"] == plain.out[: plain.out.index("1")]


@pytest.mark.parametrize(
    ("schema", "message"),
    [("", "is not valid JSON"), ("[1]", "must be an object"), ({"type": "strin"}, "strin"), ({"not": {}}, "not"),
     ({"type": "string", "pattern": "(?<=a)b"}, "look"), ("\ud83d", "JSON")],
)  # fmt: skip
def test_a_bad_schema_is_told_before_a_model_is_loaded(cli: Cli, tmp_path: Path, schema: Any, message: str) -> None:
    path = tmp_path / "s"
    text = schema if isinstance(schema, str) else json.dumps(schema)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = cli("generate", "-m", "/no/model", "--schema", path, "hi")
    assert result.code == 2 and (message in result.fault or "UTF-8" in result.fault) and "/s" in result.fault
