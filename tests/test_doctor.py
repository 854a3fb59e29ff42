"""`dbrx doctor`: each fault is named with what to type, and the golden check can fail."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import close_session, constants

from dbrx_cli import doctor, golden
from model.hub import retry
from tests.cli import Cli

NAME = "acme/dbrx"
CPU = torch.device("cpu")


class Hub(ThreadingHTTPServer):
    """Answers by path: status, x-error-code, JSON."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str, Any]] = {}
        self.seen: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub: Hub = self.server  # type: ignore[assignment]
        hub.seen.append((self.path, self.headers.get("authorization")))
        status, code, content = hub.answers.get(self.path, (404, "", {}))
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if code:
            self.send_header("x-error-code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of our own, an empty cache, no token."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "STALL_SECONDS", 0.7)
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "dbrx"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network's part."""
    monkeypatch.setattr(doctor, "network_checks", lambda: iter(()))


def run_json(cli: Cli, *args: str | Path) -> tuple[int, dict[str, dict[str, Any]]]:
    result = cli("doctor", "--json", *args)
    assert result.err == ""
    values = json.loads(result.out)
    assert values["exit_code"] == result.code and values["usable"] == (result.code == 0)
    for check in values["checks"]:
        assert set(check) == {"name", "state", "text", "hint", "exit_code", "facts"}
        assert check["state"] != "problem" or (check["hint"] and check["exit_code"])
    return result.code, {check["name"]: check for check in values["checks"]}


REVISION, WHOAMI = f"/api/models/{NAME}/revision/main", "/api/whoami-v2"
SHA = "0123456789" * 4


@pytest.mark.parametrize(
    "token, answers, access, code, word",
    [
        (None, {REVISION: (200, "", {"sha": SHA})}, "ok", 0, "dbrx download"),
        (None, {REVISION: (401, "RepoNotFound", {})}, "no token", 4, "HF_TOKEN"),
        (None, {REVISION: (401, "GatedRepo", {})}, "gated, no token", 4, "HF_TOKEN"),
        ("hf_old", {REVISION: (401, "RepoNotFound", {}), WHOAMI: (401, "", {})}, "bad token", 4, "not valid"),
        ("hf_sound", {REVISION: (403, "GatedRepo", {}), WHOAMI: (200, "", {})}, "gated", 4, "ask for access"),
        ("hf_sound", {REVISION: (404, "RepoNotFound", {}), WHOAMI: (200, "", {})}, "not found", 4, "misspelled"),
        ("hf_sound", {REVISION: (403, "", {}), WHOAMI: (200, "", {})}, "scope", 4, "read access"),
        (None, {REVISION: (404, "RevisionNotFound", {})}, "no revision", 3, ""),
        (None, {REVISION: (200, "", ["nonsense"])}, "unreachable", 7, "HF_ENDPOINT"),
        ("to ken", {}, "bad token", 4, "HF_TOKEN"),
    ],
)
def test_access_to_the_model(
    cli: Cli, hub: Hub, quick: None, monkeypatch: pytest.MonkeyPatch,
    token: str | None, answers: dict[str, Any], access: str, code: int, word: str,
) -> None:  # fmt: skip
    if token:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    hub.answers = answers
    got, checks = run_json(cli, "-m", NAME)
    assert (checks["hub"]["facts"]["access"], got) == (access, code)
    assert word in (checks["model"]["hint"] or "")
    assert token is None or token not in json.dumps(checks)


def test_no_hub_at_all(cli: Cli, hub: Hub, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, checks = run_json(cli, "-m", NAME)
    assert code == 3 and checks["hub"]["facts"]["access"] == "offline" and "unset" in checks["hub"]["hint"]
    assert hub.seen == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, checks = run_json(cli, "-m", NAME)
    assert code == 7 and checks["hub"]["facts"]["access"] == "unreachable"
    # Nobody asked for the default model by name: the program is usable without.
    code, checks = run_json(cli)
    assert code == 0 and checks["hub"]["state"] == checks["model"]["state"] == "warning"
    assert "dbrx chat -m demo" in checks["model"]["hint"]


def test_models_on_this_machine(cli: Cli, hub: Hub, quick: None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, checks = run_json(cli, "-m", tiny_checkpoint)
    assert code == 0 and checks["model"]["state"] == "ok" and "hub" not in checks and hub.seen == []
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path / "broken", tmp_path / "nowhere"):
        code, checks = run_json(cli, "-m", path)
        assert code == 3 and checks["model"]["state"] == "problem" and checks["model"]["hint"]
    code, checks = run_json(cli, "-m", "demo")
    assert code == 0 and checks["model"]["state"] == "note"


def test_folders_and_disk(monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path) -> None:
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert [check.state for check in doctor.folders()] == ["warning", "warning"]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    assert [check.state for check in doctor.folders()] == ["ok", "ok"]
    (tmp_path / "cache").write_text("a file in the way")
    first, second = doctor.folders()
    assert first.state == "warning" and "HF_HOME" in (first.hint or "") and second.state == "ok"


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.13.0+cpu", "rich": "99.1", "transformers": "5.23.0", "vllm": "0.9"}
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch<2.14,>=2.11", "rich<16,>=14", "flash-attn; extra == 'flash'"]
    )
    monkeypatch.setattr(doctor, "installed", have.get)
    packages, transformers = doctor.versions()
    assert packages.state == "warning" and "rich 99.1" in packages.text and "torch" not in packages.text
    assert "pip install" in (packages.hint or "")
    assert (
        transformers.name == "transformers" and "10,000" in transformers.text and "4.57.6" in (transformers.hint or "")
    )
    have.update(rich="15.0", transformers="4.57.6")
    assert [check.state for check in doctor.versions()] == ["ok"]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_golden_network(name: str) -> None:
    assert golden.largest_difference(CPU, name) < golden.TOLERANCE / 5


def _negate(weights: dict[str, Any]) -> None:
    weights["transformer.blocks.1.ffn.router.layer.weight"][2] *= -1


def _one_value(weights: dict[str, Any]) -> None:
    weights["transformer.blocks.0.ffn.experts.mlp.w2"][37, 5] += 0.5


def _not_a_number(weights: dict[str, Any]) -> None:
    weights["lm_head.weight"][3, 3] = np.nan


@pytest.mark.parametrize("spoil", [_negate, _one_value, _not_a_number])
def test_the_golden_check_can_fail(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    sound = golden.make_weights

    def broken() -> dict[str, Any]:
        weights = sound()
        spoil(weights)
        return weights

    monkeypatch.setattr(golden, "make_weights", broken)
    code, checks = run_json(cli, "-m", tiny_checkpoint)
    assert code == 1
    for name in ("sdpa", "eager"):
        check = checks[f"attention {name}"]
        assert check["state"] == "problem" and "wrong numbers" in check["text"]


@pytest.mark.parametrize(
    "scope, key, value",
    [
        ("attn_config", "rope_theta", 10000),  # what transformers 5.23 does
        ("attn_config", "clip_qkv", None),
        ("ffn_config", "moe_top_k", 2),
        ("ffn_config", "moe_normalize_expert_weights", None),
        ("ffn_config", "ffn_act_fn", {"name": "gelu"}),
    ],
)
def test_the_golden_network_notices_a_wrong_constant(
    monkeypatch: pytest.MonkeyPatch, scope: str, key: str, value: Any
) -> None:
    monkeypatch.setattr(golden, "CONFIG", {**golden.CONFIG, scope: {**golden.CONFIG[scope], key: value}})
    assert golden.largest_difference(CPU, "eager") > 10 * golden.TOLERANCE


def test_in_words(cli: Cli, tiny_checkpoint: Path, hub: Hub) -> None:
    result = cli("doctor", "-m", tiny_checkpoint)
    assert result.code == 0 and result.err == ""
    for word in ("python", "torch", "attention sdpa: computes what the reference does", "flash", "memory"):
        assert word in " ".join(result.out.split())
    assert cli("doctor", "-q", "-m", tiny_checkpoint).out == ""


def test_a_check_that_breaks_is_a_problem(monkeypatch: pytest.MonkeyPatch, cli: Cli, tiny_checkpoint: Path) -> None:
    def broken() -> Iterator[doctor.Check]:
        raise RuntimeError("no driver")
        yield

    monkeypatch.setattr(doctor, "memory", broken)
    monkeypatch.setattr(doctor, "network_checks", lambda: iter(()))
    result = cli("doctor", "-m", tiny_checkpoint)
    assert result.code == 1 and "FAIL memory: cannot be examined: RuntimeError: no driver" in result.out


# A function that a check calls -> the check; what breaks in one is told there, with a hint, and all others are made.
BREAKABLE = {
    "dbrx_cli.doctor.requires": "packages",
    "model.hub.layout.cache_folder": "hub cache",
    "dbrx_cli.demo.demo_folder": "demo cache",
    "model.machine.available_memory": "memory",
    "dbrx_cli.commands.models.find_folder": "model",
    "model.load_planner.plan_load": "plan",
    "model.native.status": "native kernels",
    "torch.get_num_threads": "torch",
    "dbrx_cli.doctor._devices": "devices",
    "dbrx_cli.golden.largest_difference": "attention eager",
    "model.kernels.probe": "kernels",
}


@pytest.mark.parametrize("function", BREAKABLE)
def test_what_breaks_in_one_check_hides_no_other(
    function: str, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, hub: Hub
) -> None:
    def examined() -> dict[str, doctor.Check]:
        return {check.name: check for check in doctor.examine(doctor.WhichModel(model=str(tiny_checkpoint)))}

    monkeypatch.setattr("dbrx_cli.golden.largest_difference", lambda device, name: 0.0)
    whole = examined()
    assert set(BREAKABLE.values()) <= whole.keys()

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(function, broken)
    found, name = examined(), BREAKABLE[function]
    assert "nobody thought of this" in found[name].text and found[name].state == "problem"
    assert found[name].hint and found[name].exit_code == 1
    lost = {other for other in whole if other.startswith("attention")} if name == "devices" else set()
    assert whole.keys() - found.keys() == lost  # on which devices would it be tried?


def test_kernels_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a card says nothing of them; what is compared, tests/interpreted_kernels.py runs."""
    pytest.importorskip("triton")
    from model.kernels.cuda_check import Compared
    from model.kernels.cuda_linear import CudaLinear
    from model.kernels.registry import fault

    card = torch.device("cuda", 0)
    monkeypatch.setattr("model.kernels.has_triton", lambda device: False)
    (old,) = doctor.card_kernels(card)
    assert old.state == "note" and "8.0" in old.text
    assert torch.cuda.is_available() or not any("on cuda" in check.name for check in doctor.network_checks())
    monkeypatch.setattr("model.kernels.has_triton", lambda device: True)
    found = [Compared("gemv of int4", 1e-6, 1e-4), Compared("router", 2e-5, 1e-4)]
    monkeypatch.setattr("model.kernels.cuda_check.compare", lambda device: iter(found))
    (right,) = doctor.card_kernels(card)
    assert right.state == "ok" and right.name == "kernels on cuda:0" and "difference 2e-05" in right.text
    found.append(Compared("down of int8", float("nan"), 1e-4))
    (wrong,) = doctor.card_kernels(card)
    assert (wrong.state, wrong.exit_code) == ("problem", 1) and wrong.hint
    assert "down of int8 off by nan" in wrong.text and "gemv" not in wrong.text
    missing = subprocess.CalledProcessError(1, ["gcc"])  # as Triton leaves it, where Python.h is missing
    monkeypatch.setattr("model.kernels.cuda_check.compare", Mock(side_effect=missing))
    (broken,) = doctor.card_kernels(card)
    assert broken.state == "problem" and "gcc" in broken.text and "C compiler" in str(broken.hint)
    kernel = CudaLinear("bfloat16", device="cpu")
    monkeypatch.setattr(kernel, "run", Mock(side_effect=missing))
    assert "gcc" in str(fault(kernel))


def test_no_two_dimensions_of_the_golden_network_are_equal() -> None:
    """A shape that fits by luck hides a mix-up."""
    shapes = [shape for weight in golden.make_weights().values() if len(shape := weight.shape) == 2]
    ffn = golden.CONFIG["ffn_config"]
    sizes = {golden.CONFIG["d_model"], ffn["ffn_hidden_size"], ffn["moe_num_experts"], golden.CONFIG["vocab_size"]}
    assert len(sizes) == 4 and len({rows for rows, _ in shapes}) == 5
