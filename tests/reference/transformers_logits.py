"""Print what an installed transformers computes from checkpoint folders, in float32.

    other/bin/python tests/reference/transformers_logits.py < folders.json

The input is a JSON list of pairs, a folder and token ids; the output a list of logits [ids, vocab], in its last line.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = []
    for folder, ids in json.load(sys.stdin):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found.append(network(torch.tensor([ids])).logits[0].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
