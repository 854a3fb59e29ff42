"""The model in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.engine import Delta, Done, FinishReason, Request, Timings, Usage
from dbrx_cli.options import DEFAULT_MODEL, ModelOptions
from dbrx_cli.report import Report
from model.errors import ContextError, InputError, ModelError
from model.messages import Message

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from model.transformer import DbrxForCausalLM

DEMO = "demo"


class LocalEngine:
    """A loaded network, its tokenizer, and the cache of the conversation that it read last."""

    def __init__(
        self,
        network: DbrxForCausalLM,
        tokenizer: Tokenizer,
        *,
        name: str,
        revision: str | None = None,
        context: int | None = None,
        load_s: float = 0.0,
    ) -> None:
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
        self._cache = KVCache(network.config.n_layers)
        self._cached: list[int] = []  # the ids that the cache holds

    @classmethod
    def load(cls, options: ModelOptions, report: Report) -> LocalEngine:
        """Find the model, read it with a progress bar, and make it ready."""
        start = time.perf_counter()
        folder = find_model(options, report)
        # Read when torch loads OpenMP. Threads that wait by spinning take the core from the one that is waited for as
        # soon as anything else runs on the machine: on two cores decoding was 2 to 5 times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from model.config import DbrxConfig
        from model.tokenizer import AutoTokenizer
        from model.transformer import DbrxForCausalLM

        if options.threads:
            torch.set_num_threads(options.threads)
        DbrxConfig.from_json(folder / "config.json")  # a folder that is no model is told so before all else
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with report.bar("Reading the weights") as advance:
            network = DbrxForCausalLM.from_pretrained(
                folder,
                dtype=options.dtype,
                device_map=options.device_map,
                max_memory=options.memory_limits,
                attn_implementation=options.attn,
                progress=advance,
            )
        load_s = time.perf_counter() - start
        report.detail(f"loaded {options.model} in {load_s:.2f} s, attention {network.transformer.attention}")
        return cls(
            network,
            tokenizer,
            name=options.model,
            revision=options.revision,
            context=options.context,
            load_s=load_s,
        )

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """See `Engine.stream`."""
        ids = self._encode(request.prompt, request.continue_final)
        if len(ids) >= self.context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, and the context is {self.context}",
                "shorten the prompt, or raise --context if the model allows",
            )
        reply = _Reply(self.tokenizer, request, ids)
        reason: FinishReason = "interrupted"
        try:
            reason = yield from self._answer(request, reply)
        except KeyboardInterrupt:
            pass
        finally:
            # A token is read only when the next is asked for, and an interrupted step leaves no trace in the cache.
            self._cached = (ids + reply.ids)[: len(self._cache)]
        rest = reply.detokenizer.finish()
        if rest:
            reply.text += rest
            yield Delta(rest, None)
        yield self._done(reply, reason)

    def count(self, messages: Sequence[Message]) -> int:
        """See `Engine.count`."""
        return len(self._encode(messages))

    def unread(self, messages: Sequence[Message]) -> int:
        """See `Engine.unread`."""
        ids = self._encode(messages)
        return len(ids) - _common_prefix(ids, self._cached)

    def close(self) -> None:
        """See `Engine.close`."""
        del self.network, self._cache

    def _encode(self, prompt: Sequence[Message] | str, continue_final: bool = False) -> list[int]:
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

    def _answer(self, request: Request, reply: _Reply) -> Generator[Delta, None, FinishReason]:
        """Read what the cache does not hold, then decode; returns why the reply ended."""
        import torch

        from model.decode import decode, prefill

        kept = _common_prefix(reply.prompt, self._cached)
        kept = min(kept, len(reply.prompt) - 1)  # the last token is read again: its logits are not kept
        self._cache.trim(0, kept)
        reply.cached = kept
        device = self.network.device
        logits = prefill(self.network, torch.tensor([reply.prompt[kept:]], device=device), self._cache)
        ends = self.tokenizer.eos_token_ids
        steps = decode(
            self.network,
            [reply.prompt],
            logits,
            self._cache,
            request.params,
            eos_ids=ends,
            generator=torch.Generator(device).manual_seed(reply.seed),
            max_context=self.context,
        )
        for (token,) in steps:
            assert token is not None
            piece = reply.add(token, end=token in ends)
            yield Delta(piece, token)
            if reply.detokenizer.stopped:
                return "stop_string"
        return "stop" if reply.ids[-1] in ends else "length"

    def _done(self, reply: _Reply, reason: FinishReason) -> Done:
        now = time.perf_counter()
        first = reply.first_token_at or now
        prefill_s, decode_s = first - reply.started, (reply.last_token_at or now) - first
        read = len(reply.prompt) - reply.cached
        return Done(
            text=reply.text,
            token_ids=reply.ids,
            finish_reason=reason,
            usage=Usage(len(reply.prompt), reply.cached, len(reply.ids)),
            timings=Timings(
                load_s=self.load_s,
                prefill_s=prefill_s,
                decode_s=decode_s,
                prefill_tokens_per_s=read / prefill_s if prefill_s else 0.0,
                decode_tokens_per_s=max(0, len(reply.ids) - 1) / decode_s if decode_s else 0.0,
            ),
            model=self.name,
            revision=self.revision,
            attn=self.network.transformer.attention,
            dtype=str(self.network.dtype).removeprefix("torch."),
            quantize="none",
            seed=reply.seed,
        )


class _Reply:
    """A reply as it is made, with its clock."""

    def __init__(self, tokenizer: Tokenizer, request: Request, prompt: list[int]) -> None:
        from secrets import randbits

        from model.detokenizer import Detokenizer

        self.prompt = prompt
        self.ids: list[int] = []
        self.text = ""
        self.cached = 0
        self.seed = request.params.seed if request.params.seed is not None else randbits(32)
        self.detokenizer = Detokenizer(tokenizer, stop=request.stop)
        self.started = time.perf_counter()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    def add(self, token: int, end: bool) -> str:
        """Take a token; return the text that can be shown now. The token that ends a turn has none."""
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.ids.append(token)
        piece = "" if end else self.detokenizer.push(token)
        self.text += piece
        return piece


def find_model(options: ModelOptions, report: Report) -> Path:
    """The model's folder on this machine; `ModelError` says what to type when there is none."""
    if options.model == DEMO:
        from dbrx_cli.demo import ensure_demo

        with report.bar("Converting the demo model", unit="tensors") as advance:
            return ensure_demo(report.notice, advance)
    from model.hub import resolve

    try:
        return resolve(options.model, revision=options.revision, download=False)
    except ModelError as error:
        if options.model != DEFAULT_MODEL:
            raise
        raise ModelError(
            f"no model was named, and {DEFAULT_MODEL} (264 GB) is not on this machine",
            "name one with -m FOLDER or -m org/name, or try `-m demo`, a small model in the same architecture",
        ) from error


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the front are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
