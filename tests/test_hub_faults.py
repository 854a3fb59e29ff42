"""Downloads on a bad network, killed, in parallel, and where the token goes (promises 1 to 5 and 7)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from model import hub as models
from model.errors import ConnectionFault, DbrxError, ModelError
from model.hub import retry

from .cli import SOON
from .hub_client import Clients
from .hub_server import ALWAYS, FakeHub, Fault, Repo, checkpoint, fake_hub

pytestmark = pytest.mark.slow  # whole runs and sessions

NAME = "acme/tiny-dbrx"
SHARD = "model-00002-of-00003.safetensors"
SIZE = 100_000
TOKEN = "hf_CANARYcanaryCANARY"
SOAK = pytest.mark.soak

BODY = ["close", "reset", "stall", "drip", "no length", "short", "long", "flip"]
ANSWER = ["hang up", "silence", "garbage", "header drip", "html", "loop"]


def status(code: int, target: str = "bytes", **headers: str) -> Fault:
    """An answer with this status."""
    return Fault("status", target, at=code, headers=headers)


FAULTS = [
    *(Fault(kind, at=SIZE // 2, path=SHARD) for kind in BODY),
    *(Fault(kind, "bytes", path=SHARD) for kind in ANSWER[:-1]),
    *(Fault(kind, "file", path=SHARD) for kind in ANSWER),
    *(Fault(kind, "revision") for kind in ANSWER),
    *(Fault(kind, "tree") for kind in ANSWER),
    *(status(code, target) for code in (429, 500, 503) for target in ("revision", "tree", "file", "bytes")),
    Fault("status", at=403, path=SHARD),  # the link to the storage ran out
    status(416),
    status(429, "bytes", **{"Retry-After": "0"}),
    status(503, "revision", **{"Retry-After": "0"}),
    status(429, "tree", RateLimit='"api";r=0;t=0'),
    Fault("no range", path=SHARD),
    Fault("wrong range", path=SHARD),
]


def fault_id(fault: Fault) -> str:
    return f"{fault.kind}-{fault.target}-{fault.at}-{len(fault.headers)}".replace(" ", "_")


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as running:
        running.add(NAME, checkpoint())
        yield running


# Scaled from 30 seconds to about 2.
IMPATIENT = {
    "STALL_SECONDS": 1.2,
    "CRAWL_SECONDS": 0.4,
    "OVERDUE_SECONDS": 0.5,
    "FIRST_PAUSE": 0.02,
    "LONGEST_PAUSE": 0.3,
}
USUAL = {name: getattr(retry, name) for name in IMPATIENT}


@pytest.fixture
def inside(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub of this process, with little patience."""
    assert retry.STALL_SECONDS + retry.OVERDUE_SECONDS < 30
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False, "HF_HUB_DOWNLOAD_TIMEOUT": 0.4,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(retry, name, value)
    yield server
    huggingface_hub.close_session()


def try_faults(server: FakeHub, cases: Sequence[tuple[Fault, int]], workers: int) -> list[DbrxError | None]:
    """Download under each fault, so many times; whatever comes of it, the next attempt, a usual one, succeeds."""
    names = [f"acme/fault-{i}" for i in range(len(cases))]
    with ThreadPoolExecutor(workers) as pool:
        told = list(pool.map(lambda name, case: try_fault(server, name, *case), names, cases))
    with pytest.MonkeyPatch.context() as usual, ThreadPoolExecutor(workers) as pool:
        for name, value in USUAL.items():
            usual.setattr(retry, name, value)
        list(pool.map(lambda name: heal(server, name), names))
    return told


def try_fault(server: FakeHub, name: str, fault: Fault, times: int) -> DbrxError | None:
    """What a download under a fault ends with: soon, and nothing bad has its final name."""
    content = checkpoint(shard_bytes=SIZE)
    server.add(name, content)
    faults = [Fault(fault.kind, fault.target, fault.at, times, fault.path, fault.headers)]
    if fault.kind.endswith("range"):  # these need a download that was cut before
        faults.insert(0, Fault("close", at=SIZE // 3, times=times, path=SHARD))
    server.repos[name].faults = faults
    begun, error = time.monotonic(), None
    try:
        models.download(name)
    except DbrxError as fault_told:
        error = fault_told
    assert time.monotonic() - begun < SOON, "no end in time"
    if error is not None:
        assert "\n" not in error.message and len(error.message) < 300
        with pytest.raises(ModelError):
            models.resolve(name, download=False)
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    for path in cache.glob("snapshots/*/*"):
        assert path.read_bytes() == content[path.name], path.name
    return error


def heal(server: FakeHub, name: str) -> None:
    """Without the fault, the same command completes the download."""
    server.repos[name].faults = []
    folder = models.download(name)
    assert models.missing_files(folder) == [] and models.verify_cached(folder) == []


def test_passing_faults_are_survived(inside: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "STALL_SECONDS", 3.0)  # two silences take 0.9, and a busy machine takes its own time
    told = dict(zip(map(fault_id, FAULTS), try_faults(inside, [(fault, 2) for fault in FAULTS], 12), strict=True))
    # A server that sends its headers byte by byte is waited for until patience ends: no read of the socket times out.
    assert {name for name, error in told.items() if error is not None} <= {
        f"header_drip-{target}-0-0" for target in ("revision", "tree", "file", "bytes")
    }


def test_lasting_faults_end_in_one_clear_line(inside: FakeHub) -> None:
    told = dict(zip(map(fault_id, FAULTS), try_faults(inside, [(fault, ALWAYS) for fault in FAULTS], 12), strict=True))
    for name, error in told.items():
        if name.startswith("no_range"):  # costs bytes, but arrives
            continue
        expected = ModelError if name.startswith("flip") else ConnectionFault
        assert type(error) is expected, (name, error)


@SOAK
@pytest.mark.timeout(1800)
def test_faults_at_all_offsets(inside: FakeHub) -> None:
    offsets = [0, 1, 4095, 16_384, 33_333, 65_536, 77_777, SIZE - 4096, SIZE - 2, SIZE - 1]
    cases = [(Fault(kind, at=at, path=SHARD), times) for kind in BODY for at in offsets for times in (2, ALWAYS)]
    try_faults(inside, cases, 8)


def test_a_server_that_asks_for_too_long_a_pause(inside: FakeHub) -> None:
    inside.repos[NAME].faults = [status(429, "revision", **{"Retry-After": "3600"})]
    begun = time.monotonic()
    with pytest.raises(ConnectionFault, match=r"answered 429 and asks to wait 3600 seconds"):
        models.download(NAME)
    assert time.monotonic() - begun < SOON


@pytest.mark.parametrize("flips", [15, pytest.param(300, marks=SOAK)])
def test_flipped_bytes_in_transit(inside: FakeHub, flips: int) -> None:
    """A flip that passes is healed; one that stays is told, and the file never gets its name."""
    chance = random.Random(flips)
    content = checkpoint(shard_bytes=SIZE)
    names = sorted(name for name in content if name.endswith((".safetensors", ".json", ".md")))
    for i in range(flips):
        name, path, lasting = f"acme/flip-{i}", chance.choice(names), chance.random() < 0.5
        inside.add(name, content)
        at = chance.randrange(len(content[path]))
        inside.repos[name].faults = [Fault("flip", at=at, times=ALWAYS if lasting else 1, path=path)]
        if lasting:
            with pytest.raises(ModelError, match=f"{path} does not have the checksum"):
                models.download(name)
            folder = models.plan_download(name).folder
            assert not (folder / path).exists() and path in [*models.missing_files(folder), "README.md"]
        else:
            assert (models.download(name) / path).read_bytes() == content[path]


@pytest.mark.parametrize("flips", [15, pytest.param(300, marks=SOAK)])
def test_flipped_bytes_at_rest(inside: FakeHub, flips: int) -> None:
    chance = random.Random(flips)
    folder = models.download(NAME)
    names = sorted(path.name for path in folder.iterdir())
    for _ in range(flips):
        blob = (folder / chance.choice(names)).resolve()
        name = next(path.name for path in folder.iterdir() if path.resolve() == blob)
        whole = blob.read_bytes()
        at = chance.randrange(len(whole))
        blob.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
        found = [problem.name for problem in models.verify_cached(folder) if problem.reason != "missing"]
        assert found == [name]  # a flip in the index may also make it name a shard that does not exist
        blob.write_bytes(whole)


# Processes


def big(server: FakeHub, shards: int = 12, pace: float = 0.002) -> dict[str, bytes]:
    """12 MiB, sent at a pace that a busy client keeps: else the sockets' buffers hold much that a kill loses."""
    content = checkpoint(shards=shards, shard_bytes=1 << 20)
    server.repos[NAME] = Repo({}, {})
    server.add(NAME, content)
    server.pace = pace
    return content


def check_names(storage: Path, content: dict[str, bytes]) -> None:
    """Whatever has its final name is whole."""
    for path in storage.rglob("snapshots/*/*"):
        assert path.read_bytes() == content[path.name], f"{path.name} is listed, but not whole"


def kill_at(server: FakeHub, pid: int, bytes_sent: int, how: signal.Signals) -> None:
    """Send a signal when the server has sent so much."""

    def watch(n: int) -> None:
        if n >= bytes_sent:
            server.watch = None
            os.kill(pid, how)

    server.watch = watch


@pytest.mark.parametrize(
    ("rounds", "kills"),
    [(1, 10), pytest.param(4, 50, marks=[SOAK, pytest.mark.timeout(1800)])],
)
@pytest.mark.parametrize("into", ["cache", "folder"])
def test_kill_and_resume(server: FakeHub, tmp_path: Path, into: str, rounds: int, kills: int) -> None:
    content = big(server, shards=6)
    wanted = [name for name in content if not name.endswith((".py", ".bin"))]
    total = sum(len(content[name]) for name in wanted)
    for round_ in range(rounds):
        chance, home = random.Random(round_), tmp_path / str(round_)
        to = {"to": str(home / "here")} if into == "folder" else {}
        folder = home / "here" if into == "folder" else None
        with Clients(server.endpoint, home) as clients:
            server.bytes_sent = killed = 0
            for _ in range(kills):
                pid = clients.start("fetch", NAME, **to)
                kill_at(server, pid, server.bytes_sent + chance.randrange(int(1.8 * total / kills)), signal.SIGKILL)
                result = clients.wait(pid)
                server.watch = None
                if result["status"] == 0:
                    break
                assert result["status"] == -signal.SIGKILL
                killed += 1
                check_names(home, content)
                if folder is not None:
                    for path in (path for path in folder.glob("*") if path.name != ".cache"):
                        assert path.read_bytes() == content[path.name]
                elif list(home.rglob("*.incomplete")):
                    assert "value" not in clients.call("find", NAME)
            assert killed >= kills // 3
            result = clients.call("fetch", NAME, **to)
            assert result["status"] == 0, result
            for name in wanted:
                assert (Path(result["value"]) / name).read_bytes() == content[name]
            assert not list(home.rglob("*.incomplete"))
            assert server.bytes_sent <= 1.2 * total + killed * 4 * 64 * 1024


@pytest.mark.parametrize(
    ("processes", "rounds"), [(2, 2), pytest.param(4, 25, marks=[SOAK, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("locks", ["locks", "broken locks"])
def test_parallel_downloads(server: FakeHub, tmp_path: Path, locks: str, processes: int, rounds: int) -> None:
    content = big(server, shards=3)
    total = sum(len(content[name]) for name in content if not name.endswith((".py", ".bin")))
    environment = {"BREAK_LOCKS": "1"} if locks == "broken locks" else {}
    for round_ in range(rounds):
        home = tmp_path / str(round_)
        server.bytes_sent = 0
        with Clients(server.endpoint, home, **environment) as clients:
            pids = [clients.start("fetch", NAME) for _ in range(processes)]
            if round_ % 2:  # one of them dies on the way
                kill_at(server, pids[0], total // 3, signal.SIGKILL)
            results = [clients.wait(pid) for pid in pids]
            server.watch = None
        assert [result["status"] for result in results[round_ % 2 :]] == [0] * (processes - round_ % 2), results
        check_names(home, content)
        folder = Path(results[-1]["value"])
        assert all((folder / name).exists() for name in content if not name.endswith((".py", ".bin")))
        if locks == "locks":
            assert server.bytes_sent <= 1.2 * total + 8 * 64 * 1024


@pytest.mark.parametrize("interrupts", [4, pytest.param(100, marks=[SOAK, pytest.mark.timeout(600)])])
def test_interrupt(server: FakeHub, tmp_path: Path, interrupts: int) -> None:
    content = big(server)
    chance = random.Random(interrupts)
    with Clients(server.endpoint, tmp_path) as clients:
        for i in range(interrupts):
            if i % 3 == 1:  # while a server says nothing at all
                server.repos[NAME].faults = [Fault("silence", chance.choice(["revision", "bytes"]), times=ALWAYS)]
            pid = clients.start("fetch", NAME, to=str(tmp_path / str(i)))
            time.sleep(0.05 + chance.random() * 0.2)
            begun = time.monotonic()
            os.kill(pid, signal.SIGINT)
            result = clients.wait(pid)
            assert result["status"] in (0, 130) and result["stderr"] == "", result
            assert time.monotonic() - begun < SOON
            server.repos[NAME].faults = []
        result = clients.call("fetch", NAME, to=str(tmp_path / "0"))
    assert all((Path(result["value"]) / f"model-{i:05}-of-00012.safetensors").exists() for i in range(1, 13))
    check_names(tmp_path, content)


def test_an_interrupted_interpreter_ends_cleanly(server: FakeHub, tmp_path: Path) -> None:
    """The workers are daemon threads: nothing hangs and nothing is printed when the interpreter leaves."""
    big(server, pace=0.01)
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    code = f"""
from model.hub import download
try:
    download({NAME!r})
except KeyboardInterrupt:
    print("interrupted")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    flowing = threading.Event()
    server.watch = lambda n: flowing.set() if n > 100_000 else None
    assert flowing.wait(20)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SOON) == ("interrupted\n", "")
    assert process.returncode == 0 and time.monotonic() - begun < SOON


# The token


@pytest.mark.parametrize("redirect", ["port", "host", "page"])
def test_the_token_stays_with_the_hub(server: FakeHub, tmp_path: Path, redirect: str) -> None:
    other_name = server.endpoint.replace("127.0.0.1", "localhost")
    if redirect == "host":
        server.redirect_to = other_name
    if redirect == "page":
        server.page_size, server.pages_from = 2, other_name
    with Clients(server.endpoint, tmp_path, HF_TOKEN=TOKEN) as clients:
        result = clients.call("fetch", NAME)
    assert result["status"] == 0
    assert server.authorized("hub") == {f"Bearer {TOKEN}"}
    assert server.authorized("storage") == server.authorized("other") == set()
    assert {seen.server for seen in server.seen} >= {"port": {"storage"}, "host": {"other"}, "page": {"other"}}[
        redirect
    ]


@pytest.mark.parametrize("logs", ["all logs", "usual logs"])
def test_the_token_is_never_written(server: FakeHub, tmp_path: Path, logs: str) -> None:
    """Not in messages, in logs of any level, or in files; and no message repeats it when the server does.

    (Logs of the http client at its lowest level hold the server's headers: what a server says there is in them.)
    """
    if logs == "all logs":
        faults = [fault for fault in FAULTS if fault.target != "bytes" or fault.kind in ("close", "flip")][::4]
    else:
        answers = ((401, "RepoNotFound"), (403, "GatedRepo"), (404, "RevisionNotFound"), (503, ""), (400, ""))
        said = {"X-Error-Message": f"your token {TOKEN} is bad"}
        faults = [status(code, "revision", **said, **{"X-Error-Code": name}) for code, name in answers]
    loud = {"HF_DEBUG": "1", "LOG_EVERYTHING": "1"} if logs == "all logs" else {}
    with Clients(server.endpoint, tmp_path, HF_TOKEN=TOKEN, QUICK="1", **loud) as clients:
        pids = []
        for i, fault in enumerate(faults):
            name = f"acme/secret-{i}"
            server.add(name, checkpoint())
            server.repos[name].faults = [Fault(fault.kind, fault.target, fault.at, ALWAYS, None, fault.headers)]
            pids.append(clients.start("fetch", name))
        results = [clients.wait(pid) for pid in pids]
    assert server.authorized("hub") == {f"Bearer {TOKEN}"}
    assert all(result["status"] in (3, 4, 7) for result in results)
    if logs == "all logs":
        assert all("DEBUG" in result["stderr"] for result in results)
    else:
        assert all("your token [token] is bad" in result["message"] for result in results)
    assert TOKEN not in repr(results)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("token", ["hf_\nX-Evil: 1", "hf_ü", "hf_a b"])
def test_a_token_that_no_header_can_hold(inside: FakeHub, token: str) -> None:
    with pytest.raises(DbrxError) as caught:
        models.download(NAME, token=token)
    assert caught.value.exit_code == 4 and token not in caught.value.message and token not in repr(caught.value)
    assert not inside.seen
