"""The model in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.engine import Delta, Done, FinishReason, Request
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.follower import lead
from dbrx_cli.engine.job import Job
from dbrx_cli.engine.load import check_source, find_model, load_network
from dbrx_cli.engine.memory import memory_fault
from dbrx_cli.engine.use import keep_use
from dbrx_cli.options import ModelOptions, require_context
from dbrx_cli.report import Report
from model.detokenizer import Detokenizer
from model.errors import InputError, ModelError, ResourceError
from model.messages import Message

if TYPE_CHECKING:
    from torch import Tensor

    from dbrx_cli.engine.reply import Reply
    from dbrx_cli.engine.resume import Journal
    from model.causal_lm import DbrxForCausalLM
    from model.constrain import GrammarMask
    from model.kv_pool import KVPool
    from model.tokenizer import Tokenizer


class LocalEngine:
    """A loaded network, its tokenizer, and what it has read: a pool, and the conversation that came last."""

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
        pool: KVPool | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """source: where all of the weights came from; without, the cache is not saved, since other processes hold
        parts of it. pool: another one than that of a single conversation. notice: hears what the user should know.
        """
        from model.generation_config import GenerationConfig
        from model.kv_pool import KVPool
        from model.session import Session

        limit = network.config.max_seq_len
        require_context(context, limit)
        self.network = network
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.context = context or limit
        self.load_s = load_s
        self.defaults = (network.generation_config or GenerationConfig()).sampling()
        self.source = source
        self.notice = notice
        self.quantize = network.kernels.quantize if network.kernels is not None else "none"
        self.pool = pool or KVPool(network, self.kv_budget(1))
        self.session = Session(network, self.pool)  # the conversation that was read last
        self._encoded: tuple[object, list[int]] | None = None  # the last prompt: a turn is counted, then answered
        self._replied: Reply | None = None  # the last one

    @classmethod
    def load(cls, options: ModelOptions, report: Report) -> LocalEngine:
        """Find the model, read it with a progress bar, and make it ready."""
        start = time.perf_counter()
        folder = find_model(options, report)
        from model.formats.ollama import manifest_of
        from model.model_files import ModelFiles
        from model.tokenizer import Tokenizer

        ranks = lead(options)
        files = ModelFiles(folder, manifest_of(options.model))
        config = check_source(files)  # what is no model is told so before all else
        require_context(options.context, config.max_seq_len)
        tokenizer = Tokenizer.from_source(files)
        tokenizer.require_rows(config.vocab_size, folder)
        network = load_network(files, options, report, ranks)
        if ranks is not None:
            ranks.lead(network)
        from model.kv_pool import OneRow

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
            pool=OneRow(network) if ranks is not None else None,
            notice=report.notice,
        )

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """See `Engine.stream`."""
        from model.scheduler import Scheduler

        scheduler = Scheduler(self.network, 1, self.pool)
        fault: ResourceError | None = None
        reason: FinishReason = "interrupted"
        with Job(self, request) as job:
            self._replied = job.reply
            try:
                scheduler.add(job.row)
                yield from job.deltas()
                while len(scheduler):
                    scheduler.step()
                    yield from job.deltas()
                if job.row.fault is None:
                    reason = job.finish()
            except KeyboardInterrupt:
                pass
            except (MemoryError, RuntimeError) as error:
                fault = memory_fault(error, self.network, scheduler.cache)
                if fault is None:
                    raise
            finally:
                scheduler.cancel(job.row)
                self.session.keep(job.row, job.reply.known)
        if fault is not None:  # raised out here, so that it keeps none of the frames alive that hold the memory
            self._forget()
            del job, scheduler
            raise fault
        if job.row.fault is not None and not (isinstance(job.row.fault, InputError) and job.reply.ids):
            with damage_named(self.source):
                raise job.row.fault
        done = job.done(reason)
        yield from job.deltas()
        yield done

    def count(self, messages: Sequence[Message]) -> int:
        """See `Engine.count`."""
        return len(self._encode(messages))

    def unread(self, messages: Sequence[Message]) -> int:
        """See `Engine.unread`."""
        ids = self._encode(messages)
        return len(ids) - self.pool.find(ids)[0]

    def close(self) -> None:
        """See `Engine.close`."""
        del self.network, self.session, self.pool

    def parts(self, request: Request) -> tuple[list[int], list[int], str]:
        """The prompt; and of a reply that goes on, its ids and text.

        It goes on as if it had never ended: from the ids that were sampled, behind the prompt that it answers, so that
        penalties count them as the reply's. Where they are not known, or of another tokenizer, from those of its text.
        """
        known = None if request.prompt_ids is None else list(request.prompt_ids)
        if not request.continue_final or isinstance(request.prompt, str):
            return known or self._encode(request.prompt), [], ""
        *asked, reply = request.prompt
        if known is not None:
            return known, list(reply.token_ids), reply.content
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
        found = self._encoded  # read once: a server's threads ask at the same time
        if found is None or found[0] != asked:
            found = self._encoded = asked, self._encode_anew(prompt, continue_final)
        return list(found[1])

    def _encode_anew(self, prompt: Sequence[Message] | str, continue_final: bool) -> list[int]:
        if isinstance(prompt, str):
            if ids := self.tokenizer.encode(prompt):
                return ids
            raise InputError("the prompt is empty", "type a prompt, or pipe one to stdin")
        template = self.tokenizer.chat_template
        segments = template.segments(
            prompt, add_generation_prompt=not continue_final, continue_final_message=continue_final
        )
        if ids := self.tokenizer.encode_segments(segments):
            return ids
        raise ModelError(f"{template.name}: makes no prompt of this conversation", "generate --raw goes without it")

    def journal(self, request: Request, prompt: list[int]) -> Journal | None:
        """The file of `Request.resume`, opened."""
        if request.resume is None:
            return None
        from secrets import randbits

        from dbrx_cli.engine.fingerprint import of_request
        from dbrx_cli.engine.resume import Journal
        from model.saved_cache import Layout

        seed = request.params.seed if request.params.seed is not None else randbits(32)
        return Journal(
            request.resume, of_request(self, request, prompt), seed, Layout.of(self.network), notice=self.notice
        )

    def mask(self, request: Request) -> GrammarMask | None:
        """What keeps the reply to `Request.constraint`."""
        constraint, size = request.constraint, self.network.config.vocab_size
        if constraint is None:
            return None
        from model.constrain import GrammarMask, SchemaMask

        if constraint.grammar is not None:
            return GrammarMask(constraint.grammar, self.tokenizer, size)
        return SchemaMask(constraint.json_schema or {}, self.tokenizer, size)

    def draws_behind(self, reply: Reply) -> Tensor | None:
        """The state of the generator where this reply goes on from the last one, with the same seed."""
        last = self._replied
        return last.drawn if last is not None and (last.seed, last.known) == (reply.seed, reply.known) else None

    def kv_budget(self, rows: int) -> int:
        """Bytes for keys and values of so many rows: whole contexts, as far as there is room; one in any case."""
        from model.kv_pool import kv_bytes

        each, plan = kv_bytes(self.network, self.context), self.network.load_plan
        return max(each, min(rows * each, plan.kv_room if plan is not None else rows * each))

    def keep_use(self) -> None:
        """Keep how often each expert was chosen, where that decides which lie on a card."""
        if self.network.bus is not None and self.source is not None:
            keep_use(self.source, self.network.bus.used)

    def _forget(self) -> None:
        """Give the memory of keys and values back."""
        from model.session import Session

        self.pool.clear()
        self.session = Session(self.network, self.pool)

    def save_cache(self, path: Path) -> None:
        """See `KeepsCache.save_cache`."""
        from dbrx_cli.engine.fingerprint import fingerprint
        from dbrx_cli.engine.saved import replacing

        if self.pool.find(self.session.ids)[0]:  # nothing was read before an early interrupt or fault
            with replacing(path) as file:
                self.session.save(file, fingerprint(self))

    def load_cache(self, path: Path) -> int:
        """See `KeepsCache.load_cache`."""
        from dbrx_cli.engine.fingerprint import fingerprint
        from dbrx_cli.engine.saved import reading
        from model.saved_cache import UnusableState

        with reading(path) as found:
            if found is None:
                return 0
            try:
                self.session.load(*found, fingerprint(self))
            except UnusableState as error:
                self.notice(f"{path} {error.message}; the text is read anew")
                return 0
        return len(self.session.ids)
