"""The model in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dbrx_cli.engine import Delta, Done, FinishReason, Request
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.follower import lead
from dbrx_cli.engine.load import check_source, find_model, load_network
from dbrx_cli.engine.memory import memory_fault
from dbrx_cli.engine.reply import Reply
from dbrx_cli.options import ModelOptions
from dbrx_cli.report import Report
from model.detokenizer import Detokenizer
from model.errors import ContextError, InputError
from model.messages import Message

if TYPE_CHECKING:
    from torch import Tensor

    from dbrx_cli.engine.resume import Journal
    from model.causal_lm import DbrxForCausalLM
    from model.constrain import GrammarMask
    from model.tokenizer import Tokenizer


class LocalEngine:
    """A loaded network, its tokenizer, and the cache of the conversation that it read last."""

    continues = True

    def __init__(
        self,
        network: DbrxForCausalLM,
        tokenizer: Tokenizer,
        *,
        name: str,
        revision: str | None = None,
        context: int | None = None,
        load_s: float = 0.0,
        source: Path | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """source: where all of the weights came from; without, the cache is not saved, since other processes hold
        parts of it. notice: hears what the user should know.
        """
        from model.generation_config import GenerationConfig
        from model.kv_cache import KVCache

        limit = network.config.max_seq_len
        if context is not None and context > limit:
            raise InputError(f"--context {context} is more than the {limit} tokens that the model was made for")
        self.network = network
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.context = context or limit
        self.load_s = load_s
        self.defaults = (network.generation_config or GenerationConfig()).sampling()
        self.source = source
        self.notice = notice
        self.quantize = network.packing.quantize if network.packing is not None else "none"
        self._cache = KVCache(network.config.n_layers)
        self._cached: list[int] = []  # the ids that the cache holds
        self._encoded: tuple[object, list[int]] | None = None  # the last prompt: a turn is counted, then answered
        self._replied: Reply | None = None  # the last one
        self._last: _LastLogits | None = None  # so that the same prompt, or a saved one, need not be read at all

    @classmethod
    def load(cls, options: ModelOptions, report: Report) -> LocalEngine:
        """Find the model, read it with a progress bar, and make it ready."""
        start = time.perf_counter()
        folder = find_model(options, report)
        from model.tokenizer import AutoTokenizer

        ranks = lead(options)
        config = check_source(folder)  # what is no model is told so before all else
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.require_rows(config.vocab_size, folder)
        network = load_network(folder, options, report, ranks)
        if ranks is not None:
            ranks.lead(network)
        load_s = time.perf_counter() - start
        report.detail(f"loaded {options.model} in {load_s:.2f} s, attention {network.transformer.attention}")
        return cls(
            network,
            tokenizer,
            name=options.model,
            revision=options.revision,
            context=options.context,
            load_s=load_s,
            source=folder if ranks is None else None,
            notice=report.notice,
        )

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """See `Engine.stream`."""
        ids, begun, before = self._parts(request)
        if (known := len(ids) + len(begun)) >= self.context:
            raise ContextError(
                f"the prompt has {known} tokens, and the context is {self.context}",
                "shorten the prompt, or raise --context if the model allows",
            )
        with self._journal(request, ids) as journal:
            seed = journal.seed if journal else request.params.seed
            reply = Reply(self.tokenizer, request, ids, seed, begun, before)
            if self.network.expert_store is not None:
                reply.streamed = self.network.expert_store.counters.copy()
            reason: FinishReason = "interrupted"
            fault = broken = None
            try:
                if journal is None or not journal.finished:
                    with damage_named(self.source):
                        reason = yield from self._answer(request, reply, journal)
                else:
                    self.notice(f"{journal.path} holds the whole reply; nothing is computed anew")
                    reply.cached = len(ids)
                    yield from reply.repeat(journal.ids, journal.logprobs)
                    reason = journal.finished
            except KeyboardInterrupt:
                pass
            except InputError as error:  # a schema leaves nothing that could come next
                if not reply.ids:
                    raise
                broken = error
            except (MemoryError, RuntimeError) as error:
                fault = memory_fault(error, self.network, self._cache)
                if fault is None:
                    raise
            finally:
                self._settle(reply)
        if fault is not None:  # raised out here, so that it keeps none of the frames alive that hold the memory
            self._forget()
            raise fault
        rest = reply.finish(reason)
        if rest:
            yield Delta(rest, None)
        yield replace(reply.done(self, reason), error=broken)

    def count(self, messages: Sequence[Message]) -> int:
        """See `Engine.count`."""
        return len(self._encode(messages))

    def unread(self, messages: Sequence[Message]) -> int:
        """See `Engine.unread`."""
        from model.batch import common_prefix

        ids = self._encode(messages)
        return len(ids) - common_prefix(ids, self._cached)

    def close(self) -> None:
        """See `Engine.close`."""
        del self.network, self._cache

    def _parts(self, request: Request) -> tuple[list[int], list[int], str]:
        """The prompt; and of a reply that goes on, its ids and text.

        It goes on as if it had never ended: from the ids that were sampled, behind the prompt that it answers, so that
        penalties count them as the reply's. Where they are not known, or of another tokenizer, from those of its text.
        """
        if not request.continue_final or isinstance(request.prompt, str):
            return self._encode(request.prompt), [], ""
        *asked, reply = request.prompt
        if reply.token_ids and self._spells(reply.token_ids, reply.content):
            return self._encode(asked), list(reply.token_ids), reply.content
        ids, template = self.tokenizer.encode(reply.content), self.tokenizer.chat_template
        whole = template.render(request.prompt, continue_final_message=True)
        if self._spells(ids, reply.content) and template.render(asked) + reply.content == whole:
            return self._encode(asked), ids, reply.content
        return self._encode(request.prompt, continue_final=True), [], reply.content

    def _spells(self, ids: Sequence[int], text: str) -> bool:
        """Whether ids are ids of this model, and of this text."""
        known = all(0 <= each < self.network.config.vocab_size for each in ids)
        return known and Detokenizer(self.tokenizer).repeat(ids) == text

    def _encode(self, prompt: Sequence[Message] | str, continue_final: bool = False) -> list[int]:
        asked = (prompt if isinstance(prompt, str) else tuple(prompt), continue_final)
        if self._encoded is None or self._encoded[0] != asked:
            self._encoded = asked, self._encode_anew(prompt, continue_final)
        return list(self._encoded[1])

    def _encode_anew(self, prompt: Sequence[Message] | str, continue_final: bool) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            segments = self.tokenizer.chat_template.segments(
                prompt, add_generation_prompt=not continue_final, continue_final_message=continue_final
            )
            ids = self.tokenizer.encode_segments(segments)
        if not ids:
            raise InputError("the prompt is empty", "type a prompt, or pipe one to stdin")
        return ids

    def _journal(self, request: Request, prompt: list[int]) -> AbstractContextManager[Journal | None]:
        """The file of `Request.resume`."""
        if request.resume is None:
            return nullcontext()
        from secrets import randbits

        from dbrx_cli.engine.fingerprint import of_request
        from dbrx_cli.engine.resume import Journal
        from model.saved_cache import Layout

        seed = request.params.seed if request.params.seed is not None else randbits(32)
        return Journal(
            request.resume, of_request(self, request, prompt), seed, Layout.of(self.network), notice=self.notice
        )

    def _answer(self, request: Request, reply: Reply, journal: Journal | None) -> Generator[Delta, None, FinishReason]:
        """Read what the cache does not hold, then decode; returns why the reply ended."""
        import torch

        from model.constrain import ForcedDrafter
        from model.decode import decode
        from model.lookup import lookup

        mask = self._mask(request)
        generator = torch.Generator(self.network.device).manual_seed(reply.seed)
        last, self._replied = self._replied, reply
        if last is not None and last.drawn is not None and (last.seed, last.known) == (reply.seed, reply.known):
            reply.drawn = last.drawn
            generator.set_state(last.drawn)  # the reply goes on, and so do the draws
        if journal is not None:
            if len(journal.cache):  # told before the text, which does not end its line
                self.notice(f"{journal.path}: the reply goes on behind {len(journal.ids)} tokens")
            yield from reply.repeat(journal.ids, journal.logprobs)
            if reply.stopped:
                return "stop_string"
            if journal.generator is not None:
                generator.set_state(journal.generator)
            if len(journal.cache):
                self._forget()
                self._cache, self._cached = journal.cache, reply.known[: len(journal.cache)]
        logits = self._read(reply, journal, request.on_read)
        reply.drafter = lookup(request.params.lookup)
        ends = self.tokenizer.eos_token_ids
        steps = decode(
            self.network,
            [reply.prompt],
            logits,
            self._cache,
            replace(request.params, max_tokens=request.params.max_tokens + reply.begun),
            replies=[reply.ids],
            eos_ids=ends,
            stopper=mask.complete if mask else None,
            mask=mask,
            watcher=reply.watch if reply.top is not None else None,
            drafter=ForcedDrafter(mask, len(reply.prompt), reply.drafter) if mask else reply.drafter,
            generator=generator,
            max_context=self.context,
        )
        reason: FinishReason | None = None
        for (token,) in steps:
            assert token is not None
            delta = reply.add(token)
            if journal is not None:
                journal.note(reply, self._cache, generator.get_state())
            if request.params.seed is not None:
                reply.drawn = generator.get_state()
            yield delta
            if reply.stopped:
                reason = "stop_string"
                break
        steps.close()
        if reason is None:
            complete = reply.ids[-1] in ends or (mask is not None and mask.complete(0, reply.ids))
            reason = "stop" if complete else "length"
        if journal is not None:
            journal.finish(reason)
        return reason

    def _mask(self, request: Request) -> GrammarMask | None:
        constraint, size = request.constraint, self.network.config.vocab_size
        if constraint is None:
            return None
        from model.constrain import GrammarMask, SchemaMask

        if constraint.grammar is not None:
            return GrammarMask(constraint.grammar, self.tokenizer, size)
        return SchemaMask(constraint.json_schema or {}, self.tokenizer, size)

    def _read(self, reply: Reply, journal: Journal | None, on_read: Callable[[int, int], None] | None) -> Tensor:
        """Read what the cache does not hold of the prompt, and of a reply that is taken up; logits [1, vocab]."""
        import torch

        from model.batch import common_prefix
        from model.decode import prefill

        known = reply.known
        kept = common_prefix(known, self._cached)
        last = self._last if self._last is not None and kept == len(known) == self._last.tokens else None
        self._last = last
        if last is None:
            kept = min(kept, len(known) - 1)  # the last token is read again: it has no logits yet
        self._cached = known[:kept]
        self._cache.trim(0, kept)
        reply.cached = min(kept, len(reply.prompt) + reply.begun)
        reply.reading = True
        if last is not None:
            return last.logits

        def on_chunk(columns: int) -> None:
            if on_read is not None:
                on_read(len(self._cache) - kept, len(known) - kept)
            if journal is not None and len(self._cache) < len(known):
                journal.note(reply, self._cache, None)

        if on_read is not None:
            on_read(0, len(known) - kept)
        unread = torch.tensor([known[kept:]], device=self.network.device)
        logits = prefill(self.network, unread, self._cache, on_chunk=on_chunk)
        self._last = _LastLogits(len(known), logits)
        return logits

    def _settle(self, reply: Reply) -> None:
        """Cut the cache to the ids that are known, and remember them.

        A token is read only when the next is asked for, an interrupted step leaves no trace, and drafts run ahead.
        """
        if reply.reading:
            self._cached = reply.known[: len(self._cache)]
            self._cache.trim(0, len(self._cached))

    def _forget(self) -> None:
        """Give the cache's memory back."""
        from model.kv_cache import KVCache

        self._cache, self._cached, self._last = KVCache(self.network.config.n_layers), [], None

    def save_cache(self, path: Path) -> None:
        """See `KeepsCache.save_cache`."""
        from dbrx_cli.engine.fingerprint import fingerprint
        from dbrx_cli.engine.saved import replacing
        from model.saved_cache import SavedCache, save_cache

        if self._cached:
            last = self._last if self._last is not None and self._last.tokens <= len(self._cached) else None
            saved = SavedCache(self._cache, self._cached, *(last or (0, None)))
            with replacing(path) as file:
                save_cache(file, saved, fingerprint(self))

    def load_cache(self, path: Path) -> int:
        """See `KeepsCache.load_cache`."""
        from dbrx_cli.engine.fingerprint import fingerprint
        from dbrx_cli.engine.saved import reading
        from model.saved_cache import Layout, UnusableState, load_cache

        with reading(path) as found:
            if found is None:
                return 0
            try:
                saved = load_cache(*found, fingerprint(self), Layout.of(self.network))
            except UnusableState as error:
                self.notice(f"{path} {error.message}; the text is read anew")
                return 0
        self._cache, self._cached = saved.cache, saved.ids
        self._last = _LastLogits(saved.logits_at, saved.logits) if saved.logits is not None else None
        return len(saved.ids)


class _LastLogits(NamedTuple):
    """What came out of the network after a number of tokens of the cache [1, vocab]."""

    tokens: int
    logits: Tensor
