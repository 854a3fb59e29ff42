"""Settings: which source wins, what is refused and how it is told, and what `dbrx config` leaves in the file."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dbrx_cli.app import app
from dbrx_cli.options import EngineOptions, ModelOptions, SamplingOptions
from dbrx_cli.settings import SETTINGS
from dbrx_cli.settings_file import SettingsFile
from tests.cli import COMMAND, ROOT, Cli, environment


@pytest.fixture
def file(cli: Cli) -> Path:
    """The settings file of this test."""
    return Path(os.environ["DBRX_CONFIG"])


def in_force(cli: Cli, *args: str) -> dict[str, Any]:
    result = cli("config", "show", "--json", *args)
    assert result.code == 0, result.err
    values: dict[str, Any] = json.loads(result.out)
    return values


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelOptions, Any]]:
    """What reaches `generate` and `chat` in place of a model: the options."""
    from dbrx_cli.commands import chat, generate
    from model.errors import ModelError

    seen: list[tuple[ModelOptions, Any]] = []

    def open_engine(options: ModelOptions, report: Any, *_: Any, **__: Any) -> None:
        seen.append((options, report))
        raise ModelError("that is all")

    for module in (chat, generate):
        monkeypatch.setattr(module, "open_engine", open_engine)
    return seen


def test_every_flag_of_model_and_sampling_is_a_setting() -> None:
    from dataclasses import fields

    for group in (EngineOptions, SamplingOptions):
        for field in fields(group):
            setting = SETTINGS[field.name]
            assert setting.flag == "--" + field.name.replace("_", "-")
            assert setting.variable == "DBRX_" + field.name.upper()
    assert {"quiet", "verbose", "no_color"} <= SETTINGS.keys()


def test_flag_then_environment_then_profile_then_file_then_default(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[ModelOptions, Any]]
) -> None:
    def threads(*args: str) -> int | None:
        assert cli("generate", *args, "hi").code == 3
        return seen[-1][0].threads

    assert threads() is None
    file.write_text("threads = 1\ncontext = 50\n[profiles.big]\nthreads = 2\n")
    assert threads() == 1
    assert threads("--profile", "big") == 2 and seen[-1][0].context == 50
    monkeypatch.setenv("DBRX_PROFILE", "big")
    assert threads() == 2
    monkeypatch.setenv("DBRX_THREADS", "3")
    assert threads() == 3
    assert threads("--threads", "4") == 4


def test_each_kind_of_value_arrives(
    cli: Cli, file: Path, seen: list[tuple[ModelOptions, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('model = "demo"\nattn = "eager"\ncontext = 9\nquiet = true\nmax_memory = "cpu=1GB"\n')
    cli("generate", "hi")
    options, report = seen[-1]
    assert (options.model, options.attn, options.context, options.max_memory) == ("demo", "eager", 9, "cpu=1GB")
    assert report.quiet
    monkeypatch.setenv("DBRX_QUIET", "0")
    cli("chat")
    assert not seen[-1][1].quiet


def test_sampling_from_the_file(cli: Cli, file: Path, tiny_checkpoint: Path) -> None:
    args = ("generate", "-m", tiny_checkpoint, "--json", "hi")
    file.write_text('temperature = 0\nmax_tokens = 12\nno_log = true\nstop = ["@@ @"]\n'.replace("no_log = true\n", ""))
    greedy = cli(*args)
    assert greedy.code == 0 and json.loads(greedy.out)["usage"]["completion_tokens"] <= 12
    text = json.loads(greedy.out)["text"]
    file.write_text(f"temperature = 0\nmax_tokens = 12\nstop = {json.dumps([text[3:6]])}\n")
    stopped = json.loads(cli(*args).out)
    assert stopped["finish_reason"] == "stop_string" and stopped["text"] == text[: text.index(text[3:6])]


def test_empty_variables_count_as_unset(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[ModelOptions, Any]]
) -> None:
    for setting in SETTINGS.values():
        monkeypatch.setenv(setting.variable, "")
    monkeypatch.setenv("DBRX_PROFILE", "")
    assert cli("generate", "hi").code == 3 and seen[-1][0] == EngineOptions()
    assert all(setting["origin"] == "default" for setting in in_force(cli).values())


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("# hot\n\ntemprature = 1", 3, "there is no setting 'temprature'; did you mean temperature?"),
        ("max-tokens = 1", 1, "there is no setting 'max-tokens'; did you mean max_tokens?"),
        ("[profiles.a]\nseed = 1\n[profiles.b]\nsede = 1", 4, "'sede'; did you mean seed?"),
        ("[profile.a]\nseed = 1", 1, "'profile'; did you mean profiles?"),
        ('threads = "2"', 1, "threads must be a whole number, not '2'"),
        ("threads = true", 1, "threads must be a whole number, not True"),
        ("temperature = '1'", 1, "temperature must be a number"),
        ("quiet = 1", 1, "quiet must be true or false, not 1"),
        ("model = 1", 1, "model must be text in quotes"),
        ("stop = [1]", 1, "stop must be a list of texts"),
        ("attn = 'fast'", 1, "attn must be one of auto, eager, sdpa, flash, not 'fast'"),
        ("'model' = {a = 1}", 1, "model must be text in quotes"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_with_its_line(
    cli: Cli, file: Path, text: str, line: int, message: str
) -> None:
    file.write_text(text)
    for args in (("generate", "hi"), ("chat",), ("config", "show"), ("config", "set", "seed", "1")):
        result = cli(*args)
        assert result.code == 2 and f"{file}, line {line}: " in result.fault and message in result.fault
    assert file.read_text() == text
    assert cli("generate", "--help").code == 0 and cli("config", "path").out == f"{file}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a b", "is not TOML: "),
        (b"a = 1\na = 2", "is not TOML: "),
        (b"seed = " + b"9" * 5000, "is not TOML: "),
        (b"seed = 0x" + b"f" * 5000, "at most 64 bits"),
        (b"model = '\xff'", "is not UTF-8: offset 9"),
        (b"profiles = 1", "profiles are tables"),
        (b"[[profiles.a]]", "profiles are tables"),
        (b"a = " + b"[" * 5000, "is not TOML: "),
    ],
)
def test_a_file_that_is_no_settings_file(cli: Cli, file: Path, text: bytes, message: str) -> None:
    file.write_bytes(text)
    result = cli("generate", "hi")
    assert result.code == 2 and str(file) in result.fault and message in result.fault


@pytest.mark.slow
@hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab[].=\"'\n #123profilesmodel{},"), max_size=40) | st.text(max_size=20))
def test_any_file_ends_in_values_or_one_line(cli: Cli, file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = cli("config", "show")
    assert (result.code, bool(result.err)) in ((0, False), (2, True)) and "Traceback" not in result.err


def test_other_faults_name_their_source(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    file.write_text("threads = 0\n\n[profiles.hot]\ntop_p = 7\n")
    assert f"--threads must be from 1 to 1024, not 0 (set by {file}, line 1)" in cli("generate", "hi").fault
    hot = cli("generate", "-m", tiny_checkpoint, "--threads", "1", "--profile", "hot", "hi")
    assert hot.code == 2 and f"(set by {file}, line 4)" in hot.fault
    file.unlink()
    for variable, value in {
        "DBRX_THREADS": "many",
        "DBRX_CONTEXT": "0",
        "DBRX_QUIET": "maybe",
        "DBRX_ATTN": "x",
    }.items():
        monkeypatch.setenv(variable, value)
        result = cli("generate", "hi")
        assert result.code == 2 and f"(set by {variable})" in result.fault, result.err
        monkeypatch.delenv(variable)
    typed = cli("generate", "--threads", "many", "hi")
    assert typed.code == 2 and "set by" not in typed.fault


def test_the_documented_file_is_one() -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    found = SettingsFile.parse(Path("config.toml"), text).values("precise")
    assert found["temperature"].value == 0 and found["temperature"].origin == "config.toml, line 7"
    assert found["stop"].value == ["\nUser:"]


def test_profiles(cli: Cli, file: Path) -> None:
    file.write_text("[profiles.precise]\ntemperature = 0\n[profiles.empty]\n")
    assert in_force(cli, "--profile", "empty")["temperature"]["value"] is None
    wrong = cli("generate", "--profile", "precice", "hi")
    assert wrong.code == 2 and wrong.fault.endswith("did you mean precise?") and str(file) in wrong.fault


def test_config_show_says_where_each_value_comes_from(cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("seed = 1\ntemperature = 0.5\n[profiles.p]\ntemperature = 2\nstop = 'x'\n")
    monkeypatch.setenv("DBRX_SEED", "7")
    shown = in_force(cli, "--profile", "p")
    assert shown["seed"] == {"value": "7", "origin": "DBRX_SEED"}
    assert shown["temperature"] == {"value": 2, "origin": f"{file}, line 4"}
    assert shown["stop"] == {"value": ["x"], "origin": f"{file}, line 5"}
    assert shown["attn"] == {"value": "auto", "origin": "default"}
    lines = cli("config", "show").out.splitlines()
    assert f"temperature\t0.5\t{file}, line 2" in lines and "top_k\t\tdefault" in lines
    assert len(lines) == len(SETTINGS)


def test_set_and_unset_keep_the_rest(cli: Cli, file: Path) -> None:
    text = "# mine\nseed = 1  # lucky\n\n[profiles.p] # for work\ntop_k = 3\n"
    file.write_text(text)
    file.chmod(0o644)
    assert cli("config", "set", "model", "demo").code == 0
    assert tomllib.loads(file.read_text()) == {"seed": 1, "model": "demo", "profiles": {"p": {"top_k": 3}}}
    assert all(part in file.read_text() for part in ("# mine\n", "seed = 1  # lucky", "# for work"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli("config", "unset", "model").code == 0
    assert file.read_text() == text
    missing = cli("config", "unset", "model")
    assert missing.code == 2 and "model is not set" in missing.fault


def test_values_are_written_in_their_kind(cli: Cli, file: Path) -> None:
    assert not file.exists()
    for key, *words in (
        ("seed", "5"),
        ("frequency_penalty", "-0.5"),
        ("quiet", "true"),
        ("stop", "a b", "c"),
        ("lookup", "4"),
    ):
        assert cli("config", "set", key, *words).code == 0
    for profile in ("fast", "with space"):
        assert cli("config", "set", "attn", "sdpa", "--profile", profile).code == 0
    expected = {"seed": 5, "frequency_penalty": -0.5, "quiet": True, "stop": ["a b", "c"], "lookup": "4"}
    profiles = {"fast": {"attn": "sdpa"}, "with space": {"attn": "sdpa"}}
    assert tomllib.loads(file.read_text()) == expected | {"profiles": profiles}
    assert (
        cli("config", "set", "-q", "seed", "6").err == ""
        and cli("config", "set", "seed", "7").fault == f"dbrx: wrote {file}"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("temprature", "1"), "did you mean temperature?"),
        (("threads", "0"), "from 1 to 1024"),
        (("temperature", "-1"), "temperature must be"),
        (("top_p", "nan"), "top_p must be"),
        (("seed", "many"), "seed must be a whole number, not 'many'"),
        (("seed", "1", "2"), "seed takes one value"),
        (("quiet", "maybe"), "quiet must be true or false"),
        (("attn", "fast"), "attn must be one of"),
        (("max_memory", "lots"), "0=70GiB"),
        (("stop", ""), "--stop must not be empty"),
        (("model", "\udcff"), "model is not UTF-8"),
    ],
)
def test_a_value_that_no_command_takes_is_not_written(
    cli: Cli, file: Path, args: tuple[str, ...], message: str
) -> None:
    result = cli("config", "set", *args)
    assert result.code == 2 and message in result.fault and not file.exists()


def test_the_file_is_private_under_any_umask(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b" / "config.toml"
    monkeypatch.setenv("DBRX_CONFIG", str(path))
    before = os.umask(0)
    try:
        assert cli("config", "set", "seed", "1").code == 0
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700] and os.listdir(path.parent) == ["config.toml"]


def test_a_link_of_ones_own_is_kept(cli: Cli, file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles" / "dbrx.toml"
    kept.parent.mkdir()
    kept.write_text("# kept\n")
    file.symlink_to(kept)
    assert cli("config", "set", "seed", "1").code == 0
    assert file.is_symlink() and kept.read_text() == "# kept\nseed = 1\n"


def test_a_place_that_cannot_be_written(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DBRX_CONFIG", str(tmp_path / "file" / "config.toml"))
    result = cli("config", "set", "seed", "1")
    assert result.code in (1, 2) and str(tmp_path / "file") in result.fault


def test_changes_at_the_same_time_are_all_kept(cli: Cli, file: Path) -> None:
    """In threads of this process: flock is per descriptor, so they wait as processes do."""
    from concurrent.futures import ThreadPoolExecutor

    from dbrx_cli.settings import setting
    from dbrx_cli.settings_file import change

    keys = ["seed", "top_k", "threads", "context", "max_tokens"]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda key: change(setting(key), 5, None), keys))
    assert tomllib.loads(file.read_text()) == dict.fromkeys(keys, 5)


def test_no_colour(cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    cli("sessions", "list", "--no-color")
    assert os.environ["NO_COLOR"] == "1"
    monkeypatch.setenv("NO_COLOR", "")
    file.write_text("no_color = true")
    cli("sessions", "list")
    assert os.environ["NO_COLOR"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["40", "100"])
def test_help_fits_the_terminal(columns: str) -> None:
    """Every flag is there whole, on a terminal of any width."""
    from typer.main import get_command

    shown = [p for p in get_command(app).commands["generate"].params if not p.hidden]  # type: ignore[attr-defined]
    names = [flag for p in shown for flag in p.opts if flag.startswith("--")]
    run = subprocess.run(
        [*COMMAND, "generate", "--help"], cwd=ROOT, env=environment(COLUMNS=columns), capture_output=True, text=True
    )
    assert run.returncode == 0 and all(name in run.stdout for name in names)
    prose = [line for line in run.stdout.splitlines() if "|" not in line]
    assert all(len(line) <= int(columns) for line in prose)
