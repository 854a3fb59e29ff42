"""Streaming text: UTF-8 cut anywhere, and stop strings cut anywhere, against decoding the whole."""

from __future__ import annotations

import itertools
import random

import pytest

from model.detokenizer import Detokenizer

SPECIAL = 10_000
TEXTS = ["مرحبا بالعالم", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301a\u0308\u0323n\u0303", "naïve — 中文 ሰላም", "a\u200d\u0915\u094d\u0937"]


class Pieces:
    """A tokenizer whose ids stand for any bytes, and one special token."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        if token_id == SPECIAL:
            return b"" if skip_special_tokens else b"<|end|>"
        return self.pieces[token_id]


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(Pieces(pieces), stop)
    return [*map(detokenizer.push, range(len(pieces))), detokenizer.finish()], detokenizer


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_at_one_or_two_bytes(text: str) -> None:
    data = text.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            shown, _ = stream([data[:first], data[first:second], data[second:]])
            assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    shown, _ = stream([data[i : i + 1] for i in range(len(data))])
    assert "".join(shown) == text


def test_streamed_is_whole() -> None:
    """Any bytes, and any text, cut anywhere: several times at one place, too."""
    draw = random.Random(1)
    for round in range(2000):
        text = "".join(map(draw.choice, TEXTS))[: draw.randrange(20)].encode()
        data = text if round % 2 else draw.randbytes(draw.randrange(9)) + text + draw.randbytes(draw.randrange(3))
        shown, detokenizer = stream(cut(data, [draw.randrange(999) for _ in range(draw.randrange(9))]))
        assert "".join(shown) == data.decode("utf-8", "replace"), data
        assert not detokenizer.stopped


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first stop string begins, by looking at every place in turn."""
    return next((i for i in range(len(text)) if text.startswith(stops, i)), None)


def test_text_is_cut_before_the_earliest_stop_string() -> None:
    draw = random.Random(2)
    ends: set[int | None] = set()
    for _ in range(4000):
        text = "".join(draw.choices("abé", k=draw.randrange(15)))
        stops = tuple("".join(draw.choices("abé", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3)))
        shown, detokenizer = stream(cut(text.encode(), [draw.randrange(99) for _ in range(draw.randrange(9))]), stops)
        at = first_stop(text, stops)
        assert "".join(shown) == text[:at], (text, stops)
        assert detokenizer.stopped == (at is not None)
        if at is not None:
            assert detokenizer.stop_string in stops and text.startswith(detokenizer.stop_string or "?", at)
        ends.add(at)
    assert ends >= {None, *range(12)}


def test_holds_back_no_more_than_a_possible_beginning() -> None:
    detokenizer = Detokenizer(Pieces([b"one \n", b"\n", b"two\n\n", b"User", b":x", b"more"]), ["\n\nUser:"])
    assert [detokenizer.push(i) for i in range(5)] == ["one ", "", "\n\ntwo", "", ""]
    assert detokenizer.stopped and detokenizer.stop_string == "\n\nUser:"
    assert detokenizer.push(5) == "" and detokenizer.finish() == ""


def test_a_held_beginning_is_shown_at_the_end() -> None:
    shown, detokenizer = stream([b"ab", b"c", "é".encode()[:1]], ("bcd",))
    assert shown == ["a", "", "bc\ufffd"[:0], "bc\ufffd"] and not detokenizer.stopped


def test_stop_string_may_begin_inside_a_replaced_character() -> None:
    shown, detokenizer = stream([b"a\xc3", b"STOP"], ("\ufffdST",))
    assert "".join(shown) == "a" and detokenizer.stopped


def test_special_tokens() -> None:
    pieces = Pieces(["é".encode()[:1], "é".encode()[1:]])
    skipping, keeping = Detokenizer(pieces), Detokenizer(pieces, skip_special_tokens=False)
    assert [skipping.push(i) for i in (0, SPECIAL, 1)] == ["", "", "é"]
    assert [keeping.push(i) for i in (SPECIAL, 0, 1)] == ["<|end|>", "", "é"]


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(Pieces([]), [""])
