"""The ids of a conversation that comes back are those that were read and sampled, however its text is spelled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dbrx_cli.server.timelines import Timelines
from model.chat_template import Segment
from model.messages import Message
from model.tokenizer import Tokenizer

ASKED = [Message("system", "Be brief."), Message("user", "33?")]
REPLY = Message("assistant", "33 ab")
NEXT = Message("user", "And?")
# What stands between a reply and what the user says behind it.
MARKS = [Segment("<|im_end|>", True), Segment("\n", False), Segment("<|im_start|>", True), Segment("user\n", False)]


@pytest.fixture(scope="module")
def tokenizer(small_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(small_checkpoint)


def prompt(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    return tokenizer.encode_segments(tokenizer.chat_template.segments(messages))


def test_sampled_ids_are_used_again(tokenizer: Tokenizer) -> None:
    sampled = list(b"33 ab")  # a byte each, where the tokenizer merges 33 and ab
    assert tokenizer.encode(REPLY.content) != sampled
    timelines, read = Timelines(tokenizer), prompt(tokenizer, ASKED)
    timelines.keep([*ASKED, REPLY], read, sampled)
    whole = prompt(tokenizer, [*ASKED, REPLY, NEXT])
    behind = whole[len(read) + len(tokenizer.encode(REPLY.content)) :]
    assert timelines.encode([*ASKED, REPLY, NEXT]) == read + sampled + behind
    assert timelines.encode([*ASKED, REPLY, NEXT, Message("assistant", "x"), NEXT]) is not None, "further behind, too"
    assert timelines.reply([*ASKED, REPLY]) == (read, sampled) and timelines.reply([*ASKED, REPLY, NEXT]) is None
    marks = tokenizer.encode_segments(MARKS)
    assert timelines.foresee([*ASKED, REPLY]) == [*read, *sampled, *marks]
    assert timelines.foresee(ASKED) == []
    for other in (
        [ASKED[1], REPLY, NEXT],
        [*ASKED, Message("assistant", "33 ab "), NEXT],
        [*ASKED, Message("user", "33 ab"), NEXT],
        ASKED,
    ):
        assert timelines.encode(other) is None


def test_the_newest_are_kept(tokenizer: Tokenizer) -> None:
    timelines = Timelines(tokenizer, most_tokens=100)
    talks = [[*ASKED, Message("assistant", str(i)), NEXT] for i in range(5)]
    for talk in talks:
        timelines.keep(talk[:-1], range(30), range(10))
        timelines.keep(talk[:-1], range(20), range(10))
        timelines.encode(talks[0])  # what is used stays
    assert [timelines.encode(talk) is not None for talk in talks] == [True, False, False, True, True]


def test_a_template_that_changes_the_text_is_read_anew(small_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(small_checkpoint)
    strips = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.strip() }}<|im_end|>{% endfor %}"
    strips += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = type(tokenizer.chat_template)(strips, ("<|im_start|>", "<|im_end|>"))
    timelines = Timelines(tokenizer)
    for text, found in (("33", True), ("33 ", False)):
        talk = [*ASKED, Message("assistant", text)]
        timelines.keep(talk, [1, 2], [3])
        assert (timelines.encode([*talk, NEXT]) is not None) == found


def test_whatever_was_sampled_decodes_to_what_came_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    timelines, ids, talk = Timelines(tokenizer), [1, 2, 3], list(ASKED)
    ids = prompt(tokenizer, talk)
    for _ in range(20):
        sampled = [rng.choice(list(b"33abc <|im_end|>\n")) for _ in range(rng.randrange(1, 20))]
        talk.append(Message("assistant", tokenizer.decode(sampled)))
        timelines.keep(talk, ids, sampled)
        talk.append(NEXT)
        known, ids = ids + sampled, timelines.encode(talk) or []
        assert ids[: len(known)] == known and tokenizer.decode(ids) == tokenizer.chat_template.render(talk)
