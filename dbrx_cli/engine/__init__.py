"""A choice: what answers. A request goes in; pieces of text and one closing record come out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from model.errors import DbrxError, InputError
from model.messages import Message
from model.sampling import SamplingParams

if TYPE_CHECKING:
    from model.streaming import Counters

NOTHING = Message("assistant", "")
FinishReason = Literal["stop", "length", "stop_string", "interrupted"]
REMOTE = "remote"  # of a reply's attention and types: a server does not say them
UNLIKELY = -9999.0  # OpenAI's spelling of minus infinity, which JSON has no number for


@dataclass(frozen=True)
class Constraint:
    """What the whole text of a reply must be: JSON that fits this JSON Schema, or what this grammar describes."""

    json_schema: dict[str, Any] | None = None
    grammar: str | None = None  # as `model.constrain` reads grammars and regular expressions


@dataclass(frozen=True)
class Request:
    """A conversation to answer, or raw text to continue; and how."""

    prompt: Sequence[Message] | str
    params: SamplingParams
    stop: tuple[str, ...] = ()
    continue_final: bool = False  # go on with the last message, an assistant's, instead of answering
    constraint: Constraint | None = None
    logprobs: int | None = None  # how many of the likeliest tokens to tell beside each token; None tells nothing
    prompt_ids: Sequence[int] | None = None  # what the reply stands behind, as it is read, if known
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    resume: Path | None = None  # where the reply is kept as it comes, and taken up when the process was killed
    # Hears how many of the tokens that must be read are: (0, total) before the first, then behind each piece.
    on_read: Callable[[int, int], None] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Likelihood:
    """A token and the logarithm of its probability: log-softmax of the network's own logits.

    Penalties, constraint, temperature and cuts come after it, as in OpenAI's protocol: it tells what the model thinks.
    """

    token_id: int | None  # None: a server does not tell it
    text: str  # by itself; U+FFFD for bytes that are no whole character
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Likelihood):
    """A token of the reply, and the likeliest in its place, the best first."""

    top: list[Likelihood]


@dataclass(frozen=True)
class Delta:
    """A token, and the text that can be shown since: empty while a character or a stop string may be under way."""

    text: str
    token_id: int | None
    logprob: TokenLogprob | None = None  # if the request asked


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
    drafted_tokens: int = 0  # by --lookup, and of these right
    accepted_tokens: int = 0


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
    seed: int | None  # None: a server's own choice
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if the request asked
    experts: Counters | None = None  # if they are streamed
    card: dict[str, Any] | None = None  # `DbrxForCausalLM.on_card`, where there is one
    error: DbrxError | None = None  # what ended the reply, or is wrong with it

    def message(self, before: Message = NOTHING) -> Message:
        """The reply as a turn, behind what it went on from; if it did not end by itself, with the ids to go on from."""
        return self._unless_finished(
            Message("assistant", before.content + self.text, (*before.token_ids, *self.token_ids))
        )

    def to_dict(self) -> dict[str, Any]:
        """As the contract's JSON; with `error` if there was a fault."""
        values = asdict(replace(self, error=None))
        del values["error"]
        if self.card is None:
            del values["card"]
        if self.error is not None:
            values["error"] = {"message": self.error.one_line, "code": self.error.exit_code}
        return values

    def summary(self) -> str:
        """The figures in one line."""
        u, t = self.usage, self.timings
        cached = f" ({u.cached_tokens} cached)" if u.cached_tokens else ""
        drafts = f"lookup {t.accepted_tokens} of {t.drafted_tokens} right, " if t.drafted_tokens else ""
        streamed = f"; {self.experts.summary()}" if self.experts else ""
        return (
            f"prompt {u.prompt_tokens} tokens{cached} in {t.prefill_s:.2f} s ({t.prefill_tokens_per_s:.0f}/s), "
            f"reply {u.completion_tokens} tokens in {t.decode_s:.2f} s ({t.decode_tokens_per_s:.1f}/s), "
            f"{drafts}{self.finish_reason}{streamed}"
        )

    def _unless_finished(self, reply: Message) -> Message:
        return reply if self.finish_reason in ("length", "interrupted") else replace(reply, token_ids=())


@dataclass(frozen=True)
class Continued(Done):
    """Of a reply that went on: what is new, and `whole`, which a stop string across the join may have made shorter."""

    whole: Message = NOTHING

    def message(self, before: Message = NOTHING) -> Message:
        return self._unless_finished(self.whole)


class Engine(Protocol):
    """Answers requests. A `KeyboardInterrupt` thrown into the stream ends the reply; its `Done` still comes."""

    name: str  # of the model, as it was given or as the server has it
    defaults: SamplingParams  # what the checkpoint's makers recommend
    context: int  # tokens
    continues: bool  # whether it takes `Request.continue_final`

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """Deltas, then one Done. `ContextError` before the first if the prompt does not fit.

        A fault before any text is raised; one behind it stands in the Done.
        """

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation as it would be read."""

    def unread(self, messages: Sequence[Message]) -> int | None:
        """How many tokens of that conversation would be read anew, as the cache does not hold them; None: unknown."""

    def close(self) -> None:
        """Give the model's memory back."""


@runtime_checkable
class KeepsCache(Protocol):
    """An engine whose cache of keys and values outlives the process."""

    def save_cache(self, path: Path) -> None:
        """Write what the cache holds, for `load_cache`; `DbrxError` if the file cannot be written or is no cache."""

    def load_cache(self, path: Path) -> int:
        """Take over a saved cache; returns the tokens in it. 0 if there is no file; 0 and a notice if it is refused."""


def keeper(engine: Engine) -> KeepsCache:
    """The engine as one whose cache can be saved; `InputError` if it is none."""
    if not isinstance(engine, KeepsCache):
        raise InputError("a server keeps no cache of keys and values for this program", "leave out --prompt-cache")
    return engine
