"""DBRX's shapes in transformers 4.57.6, with random weights: for `bench_card_network`, in a process of its own.

python tests/transformers_on_card.py JSON: of [what DbrxConfig is made of, tokens of a prompt, new tokens, a device].
"""

import json
import sys
import time

import torch
import transformers

shape, prompt, new, device = json.loads(sys.argv[1])


def settled() -> float:
    """The time when all that was begun is over."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def main() -> None:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.DbrxForCausalLM(transformers.DbrxConfig(**shape)).eval()
    ids, read, steps = torch.randint(shape["vocab_size"], (1, prompt), device=device), 0.0, []
    for _ in range(2):  # the first one warms up
        start = settled()
        out = model(ids, use_cache=True, logits_to_keep=1)
        read = settled() - start
    for _ in range(new):
        start = settled()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(settled() - start)
    found = {"version": transformers.__version__, "prompt_tokens_s": prompt / read, "ms": sorted(steps)[new // 2] * 1e3}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
