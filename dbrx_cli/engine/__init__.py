"""A choice: what answers. A request goes in; pieces of text and one closing record come out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from model.messages import Message
from model.sampling import SamplingParams

FinishReason = Literal["stop", "length", "stop_string", "interrupted"]


@dataclass(frozen=True)
class Request:
    """A conversation to answer, or raw text to continue; and how."""

    prompt: Sequence[Message] | str
    params: SamplingParams
    stop: tuple[str, ...] = ()
    continue_final: bool = False  # go on with the last message, an assistant's, instead of answering


@dataclass(frozen=True)
class Delta:
    """A token, and the text that can be shown since: empty while a character or a stop string may be under way."""

    text: str
    token_id: int | None


@dataclass(frozen=True)
class Usage:
    """Tokens read, of these already in the cache, and made."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens a second; the first token counts to the prefill."""

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Done:
    """The whole reply and how it was made: the object that `--json` prints."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str
    revision: str | None
    attn: str
    dtype: str
    quantize: str
    seed: int
    logprobs: None = None

    def to_dict(self) -> dict[str, Any]:
        """As the contract's JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The figures in one line."""
        u, t = self.usage, self.timings
        cached = f" ({u.cached_tokens} cached)" if u.cached_tokens else ""
        return (
            f"prompt {u.prompt_tokens} tokens{cached} in {t.prefill_s:.2f} s ({t.prefill_tokens_per_s:.0f}/s), "
            f"reply {u.completion_tokens} tokens in {t.decode_s:.2f} s ({t.decode_tokens_per_s:.1f}/s), "
            f"{self.finish_reason}"
        )


class Engine(Protocol):
    """Answers requests. A `KeyboardInterrupt` thrown into the stream ends the reply; its `Done` still comes."""

    defaults: SamplingParams  # what the checkpoint's makers recommend
    context: int  # tokens

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """Deltas, then one Done. `ContextError` before the first if the prompt does not fit."""

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation as it would be read."""

    def unread(self, messages: Sequence[Message]) -> int:
        """How many tokens of that conversation would be read anew: what the cache does not hold."""

    def close(self) -> None:
        """Give the model's memory back."""
