"""Way 2: messages -> prompt segments, text apart from special tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .errors import InputError, ModelError
from .messages import Message, check_size

if TYPE_CHECKING:
    from types import CodeType

# The format that DBRX was trained on, without a default system prompt.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xF1000))


@dataclass(frozen=True)
class Segment:
    """A part of a prompt: ordinary text, or the spelling of one special token."""

    text: str
    special: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template; `source=None` is ChatML without a default system prompt.

    `special_tokens` are the spellings that become ids of their own, `variables` what the template may read beside the
    messages (`bos_token`, `eos_token`, ...), `name` how messages about faults call it, `system` goes before messages
    that begin with none. A template that cannot be parsed, that fails, or that goes over its budget of work raises
    `ModelError`, when it is first rendered.
    """

    source: str | None = None
    special_tokens: Collection[str] = ("<|im_start|>", "<|im_end|>")
    variables: Mapping[str, str] | None = None
    name: str = "built-in chat template"
    system: str | None = None

    def __post_init__(self) -> None:
        for token in self.special_tokens:
            if len(token) < 2:
                raise ModelError(f"{self.name}: the special token {token!r} cannot be told from text")

    @property
    def text(self) -> str:
        """The Jinja source that decides."""
        return CHATML if self.source is None else self.source

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The prompt as one string, exactly as the reference implementation renders it.

        With `continue_final_message` it ends inside the last assistant message, and `add_generation_prompt` is moot.
        """
        if not continue_final_message:
            return self._run(messages, add_generation_prompt)
        if not messages or messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message from the assistant")
        # The space shows whether the template strips the message, as in the reference.
        end = self._unused_character(messages)
        marked = [*messages[:-1], replace(messages[-1], content=messages[-1].content + end + " ")]
        prompt, found, rest = self._run(marked, False).rpartition(end)
        if not found:
            raise ModelError(f"{self.name}: leaves the last message out, so it cannot be continued")
        return prompt if rest.startswith(" ") else prompt.rstrip()

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[Segment]:
        """The prompt in parts; their texts joined are `render(...)`, and no message's text is in a special one.

        A marker that no message holds goes into every place where a spelling begins or ends. It is taken out after the
        split, so a spelling counts only where the template wrote it.
        """

        def render(contents: Sequence[str]) -> str:
            return self.render(
                [replace(message, content=content) for message, content in zip(messages, contents, strict=True)],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )

        contents = [message.content for message in messages]
        plain = render(contents)
        marker = self._unused_character(messages)
        marked = render([self._mark_borders(content, marker) for content in contents])
        if marked.replace(marker, "") != plain:
            # The template looks inside the text. Then only whole spellings are marked, unless that lets one through.
            other = render([self._mark_spellings(content, marker) for content in contents])
            if other.replace(marker, "") == plain and self._spelled(other) == self._spelled(marked):
                marked = other
        return self._split(marked, marker)

    @cached_property
    def _code(self) -> CodeType:
        from .template_sandbox import compile_template  # jinja2 is imported only when a prompt is rendered

        try:
            return compile_template(self.text)
        except Exception as error:  # the source is foreign: the parser and Python's compiler may raise anything
            raise self._fault("cannot be used", error) from None

    @cached_property
    def _spelling(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from .template_sandbox import run_template

        if self.system is not None and (not messages or messages[0].role != "system"):
            messages = [Message("system", self.system), *messages]
        size = sum(len(message.content) for message in messages)
        check_size(size)
        code = self._code
        variables = {
            **(self.variables or {}),
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        # Far more than a template needs that copies each message a few times; the first part bounds hostile ones.
        units = 200_000 + 500 * len(messages) + 2 * size
        try:
            return run_template(code, variables, units)
        except Exception as error:  # the template is foreign: it may raise anything
            raise self._fault("failed on this conversation", error) from None

    def _fault(self, what: str, error: Exception) -> ModelError:
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:300]) or type(error).__name__
        return ModelError(f"{self.name}: {what}: {reason}", "a base model takes plain text: generate --raw")

    def _unused_character(self, messages: Sequence[Message]) -> str:
        """A private-use character that occurs nowhere in the prompt."""
        own = (self.text, self.system or "", *self.special_tokens, *(self.variables or {}).values())
        texts = [*own, *(message.content for message in messages)]
        for code in PRIVATE_USE:
            if not any(chr(code) in text for text in texts):
                return chr(code)
        raise InputError("the messages hold every private-use character", "take some of them out")

    def _mark_borders(self, content: str, marker: str) -> str:
        for token in self.special_tokens:
            if token[0] in content or token[-1] in content:
                break
        else:
            return content
        first = "".join({re.escape(token[0]) for token in self.special_tokens})
        last = "".join({re.escape(token[-1]) for token in self.special_tokens})
        return re.sub(f"(?=[{last}])", marker, re.sub(f"(?<=[{first}])", marker, content))

    def _mark_spellings(self, content: str, marker: str) -> str:
        return self._spelling.sub(lambda found: found[0][0] + marker + found[0][1:], content)

    def _spelled(self, prompt: str) -> list[str]:
        return self._spelling.findall(prompt)

    def _split(self, prompt: str, marker: str) -> list[Segment]:
        parts, start = [], 0
        for found in self._spelling.finditer(prompt):
            parts += [Segment(prompt[start : found.start()].replace(marker, ""), False), Segment(found[0], True)]
            start = found.end()
        parts.append(Segment(prompt[start:].replace(marker, ""), False))
        return [part for part in parts if part.text]
