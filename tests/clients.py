"""Programs of others against a server, in their own environment: `python clients.py CLIENT URL` prints JSON.

Each holds a conversation of three turns, asks for a schema and a stop string, meets an error, and hangs up.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

MODEL = "small"
ASKED = ["Hello", "And then?", "And at last?"]
STOP = ["E", "Q never seen"]
BIAS = {str(token): -100 for token in (*range(65), *range(91, 320))}  # a random network, in capitals
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["Ada", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"], "additionalProperties": False,
}  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def with_openai(url: str) -> dict[str, Any]:
    import openai
    import pydantic

    class Person(pydantic.BaseModel):
        name: Literal["Ada", "Bob"]
        old: bool

    client = openai.OpenAI(base_url=url, api_key="none")
    common: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12, "logit_bias": BIAS}
    talk: list[Any] = []
    for i, text in enumerate(ASKED):
        talk.append(user(text))
        if i == 0:
            content = client.chat.completions.create(messages=talk, **common).choices[0].message.content
        elif i == 1:  # the streaming helper
            with client.chat.completions.stream(messages=talk, **common) as stream:
                kinds = {event.type for event in stream}
                content = stream.current_completion_snapshot.choices[0].message.content
            assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
        else:
            content = asyncio.run(with_async_openai(url, talk, common))
        talk.append({"role": "assistant", "content": content})
    parsed = client.chat.completions.parse(
        messages=[user("Hello")], response_format=Person, model=MODEL, temperature=0, max_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    stopped = client.chat.completions.create(messages=[user("Hello")], stop=STOP, **common).choices[0]
    try:
        client.chat.completions.create(messages=[user("word " * 2000)], **common)
        raise AssertionError("it was taken")
    except openai.BadRequestError as error:
        fault = error.code
    begun = client.chat.completions.create(
        messages=talk[:1], model=MODEL, temperature=0, max_tokens=500, logit_bias=BIAS, stream=True
    )
    next(iter(begun))
    begun.close()
    return {
        "turns": [turn["content"] for turn in talk[1::2]], "schema": parsed.choices[0].message.content,
        "stopped": [stopped.message.content, stopped.finish_reason], "fault": fault,
    }  # fmt: skip


async def with_async_openai(url: str, talk: list[Any], common: dict[str, Any]) -> str:
    import openai

    text = ""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        async for part in await client.chat.completions.create(messages=talk, stream=True, **common):
            text += part.choices[0].delta.content or ""
    return text


def with_litellm(url: str) -> dict[str, Any]:
    import litellm

    common: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": url, "api_key": "none", "temperature": 0,
                              "max_tokens": 12, "logit_bias": BIAS}  # fmt: skip
    talk: list[Any] = []
    for i, text in enumerate(ASKED):
        talk.append(user(text))
        if i == 1:
            parts = litellm.completion(messages=talk, stream=True, **common)
            content = "".join(part.choices[0].delta.content or "" for part in parts)
        else:
            content = litellm.completion(messages=talk, **common).choices[0].message.content
        talk.append({"role": "assistant", "content": content})
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    plain = common | {"max_tokens": 60, "logit_bias": None}
    schema = litellm.completion(messages=[user("Hello")], response_format=form, **plain).choices[0].message.content
    stopped = litellm.completion(messages=[user("Hello")], stop=STOP, **common).choices[0]
    try:
        litellm.completion(messages=[user("word " * 2000)], **common)
        raise AssertionError("it was taken")
    except litellm.BadRequestError as error:
        fault = "context_length_exceeded" if isinstance(error, litellm.ContextWindowExceededError) else str(error)
    begun = litellm.completion(messages=talk[:1], stream=True, **(common | {"max_tokens": 500}))
    next(iter(begun))
    begun.completion_stream.close()
    return {
        "turns": [turn["content"] for turn in talk[1::2]], "schema": schema,
        "stopped": [stopped.message.content, stopped.finish_reason], "fault": fault,
    }  # fmt: skip


def with_langchain(url: str) -> dict[str, Any]:
    import openai
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
    from langchain_openai import ChatOpenAI

    def model(tokens: int = 12, **more: Any) -> ChatOpenAI:
        return ChatOpenAI(model=MODEL, base_url=url, api_key="none", temperature=0, max_tokens=tokens, **more)

    letters = model(logit_bias=BIAS)
    talk: list[BaseMessage] = []
    for i, text in enumerate(ASKED):
        talk.append(HumanMessage(text))
        if i == 1:
            content = "".join(str(part.content) for part in letters.stream(talk))
        else:
            content = str(letters.invoke(talk).content)
        talk.append(AIMessage(content))
    person = {"title": "person", **SCHEMA}
    schema = model(60).with_structured_output(person, method="json_schema").invoke("Hello")
    stopped = letters.bind(stop=STOP).invoke("Hello")
    try:
        letters.invoke("word " * 2000)
        raise AssertionError("it was taken")
    except openai.BadRequestError as error:
        fault = error.code
    begun = model(500, logit_bias=BIAS).stream("Hello")
    next(iter(begun))
    begun.close()
    return {
        "turns": [str(turn.content) for turn in talk[1::2]], "schema": json.dumps(schema),
        "stopped": [stopped.content, stopped.response_metadata["finish_reason"]], "fault": fault,
    }  # fmt: skip


def with_llm(url: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "extra-openai-models.yaml"
        models.write_text(f"- {{model_id: here, model_name: {MODEL}, api_base: '{url}', supports_schema: true}}\n")
        head = [str(Path(sys.executable).with_name("llm"))]
        environment = {"LLM_USER_PATH": folder, "PATH": "/usr/bin:/bin", "HOME": folder}
        options = ["-m", "here", "-o", "temperature", "0"]
        letters = ["-o", "logit_bias", json.dumps(BIAS)]

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*head, *words], env=environment, capture_output=True, text=True)

        turns = []
        for i, text in enumerate(ASKED):
            goes_on = ["-c"] if i else []
            streams = ["--no-stream"] if i == 2 else []
            done = run("prompt", text, *options, *letters, "-o", "max_tokens", "12", *goes_on, *streams)
            assert done.returncode == 0, done.stderr
            turns.append(done.stdout.removesuffix("\n"))
        schema = run("prompt", "Hello", *options, "-o", "max_tokens", "60", "--schema", json.dumps(SCHEMA))
        stop = run("prompt", "Hello", *options, *letters, "-o", "max_tokens", "12", "-o", "stop", STOP[0])
        fault = run("prompt", "word " * 2000, *options)
        assert fault.returncode == 1 and "the context is" in fault.stderr, fault
        long = [*head, "prompt", "Hello", *options, *letters, "-o", "max_tokens", "500"]
        with subprocess.Popen(long, env=environment, stdout=subprocess.PIPE) as begun:
            assert begun.stdout is not None
            begun.stdout.read(1)
            begun.kill()
        return {"turns": turns, "schema": schema.stdout, "stopped": [stop.stdout.removesuffix("\n"), "stop"],
                "fault": "context_length_exceeded"}  # fmt: skip


def with_curl(url: str) -> dict[str, Any]:
    def ask(**body: Any) -> Any:
        content = json.dumps({"temperature": 0, "max_tokens": 12} | body)
        command = ["curl", "-sS", f"{url}/chat/completions", "-H", "content-type: application/json", "-d", "@-"]
        done = subprocess.run(command, input=content, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    talk: list[Any] = []
    for text in ASKED:
        talk.append(user(text))
        talk.append(ask(messages=talk, logit_bias=BIAS)["choices"][0]["message"])
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    schema = ask(messages=[user("Hello")], response_format=form, max_tokens=60)["choices"][0]["message"]["content"]
    stopped = ask(messages=[user("Hello")], stop=STOP, logit_bias=BIAS)["choices"][0]
    fault = ask(messages=[user("word " * 2000)])["error"]["code"]
    long = json.dumps({"messages": talk[:1], "max_tokens": 500, "logit_bias": BIAS, "stream": True})
    with subprocess.Popen(["curl", "-sN", f"{url}/chat/completions", "-d", long], stdout=subprocess.PIPE) as begun:
        assert begun.stdout is not None
        begun.stdout.readline()
        begun.kill()
    return {
        "turns": [turn["content"] for turn in talk[1::2]], "schema": schema,
        "stopped": [stopped["message"]["content"], stopped["finish_reason"]], "fault": fault,
    }  # fmt: skip


EACH = (with_openai, with_litellm, with_langchain, with_llm, with_curl)
CLIENTS = {client.__name__.removeprefix("with_"): client for client in EACH}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
