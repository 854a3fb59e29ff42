"""A reply that is cut and goes on is the reply that was never cut: its text, its ids, what penalties count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_cli.conversation import Conversation
from dbrx_cli.engine import NOTHING, Delta, Done, Request
from dbrx_cli.store import Store
from model.messages import Message
from model.sampling import SamplingParams

NEW = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
ASKED = Conversation().ask("Name colours, many of them.")
TEXT = "a 你好，世界 🙂 naïve 👩‍👩‍👧 e\u0301 \ufffd end"  # its ids cut characters; U+FFFD is really said


@pytest.fixture(scope="module")
def open_engine(tiny_checkpoint: Path) -> Callable[..., Any]:
    from dbrx_cli.engine.local import LocalEngine
    from model import AutoTokenizer, DbrxForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    networks: dict[str, Any] = {}

    def open_one(quantize: str = "none") -> LocalEngine:
        if quantize not in networks:
            networks[quantize] = DbrxForCausalLM.from_pretrained(
                tiny_checkpoint, dtype="float32", quantize=quantize, pack=quantize != "none"
            )
        return LocalEngine(networks[quantize], tokenizer, name="tiny")

    return open_one


def reply(engine: Any, conversation: Conversation, params: SamplingParams = GREEDY, **options: Any) -> Done:
    before = conversation.turns[-1] if options.get("continue_final") else NOTHING
    *deltas, done = engine.stream(Request(conversation.messages, params, **options))
    assert isinstance(done, Done)
    message = done.message(before)
    shown = before.content + "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    assert (shown.startswith(message.content) and shown == before.content + done.text) or not done.text
    return done


def in_two(engine: Any, cut: int, params: SamplingParams = GREEDY, **options: Any) -> Message:
    first = reply(engine, ASKED, replace(params, max_tokens=cut), **options)
    conversation = ASKED.answer(first.message())
    rest = reply(engine, conversation, replace(params, max_tokens=NEW - cut), continue_final=True, **options)
    assert rest.usage.cached_tokens == rest.usage.prompt_tokens - 1  # the cache goes on, too
    return rest.message(first.message())


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, frequency_penalty=1.5),
        replace(GREEDY, presence_penalty=2.0, repetition_penalty=1.3, lookup=4),
        replace(GREEDY, temperature=0.9, seed=7, frequency_penalty=-0.5),
    ],
    ids=["frequency", "all", "seed"],
)
def test_one_run_or_two(open_engine: Callable[..., Any], params: SamplingParams) -> None:
    engine = open_engine()
    whole = reply(engine, ASKED, params).message()
    assert len(whole.token_ids) == NEW
    for cut in (1, 7) if params.lookup else (7,):
        assert in_two(engine, cut, params) == whole


def test_in_int8_and_in_three(open_engine: Callable[..., Any]) -> None:
    engine = open_engine("int8")
    params = replace(GREEDY, frequency_penalty=1.0)
    whole = reply(engine, ASKED, params).message()
    message = NOTHING
    for go_on in (False, True, True):
        conversation = ASKED.answer(message) if go_on else ASKED
        message = reply(engine, conversation, replace(params, max_tokens=4), continue_final=go_on).message(message)
    assert message == whole


def say(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Have the network's row say these ids, whatever it computes."""
    from model.sequence import Sequence as Row

    def choose(row: Any, logits: object) -> int:
        row.ids.append(ids[len(row.ids)])
        row.done = row._complete()
        return int(row.ids[-1])

    monkeypatch.setattr(Row, "_choose", choose)


def test_a_character_is_never_cut(
    open_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = open_engine()
    ids = engine.tokenizer.encode(TEXT)
    pieces = [engine.tokenizer.decode_bytes(each) for each in ids]
    say(monkeypatch, ids)
    texts = [b"".join(pieces[:cut]).decode("utf-8", "ignore") for cut in range(len(ids))]
    inside = [cut for cut, text in enumerate(texts) if text.encode() != b"".join(pieces[:cut])]
    assert len(inside) > 5
    with Store.open(tmp_path / "data" / "s.db") as store, Store.open(tmp_path / "data" / "s.db") as other:
        for cut in inside[::2]:
            done = reply(engine, ASKED, replace(GREEDY, max_tokens=cut))
            assert done.text == texts[cut] and done.finish_reason == "length"
            store.save(id := store.begin("chat", "tiny", None, {}), None, ASKED.answer(done.message()).turns)
            taken = replace(ASKED, turns=other.find(id).turns)
            rest = reply(engine, taken, replace(GREEDY, max_tokens=len(ids) - cut), continue_final=True)
            assert rest.message(taken.turns[-1]) == Message("assistant", TEXT, tuple(ids))


def test_ids_that_do_not_spell_the_text_are_left(open_engine: Callable[..., Any]) -> None:
    engine = open_engine()
    text = "Red and green, and"
    ids = engine.tokenizer.encode(text)
    asked = engine.parts(Request(ASKED.messages, GREEDY))[0]
    for wrong in ((), (5, 6), (10**6,), tuple(ids[:-1])):
        request = Request(ASKED.answer(Message("assistant", text, wrong)).messages, GREEDY, continue_final=True)
        assert engine.parts(request) == (asked, ids, text)
    other = tuple(engine.tokenizer.encode("Red and")) + tuple(engine.tokenizer.encode(" green, and"))
    request = Request(ASKED.answer(Message("assistant", text, other)).messages, GREEDY, continue_final=True)
    assert engine.parts(request) == (asked, list(other), text)


@pytest.mark.parametrize(
    ("said", "stop", "left"),
    [("a END b", "END", "a "), ("a EN", "END", "a EN"), ("ENEND", "END", "EN"), ("a 你E", "你E", "a ")],
)
def test_a_stop_string_goes_across(
    open_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, said: str, stop: str, left: str
) -> None:
    engine = open_engine()
    ids = [each for character in said for each in engine.tokenizer.encode(character)]
    say(monkeypatch, ids)
    for cut in range(1, len(ids)):
        first = reply(engine, ASKED, replace(GREEDY, max_tokens=cut), stop=(stop,))
        if first.finish_reason == "length":
            conversation = ASKED.answer(first.message())
            params = replace(GREEDY, max_tokens=len(ids) - cut)
            rest = reply(engine, conversation, params, stop=(stop,), continue_final=True)
            assert rest.message(first.message()).content == left
            assert rest.finish_reason == ("stop_string" if left != said else "length")


def test_a_stop_string_set_later_takes_nothing_away(
    open_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    ids = engine.tokenizer.encode("one two three four")
    say(monkeypatch, ids)
    first = reply(engine, ASKED, replace(GREEDY, max_tokens=3)).message()
    rest = reply(engine, ASKED.answer(first), replace(GREEDY, max_tokens=1), stop=("two", "three"), continue_final=True)
    assert rest.message(first).content == "one two three four"
