"""`--logprobs` against the log-softmax of one forward pass over everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import AutoTokenizer, DbrxForCausalLM
from tests.cli import Cli

torch.set_num_threads(1)

PROMPT = "Once upon a time"


def answer(cli: Cli, folder: Path, *flags: str) -> dict[str, Any]:
    command = ("generate", "-m", folder, "--dtype", "float32", "--raw", "-n", "8", "--seed", "1", "--json")
    result = cli(*command, *flags, PROMPT)
    assert (result.code, result.err) == (0, "")
    value: dict[str, Any] = json.loads(result.out)
    return value


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("tiny", ("-t", "0")),
        ("tiny", ("-t", "1.7", "--top-k", "30", "--repetition-penalty", "1.5", "--frequency-penalty", "0.5")),
        ("tiny", ("-t", "0", "--lookup", "8")),
        pytest.param("demo", ("-t", "0"), marks=pytest.mark.slow),
    ],
    ids=["greedy", "sampled", "lookup", "demo"],
)
def test_logprobs_are_those_of_a_full_forward(
    request: pytest.FixtureRequest, cli: Cli, kind: str, flags: tuple[str, ...]
) -> None:
    """Whatever chose the tokens, the numbers are the network's own."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    got = answer(cli, checkpoint, "--logprobs", "5", *flags)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    network = DbrxForCausalLM.from_pretrained(checkpoint, dtype="float32", attn_implementation="eager")
    prompt, ids = tokenizer.encode(PROMPT), got["token_ids"]
    with torch.no_grad():
        logprobs = (
            network(torch.tensor([prompt + ids]), use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        )
    assert len(got["logprobs"]) == len(ids)
    for token, entry, expected in zip(ids, got["logprobs"], logprobs, strict=True):
        assert entry["token_id"] == token and entry["text"] == tokenizer.decode([token])
        assert entry["logprob"] == pytest.approx(float(expected[token]), abs=1e-3)
        best = expected.topk(5)
        assert [top["logprob"] for top in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-3)
        for top in entry["top"]:
            assert top["logprob"] == pytest.approx(float(expected[top["token_id"]]), abs=1e-3)
            assert top["text"] == tokenizer.decode([top["token_id"]])


@pytest.mark.slow
def test_asking_changes_no_text(cli: Cli, tiny_checkpoint: Path) -> None:
    plain = answer(cli, tiny_checkpoint)
    for count in (0, 1, 20):
        asked = answer(cli, tiny_checkpoint, "--logprobs", str(count))
        assert asked["token_ids"] == plain["token_ids"]
        assert all(len(entry["top"]) == count for entry in asked["logprobs"])
    assert plain["logprobs"] is None


def test_events_carry_them(cli: Cli, tiny_checkpoint: Path) -> None:
    command = ("generate", "-m", tiny_checkpoint, "-n", "6", "-t", "0", "--jsonl")
    events = [json.loads(line) for line in cli(*command, "--logprobs", "2", "hi").out.splitlines()]
    tokens = [event for event in events if event["event"] == "token" and event["token_id"] is not None]
    assert [event["logprob"] for event in tokens] == events[-1]["logprobs"]
    plain = [json.loads(line) for line in cli(*command, "hi").out.splitlines()]
    assert "logprob" not in plain[1] and plain[-1]["logprobs"] is None


def test_wrong_use_is_refused(cli: Cli, tiny_checkpoint: Path) -> None:
    for flags in (("--logprobs", "3"), ("--logprobs", "21", "--json"), ("--logprobs", "-1", "--json")):
        assert cli("generate", "-m", tiny_checkpoint, *flags, "hi").code == 2
