"""Commands that tell figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dbrx_cli.engine import REMOTE
from dbrx_cli.repl.phrases import card_in_words, count
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.repl.loop import Repl


def tokens(repl: Repl, argument: str) -> None:
    engine, messages = repl.engine, repl.conversation.messages
    used = engine.count(messages) if messages else 0
    repl.tell(f"{used} of {engine.context} tokens are used by {count(len(messages), 'message')}")
    if repl.files:
        waiting = engine.count(repl.conversation.ask("".join(repl.files.values())).messages) - used
        repl.tell(f"{waiting} more with {count(len(repl.files), 'file')} before your next message; /read lists them")
    if repl.conversation.skipped:
        repl.tell(f"{count(repl.conversation.skipped, 'old message')} are no longer read")
    if messages and (reads := repl.reading(repl.conversation, "not in the cache, and read with the next message: {}")):
        repl.tell(reads)


def stats(repl: Repl, argument: str) -> None:
    if not repl.last:
        repl.report.line("no reply yet")
        return
    prompt = sum(done.usage.prompt_tokens for done in repl.replies)
    cached = sum(done.usage.cached_tokens for done in repl.replies)
    made = sum(done.usage.completion_tokens for done in repl.replies)
    prefill = sum(done.timings.prefill_s for done in repl.replies)
    decode = sum(done.timings.decode_s for done in repl.replies)
    replies = count(len(repl.replies), "reply").replace("replys", "replies")
    repl.table(
        {
            "last reply": repl.last.summary(),
            replies: f"read {prompt - cached} of {prompt} prompt tokens ({cached} cached) in {prefill:.1f} s, "
            f"made {count(made, 'token')} in {decode:.1f} s",
        }
        | ({"the model": f"was loaded in {repl.last.timings.load_s:.1f} s"} if repl.last.attn != REMOTE else {})
        | ({"the card": card_in_words(repl.last.card)} if repl.last.card else {})
    )


def trace(repl: Repl, argument: str) -> None:
    from dbrx_cli.engine import Continued
    from dbrx_cli.engine.local import LocalEngine

    engine, last, conversation = repl.engine, repl.last, repl.conversation
    if not isinstance(engine, LocalEngine):
        raise InputError("/trace needs the model in this process", "leave out --url")
    if last is None or not last.token_ids or not conversation.turns or conversation.turns[-1].role != "assistant":
        raise InputError("there is no reply yet whose experts could be shown")
    ffn = engine.network.config.ffn_config
    if ffn.moe_top_k >= ffn.moe_num_experts:
        raise InputError("every token uses all experts of this model: nothing is chosen", "try -m demo-moe")
    from dbrx_cli.render.console import PlainConsole
    from dbrx_cli.render.routing import figures, heat_map
    from model.trace import record

    asked = replace(conversation, turns=conversation.turns[:-1]).messages
    ids = last.whole.token_ids if isinstance(last, Continued) else last.token_ids
    prompt = engine.tokenizer.encode_segments(engine.tokenizer.chat_template.segments(asked))
    repl.report.notice(f"reads {count(len(prompt) + len(ids), 'token')} again")
    whole = record(engine.network, [*prompt, *ids])
    start = len(prompt)
    reply = replace(
        whole,
        ids=whole.ids[start:],
        expert_ids=whole.expert_ids[:, start:],
        router_weights=whole.router_weights[:, start:],
        foreseen=whole.foreseen[:, start:],
    )
    console = PlainConsole(stderr=True)
    console.print(heat_map(reply))
    console.print(figures(reply))
