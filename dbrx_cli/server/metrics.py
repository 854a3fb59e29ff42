"""What /metrics tells. Nothing in it comes from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from dbrx_cli.server.tickets import Ticket
    from dbrx_cli.server.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts of one server."""

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()
        self.answers = Counter(
            "dbrx_http_answers", "Answers by path and status.", ["path", "status"], registry=registry
        )
        self._prompt = Counter("dbrx_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("dbrx_cached_tokens", "Of these not read anew.", registry=registry)
        self._made = Counter("dbrx_completion_tokens", "Tokens made.", registry=registry)
        self._replies = Counter("dbrx_replies", "Replies by what ended them.", ["finish_reason"], registry=registry)
        self._first = Histogram(
            "dbrx_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry
        )
        self._each = Histogram(
            "dbrx_token_seconds", "From token to token, a reply's mean.", buckets=TOKEN_SECONDS, registry=registry
        )
        for name, text, now in (
            ("dbrx_rows_running", "Replies that are being made.", lambda: worker.running),
            ("dbrx_rows_waiting", "Replies that wait for a place.", lambda: worker.waiting),
            ("dbrx_step_seconds", "What a step takes at present.", lambda: worker.pace.step_s),
        ):
            Gauge(name, text, registry=registry).set_function(now)
        self._worker = worker
        self._used = Gauge("dbrx_kv_used_bytes", "Keys and values of replies.", registry=registry)
        self._kept = Gauge("dbrx_kv_cached_bytes", "Those kept for who comes back.", registry=registry)

    def note(self, tickets: Sequence[Ticket], n: int) -> None:
        """Count what became of a request: `n` choices for each prompt."""
        for i, ticket in enumerate(tickets):
            done = ticket.result
            if i % n == 0:
                self._prompt.inc(done.usage.prompt_tokens)
                self._cached.inc(done.usage.cached_tokens)
            self._made.inc(done.usage.completion_tokens)
            self._replies.labels(done.finish_reason).inc()
            queued = ticket.added - ticket.came
            self._first.observe(queued + done.timings.prefill_s)
            if done.usage.completion_tokens > 1:
                self._each.observe(done.timings.decode_s / (done.usage.completion_tokens - 1))

    async def text(self) -> bytes:
        """All of it in Prometheus' form."""
        if (pool := await self._worker.pool_stats()) is not None:
            self._used.set(pool.used_bytes)
            self._kept.set(pool.cached_bytes)
        return generate_latest(self._registry)
