"""`generate --batch`: prompts in JSON lines in, answers in JSON lines out.

A line that cannot be answered does not keep the others from it: its record says why, and the command ends with a fault.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from dbrx_cli.answers import Answers, Wanted
from dbrx_cli.engine import Done, Engine, Request
from dbrx_cli.report import Report
from dbrx_cli.stdin import InputErrors, decode
from model.errors import DbrxError, InputError
from model.json_text import Limits, parse
from model.messages import MAX_TEXT, Message
from model.sampling import PARAMETERS, SamplingParams

SAMPLING = {name: kind for name, kind in PARAMETERS.items() if name != "lookup"}  # drafts are of all lines or of none
KEYS = {"id", "prompt", "messages", "stop", *SAMPLING}
ROLES = ("system", "user", "assistant")


PIECE = 2**16  # bytes of a stream that are taken at a time
LONGEST_LINE = 2 * MAX_TEXT  # bytes; beyond it no prompt could be encoded
MOST_ENTRIES = 1_000_000  # of a line, commas of its text included: none that fits a context has as many
MOST_FAULTS = 1000  # lines without a prompt at the beginning of a stream, beyond which it is taken for something else
MOST_BLANK = 1_000_000  # and blank ones

LINE = Limits(LONGEST_LINE, MOST_ENTRIES)
Lines = list[tuple[int, bytes]]  # numbered from 0
Prompt = str | tuple[Message, ...]
Ask = Callable[[Prompt], Request]


@dataclass(frozen=True)
class Job:
    """A line of the prompts' file: what to ask and how it differs from the flags, or the fault in it."""

    index: int
    id: str | int | None = None
    prompt: Prompt = ()
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] | None = None
    fault: InputError | None = None

    @property
    def digest(self) -> str:
        """Tells an answer to this prompt from one to another prompt in the same place."""
        return digest(self.prompt if isinstance(self.prompt, str) else [[m.role, m.content] for m in self.prompt])

    def wanted(self, flags: Mapping[str, Any]) -> Wanted:
        """What an answer must have been asked with to count; flags: what holds for all lines, names -> values."""
        own = {f"--{name.replace('_', '-')}": value for name, value in (self.sampling or {}).items()}
        asked = dict(flags) | own | ({"--stop": digest(self.stop)} if self.stop else {})
        return Wanted(self.index, self.digest, {name: value for name, value in asked.items() if value is not None})

    def request(self, ask: Ask) -> Request:
        """What to ask the engine; ask: from a prompt to the request that the flags make of it.

        `InputError` tells the line. A seed that was given for all is counted up from prompt to prompt, so that equal
        prompts get other answers.
        """
        if self.fault:
            raise self.fault
        try:
            request = ask(self.prompt)
        except InputError as fault:
            raise InputError(f"line {self.index + 1}: {fault.message}", fault.hint) from None
        seed = request.params.seed
        own = dict(self.sampling or {})
        if seed is not None and "seed" not in own:
            own["seed"] = (seed + self.index) % request.params.SEEDS
        try:
            params = replace(request.params, **own)
        except ValueError as error:  # a server's bounds are narrower
            raise InputError(f"line {self.index + 1}: {error}") from None
        return replace(request, params=params, stop=self.stop or request.stop)


def digest(value: Any) -> str:
    """Of a value of JSON: enough to tell it from another one."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_jobs(data: bytes, source: str, errors: InputErrors) -> list[Job]:
    """All lines that are not blank. `InputError` if none of them can be answered, or an id comes twice."""
    (jobs,) = _usable([list(enumerate(data.split(b"\n")))], source, errors)
    return jobs


def stream_jobs(file: BinaryIO, source: str, errors: InputErrors) -> Iterator[list[Job]]:
    """As `read_jobs`, but of lines that still come: those that are there at a time. Faults come when they are read."""
    return _usable(_arriving(file, source), source, errors)


def _usable(parts: Iterable[Lines], source: str, errors: InputErrors) -> Iterator[list[Job]]:
    hint = 'give a line such as {"prompt": "..."} for each'
    seen: dict[str | int, int] = {}
    jobs: list[Job] = []  # faults wait for the first line that is none
    begun = False
    for lines in parts:
        jobs += [_job(number, line, errors) for number, line in lines if line.strip()]
        for job in jobs:
            if job.id is not None and seen.setdefault(job.id, job.index) != job.index:
                raise InputError(f"{source}: lines {seen[job.id] + 1} and {job.index + 1} have the same id {job.id!r}")
        begun = begun or not all(job.fault for job in jobs)
        if begun and jobs:
            yield jobs
            jobs = []
        elif len(jobs) > MOST_FAULTS or (lines and lines[-1][0] > MOST_BLANK):
            break
    if not begun:
        raise InputError(f"{source}: {jobs[0].fault}" if jobs else f"{source} holds no prompt", hint)


def _arriving(file: BinaryIO, source: str) -> Iterator[Lines]:
    """Numbered lines as they come: it waits for one, and takes along what is there behind it."""
    number, open_line = 0, b""
    while data := file.read1(PIECE):  # type: ignore[attr-defined]
        *lines, open_line = (open_line + data).split(b"\n")
        if len(open_line) > LONGEST_LINE:
            raise InputError(f"{source}: line {number + len(lines) + 1} has more than {LONGEST_LINE // 2**20} MiB")
        yield list(enumerate(lines, number))
        number += len(lines)
    yield [(number, open_line)]


def _job(index: int, line: bytes, errors: InputErrors) -> Job:
    try:
        values = parse(decode(line, f"line {index + 1}", errors).encode(), LINE)
        if not isinstance(values, dict):
            raise InputError(f"line {index + 1} is no JSON object")
    except ValueError as error:
        return Job(index, fault=InputError(f"line {index + 1} {error}"))
    except InputError as fault:
        return Job(index, fault=fault)
    id = values.get("id")
    try:
        if not isinstance(id, str | int | None) or isinstance(id, bool):
            id = None
            raise InputError("id must be a string or a whole number")
        json.dumps(id, ensure_ascii=False).encode()  # a lone surrogate could not be written back
        if unknown := sorted(set(values) - KEYS):
            raise InputError(f"unknown key {unknown[0]!r}: known are {', '.join(sorted(KEYS))}")
        return Job(index, id, _prompt(values), _stop(values.get("stop", ())), _sampling(values))
    except UnicodeEncodeError:
        return Job(index, fault=InputError(f"line {index + 1}: id is not valid Unicode"))
    except InputError as fault:
        return Job(index, id, fault=InputError(f"line {index + 1}: {fault.message}"))


def _prompt(values: dict[str, Any]) -> Prompt:
    prompt, messages = values.get("prompt"), values.get("messages")
    if (prompt is None) == (messages is None):
        raise InputError("give either prompt or messages")
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("prompt must be a text that is not empty")
        return prompt
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list of objects with role and content")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str) or len(fields) != 2:
            raise InputError("each message must have a role (system, user or assistant) and a content, and no more")
    if messages[-1]["role"] != "user":
        raise InputError("the last message must be the user's")
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise InputError("stop must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    given = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int if SAMPLING[name] is int else int | float):
            raise InputError(f"{name} must be a number, not {json.dumps(value)[:40]}")
    try:
        replace(SamplingParams(), **given)
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None
    return given


def record(job: Job, result: Done | DbrxError, flags: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the answers' file: index, the id if there was one, and the answer or what hindered it."""
    head = {"index": job.index} | ({"id": job.id} if job.id is not None else {})
    if isinstance(result, DbrxError):
        return {**head, "error": {"message": result.one_line, "code": result.exit_code}}
    wanted = job.wanted(flags)
    return {**head, **result.to_dict(), "prompt_sha256": wanted.digest, "asked": wanted.asked}


def run(
    engine: Engine,
    parts: Iterable[Sequence[Job]],
    ask: Ask,
    flags: Mapping[str, Any],
    answers: Answers,
    rows: int,
    report: Report,
) -> None:
    """Answer what is not answered yet, `rows` prompts at a time; `DbrxError` at the end if some got no answer.

    parts: of the prompts, each answered before the next is asked for. flags: what `Job.wanted` asks for, kept in the
    answers.
    """
    from dbrx_cli.engine.batched import answers as answer

    first: tuple[int, DbrxError] | None = None
    total = done = faults = tokens = empty = 0
    started = time.perf_counter()

    def write(job: Job, result: Done | DbrxError) -> None:
        nonlocal first, faults
        answers.write(record(job, result, flags))
        if isinstance(result, DbrxError):
            faults += 1
            first = min(first or (job.index, result), (job.index, result), key=lambda fault: fault[0])

    try:
        with report.bar("Answering", unit="prompts") as advance:
            for jobs in parts:
                by_index = {job.index: job for job in jobs if job.index not in answers.answered}
                if before := len(jobs) - len(by_index):
                    report.notice(f"{before} of {len(jobs)} prompts were answered before")
                total, done = total + len(jobs), done + before
                requests: list[tuple[int, Request]] = []
                for index, job in by_index.items():
                    try:
                        requests.append((index, job.request(ask)))
                    except InputError as fault:
                        write(job, fault)
                for index, result in answer(engine, requests, rows):
                    write(by_index[index], result)
                    done += isinstance(result, Done)
                    tokens += result.usage.completion_tokens if isinstance(result, Done) else 0
                    empty += isinstance(result, Done) and not result.text.strip()
                    advance(done + faults, total)
    except (KeyboardInterrupt, DbrxError):
        report.notice(f"{done} of {total} prompts are answered{answers.advice}")
        raise
    seconds = time.perf_counter() - started
    report.detail(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f}/s)")
    if empty:
        report.notice(f"{empty} of {total} replies {'is' if empty == 1 else 'are'} empty")
    if first is not None:
        which = "a prompt" if faults == 1 else f"{faults} of {total} prompts"
        raise DbrxError(f"{which} got no answer: {first[1].message}", "see `error` in the answers")
