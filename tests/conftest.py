"""Fixtures that several tests share."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dbrx_cli import early
from dbrx_cli.output import PLAIN
from tests.cli import Cli
from tests.forks import Forks
from tests.stub_server import Server

# Tests start hundreds of processes, and pytest writes their asserts anew: each file is compiled once, whatever is set.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Two workers share two cores; and nothing may ask the Hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest-xdist tells its workers the width of its own terminal; programs here have terminals of theirs.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# A shell has commands behind `&` ignore these, and so would all that tests start and interrupt.
for number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)

# The same examples in every run, so that a change is judged by itself; `make soak` draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None, print_blob=True)
settings.load_profile("same")


def pytest_runtest_setup() -> None:
    early.interrupt()  # to import the program is to start it


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()  # a third of a million objects that stay: to walk through them again and again takes a minute in all
    gc.enable()
    if comparison := sys.modules.get("torch.testing._comparison"):
        vars(comparison)["_HAS_DTENSOR"] = False  # else the first assert_close imports sympy, which takes a second


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if config.option.markexpr == "soak":
        settings.load_profile("new")


# Tests compare with what others computed in floats. What is done by default has its own (test_default.py).
EXACT = {"DBRX_QUANTIZE": "none"}
# DBRX's shape: 16 experts choose 4, unevenly, six query heads a KV head; its vocabulary, so that its tokenizer fits.
TINY = {
    "model_type": "dbrx",
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 3,
    "max_seq_len": 640,
    "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0},
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that routes as DBRX does, with DBRX's vocabulary; sharded, bfloat16."""
    from tests.weights import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(folder, TINY, seed=7, dtype="bfloat16", shards=2)
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a vocabulary of 320, a token for each byte: to write and to read DBRX's own takes seconds."""
    from model.chat_template import CHATML
    from tests.test_tokenizer_files import folder_of, small_json
    from tests.weights import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    make_checkpoint(folder, TINY | {"d_model": 96, "vocab_size": 320}, seed=1, shards=1, eos_token_id=[256])
    return folder_of(folder, small_json(), tokenizer_class="GPT2Tokenizer", chat_template=CHATML)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model, fetched and converted once for all runs."""
    from dbrx_cli.demo import ensure_demo

    return ensure_demo(print, lambda done, total: None)


@pytest.fixture(scope="session")
def moe_checkpoint() -> Path:
    """The demo model whose routers choose, made once for all runs."""
    from dbrx_cli.demo import ensure_demo

    return ensure_demo(print, lambda done, total: None, "demo-moe")


@pytest.fixture(params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Both kinds of model: random weights that route 16-choose-4 unevenly, and real weights that use every expert."""
    folder: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test, nor a process that it starts, sees or changes the user's sessions and settings."""
    folder = tmp_path_factory.mktemp("user")
    os.environ["DBRX_DATA"] = str(folder / "data")
    os.environ["DBRX_CONFIG"] = str(folder / "config.toml")
    os.environ |= EXACT


@pytest.fixture(scope="session")
def forks(_nothing_of_the_users: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes that start at once."""
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """The command line inside this process, with sessions and settings of its own."""
    for name in [name for name in os.environ if name.startswith("DBRX_") and name != "DBRX_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DBRX_DATA", str(tmp_path / "dbrx-data"))
    monkeypatch.setenv("DBRX_CONFIG", str(tmp_path / "dbrx.toml"))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE"):  # other programs' models are not listed among a test's
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name, value in EXACT.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", PLAIN):  # flags tell them to the process; they are taken back with the others
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return Cli(monkeypatch, capsys)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server for --url, and a client that has little patience with it."""
    from dbrx_cli.engine import http_client
    from model.hub import retry

    for module, name, seconds in (
        (http_client, "FIRST_SECONDS", 1.0),
        (http_client, "IDLE_SECONDS", 0.4),
        (http_client, "CONNECT_SECONDS", 1.0),
        (http_client, "LIST_SECONDS", 1.0),
        (retry, "STALL_SECONDS", 0.5),
        (retry, "FIRST_PAUSE", 0.02),
    ):
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.delenv("DBRX_API_KEY", raising=False)
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()
