"""Run by vLLM's interpreter (tests/test_vllm.py): greedy ids of several checkpoints, one engine after the other.

stdin: [{"folder", "prompts": [[id, ...], ...], "options": of vllm.LLM}]; stdout: a line of JSON for each.
"""

import json
import sys
import time


def ids_of(folder: str, prompts: list[list[int]], options: dict[str, object]) -> list[list[int]]:
    from vllm import LLM, SamplingParams  # type: ignore[attr-defined, unused-ignore]

    options = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True} | options
    model = LLM(folder, skip_tokenizer_init=True, **options)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    replies = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    model.llm_engine.engine_core.shutdown()
    return [list(reply.outputs[0].token_ids) for reply in replies]


if __name__ == "__main__":  # vLLM's processes import this file
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM prints
    for run in json.load(sys.stdin):
        start = time.perf_counter()
        try:
            told: dict[str, object] = {"ids": ids_of(**run)}
        except Exception as error:
            told = {"fault": f"{type(error).__name__}: {error}"}
        print(json.dumps(told | {"seconds": round(time.perf_counter() - start)}), file=out, flush=True)
