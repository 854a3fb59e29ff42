"""`--resume`: kill -9 at any moment, the same command again, and the text of a run that nobody disturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_cli.engine import resume as resume_module
from tests.cli import Cli
from tests.forks import Forks

pytestmark = pytest.mark.slow  # whole runs and sessions

torch.set_num_threads(1)

LONG = " ".join(
    f"{i} and {i * 7}," for i in range(90)
)  # a prompt of several chunks: a kill may strike while it is read
SAMPLED = ("-t", "1.2", "--repetition-penalty", "1.1", "--logprobs", "1", "--json")


def text_of(out: bytes) -> object:
    """What must be equal: the plain text, or of JSON all but the clock and what was read."""
    if not out.startswith(b"{"):
        return out
    answer = json.loads(out)
    return {key: answer[key] for key in ("text", "token_ids", "finish_reason", "logprobs", "seed")}


def kill_and_go_on(forks: Forks, folder: Path, command: tuple[str | Path, ...], kills: int, seed: int) -> None:
    """Kill a run `kills` times at random moments, each time starting it again, and compare what comes at last."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    began = time.monotonic()
    whole = forks.start(*command)
    assert whole.wait() == 0, whole.err
    seconds, expected = time.monotonic() - began, text_of(whole.out)
    state, sizes = folder / "state", []
    for _ in range(kills):
        run = forks.start(*command, "--resume", state)
        run.signal_after(seconds * rng.uniform(0.1, 0.9), signal.SIGKILL)
        assert run.wait() in (-signal.SIGKILL, 0)
        sizes.append(state.stat().st_size if state.exists() else 0)
    last = forks.start(*command, "--resume", state)
    assert last.wait() == 0, last.err
    assert text_of(last.out) == expected
    assert sizes == sorted(sizes)  # what was kept is not lost by the next kill
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), *(pytest.param(1, seed, marks=pytest.mark.soak) for seed in range(2, 22))]
)
def test_a_killed_run_goes_on_to_the_same_text(
    forks: Forks, tiny_checkpoint: Path, tmp_path: Path, kills: int, seed: int
) -> None:
    mode = SAMPLED if seed % 2 else ("-t", "0")
    command = ("generate", "-m", tiny_checkpoint, "--raw", "--seed", "4", "-n", "60", *mode, LONG[: 300 + 40 * seed])
    kill_and_go_on(forks, tmp_path, command, kills, seed)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_of_the_demo_goes_on(forks: Forks, demo_checkpoint: Path, tmp_path: Path, seed: int) -> None:
    mode = ("-t", "0.8", "--seed", "5") if seed % 2 else ("-t", "0")
    dtype = ("--dtype", "bfloat16" if seed % 4 < 2 else "float32")
    command = ("generate", "-m", demo_checkpoint, *dtype, "-n", "40", *mode, "Write about the sea. " * (1 + 6 * seed))
    kill_and_go_on(forks, tmp_path, command, 1, seed)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a block for every token."""
    monkeypatch.setattr(resume_module, "EVERY", 0.0)
    monkeypatch.setattr(resume_module, "SHARE", 1e9)


def command_of(folder: Path, state: Path, *more: str) -> tuple[str | Path, ...]:
    return ("generate", "-m", folder, "--raw", "-n", "9", *SAMPLED, "--resume", state, *more, "Seven seas")


def test_a_file_cut_anywhere_goes_on_to_the_same_text(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None
) -> None:
    """The seed of a run without --seed is kept as well."""
    state = tmp_path / "state"
    command = command_of(tiny_checkpoint, state)
    whole = cli(*command)
    content, rng = state.read_bytes(), random.Random(3)
    for _ in range(3):
        cut = rng.randrange(600, len(content))
        state.write_bytes(content[:cut])
        again = cli(*command)
        assert text_of(again.out.encode()) == text_of(whole.out.encode())
        assert json.loads(again.out)["usage"]["completion_tokens"] == 9
        bad = bytearray(content)
        bad[cut] ^= 0x55
        state.write_bytes(bad)
        assert text_of(cli(*command).out.encode()) == text_of(whole.out.encode())


def test_what_was_said_before_is_printed_again(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None) -> None:
    state, seed = tmp_path / "state", ("--seed", "3")
    plain = ("generate", "-m", tiny_checkpoint, "--raw", "-n", "9", *seed, "--resume", state, "Seven seas")
    whole = cli(*plain)
    content = state.read_bytes()
    finished = cli(*plain)
    assert finished.out == whole.out and "holds the whole reply" in finished.fault and finished.code == 0
    assert state.read_bytes() == content
    state.write_bytes(content[: len(content) * 2 // 3])
    half = cli(*plain)
    assert half.out == whole.out and "goes on behind" in half.fault


def test_a_stop_string_ends_a_reply_that_was_taken_up(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None
) -> None:
    state = tmp_path / "state"
    text = json.loads(cli(*command_of(tiny_checkpoint, tmp_path / "first", "--seed", "3")).out)["text"]
    command = command_of(tiny_checkpoint, state, "--seed", "3", "--stop", text[-4:-1])
    whole = cli(*command)
    content = state.read_bytes()
    for part in (0.4, 0.8, 0.97, 0.999):
        state.write_bytes(content[: int(len(content) * part)])
        again = cli(*command)
        assert text_of(again.out.encode()) == text_of(whole.out.encode())
    assert json.loads(whole.out)["finish_reason"] == "stop_string"


@pytest.mark.parametrize("lookup", ["off", "6"])
def test_a_constraint_goes_on_where_it_was(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None, lookup: str
) -> None:
    """The mask of a reply that is taken up knows what was said; drafts that it would refuse are never shown to it."""
    schema, state = tmp_path / "schema.json", tmp_path / "state"
    schema.write_text('{"type": "array", "items": {"enum": ["again and again", "once"]}, "minItems": 4, "maxItems": 6}')
    common = ("generate", "-m", tiny_checkpoint, "--dtype", "float32", "-n", "60", "-t", "0.8", "--seed", "2", "--json")
    command = (*common, "--schema", schema, "Say: again and again and again")
    plain = cli(*command)
    assert 4 <= len(json.loads(json.loads(plain.out)["text"])) <= 6
    whole = cli(*command, "--lookup", lookup, "--resume", state)
    assert text_of(whole.out.encode()) == text_of(plain.out.encode())
    content = state.read_bytes()
    for part in (0.4, 0.8):
        state.write_bytes(content[: int(len(content) * part)])
        again = cli(*command, "--lookup", lookup, "--resume", state)
        assert text_of(again.out.encode()) == text_of(plain.out.encode()), again.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--seed", "4"), "--seed"),
        (("-t", "0.3"), "--temperature"),
        (("-n", "8"), "--max-tokens"),
        (("--dtype", "float32"), "dtype"),
        (("--stop", "x"), "--stop"),
        (("--attn", "eager"), "attention"),
    ],
)
def test_another_runs_file_is_told_apart(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    state = tmp_path / "state"
    assert cli(*command_of(tiny_checkpoint, state)).code == 0
    before = state.read_bytes()
    other = cli(*command_of(tiny_checkpoint, state, *flags))
    assert other.code == 2 and f"another {named};" in other.fault and other.out == ""
    prompt = cli("generate", "-m", tiny_checkpoint, "--resume", state, "Another question")
    assert prompt.code == 2 and "another prompt" in prompt.fault
    assert state.read_bytes() == before


def test_foreign_files_links_and_two_at_once_are_refused(
    cli: Cli, forks: Forks, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "diary").write_text("Dear diary")
    (tmp_path / "link").symlink_to("diary")
    for name, told in (("diary", "no file of saved"), ("link", "link"), ("none/x", "No such file"), (".", "directory")):
        result = cli(*command_of(tiny_checkpoint, tmp_path / name))
        assert result.code in (1, 2) and told in result.fault and result.out == ""
    assert (tmp_path / "diary").read_text() == "Dear diary"
    state = tmp_path / "state"
    busy = forks.start("generate", "-m", tiny_checkpoint, "--raw", "-n", "500", "--resume", state, "x")
    while not (state.exists() and state.stat().st_size):
        time.sleep(0.001)
    os.kill(busy.pid, signal.SIGSTOP)  # amid the reply, with the file in use
    result = cli(*command_of(tiny_checkpoint, state))
    os.kill(busy.pid, signal.SIGKILL)
    busy.wait()
    assert result.code == 2 and "in use by another run" in result.fault


def test_a_full_disk_costs_the_file_and_not_the_reply(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume_module.os, "fsync", fsync)
    result = cli(*command_of(tiny_checkpoint, tmp_path / "state", "--seed", "3"))
    assert result.code == 0 and "No space left" in result.fault and calls == 4
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = cli(*command_of(tiny_checkpoint, tmp_path / "state", "--seed", "3"))
    assert text_of(again.out.encode()) == text_of(result.out.encode())


def test_damage_never_costs_what_the_file_holds(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flips and cuts at 120 places: what is whole is taken up; where the beginning is not, the file is kept aside."""
    made = list[resume_module.Journal]()
    begin = resume_module.Journal.__init__

    def keep_arguments(self: resume_module.Journal, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.arguments = arguments, named  # type: ignore[attr-defined]
        made.append(self)

    monkeypatch.setattr(resume_module.Journal, "__init__", keep_arguments)
    state = tmp_path / "state"
    assert cli(*command_of(tiny_checkpoint, state)).code == 0
    monkeypatch.undo()
    content, rng = state.read_bytes(), random.Random(5)
    (_, request, _, layout), _ = made[0].arguments  # type: ignore[attr-defined]
    with resume_module.Journal(state, request, 1, layout, print) as whole:
        ids, seed = whole.ids, whole.seed
    outcomes = set()
    for i in range(120):
        folder = tmp_path / str(i)
        folder.mkdir()
        at, bad = rng.randrange(len(content) if i % 2 else 3000), bytearray(content)
        if i % 3:
            bad[at] ^= 1 << rng.randrange(8)
        else:
            del bad[at:]
        path, told = folder / "state", list[str]()
        path.write_bytes(bad)
        with resume_module.Journal(path, request, 1, layout, told.append) as journal:
            assert journal.ids == ids[: len(journal.ids)]
        kept = folder / "state.damaged-1"
        outcomes.add("kept" if kept.exists() else "taken up")
        assert not kept.exists() or (kept.read_bytes() == bad and "kept as state.damaged-1" in told[0])
        assert kept.exists() or not bad or journal.seed == seed
    assert outcomes == {"kept", "taken up"}


def test_a_damaged_beginning_is_told_and_kept(cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None) -> None:
    state = tmp_path / "state"
    command = command_of(tiny_checkpoint, state, "--seed", "3")
    whole = cli(*command)
    content = state.read_bytes()
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    lengthened, misspelled = content[:3] + b"?" + content[4:], content[:12] + b"?" + content[13:]
    for number, bad in enumerate((flipped, content[:20], bytes(len(content)), lengthened, misspelled), 1):
        state.write_bytes(bad)
        again = cli(*command)
        assert again.code == 0 and f"kept as state.damaged-{number}" in again.fault
        assert text_of(again.out.encode()) == text_of(whole.out.encode())
        assert (tmp_path / f"state.damaged-{number}").read_bytes() == bad
    other = content[:8] + content[8:].replace(b'"program":"dbrx"', b'"format":"pt"', 1)
    for foreign in (content[:8], bytes(100) + b"boot", other):
        state.write_bytes(foreign)
        assert cli(*command).code == 2 and state.read_bytes() == foreign


@pytest.mark.parametrize("flag", ["--resume", "--prompt-cache"])
def test_a_file_of_something_else_is_refused_before_the_model_is_loaded(cli: Cli, tmp_path: Path, flag: str) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Dear diary")
    notes.chmod(0o644)
    result = cli("generate", "-m", tmp_path / "no-model", flag, notes, "hi")
    assert result.code == 2 and "no file of saved keys and values" in result.fault
    assert notes.read_text() == "Dear diary" and notes.stat().st_mode & 0o777 == 0o644


def test_the_notice_stands_before_the_text(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    command = ("generate", "-m", tiny_checkpoint, "--raw", "-n", "9", "--seed", "3", "--resume", state, "Seven seas")
    whole = cli(*command).out
    state.write_bytes(state.read_bytes()[: state.stat().st_size * 2 // 3])
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as on a terminal, where both go to one place
    both = cli(*command).out
    assert both.startswith("dbrx: ") and "goes on behind" in both.splitlines()[0]
    assert both.split("\n", 1)[1] == whole
