"""Compiles the functions of a decode step into a folder: run as a process of its own, for its memory and for Ctrl-C.

Reads what to compile from stdin, as JSON: see `Form`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.rows import WORD
from .form import Form, Matrices
from .functions import AttendIn, AttendOut, Experts, Head


def main() -> None:
    """Write a package for each function into the folder that is the only argument."""
    import torch._inductor
    from torch._inductor import config

    folder = Path(sys.argv[1])
    form = Form.from_dict(json.load(sys.stdin))
    config.cpp.dynamic_threads = True  # as many as are set when it runs
    for name, (function, example) in functions(form).items():
        with torch.no_grad():
            exported = torch.export.export(function.eval(), example)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / f"{name}.pt2"))


def functions(form: Form) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Each function with arguments of the right types and shapes; their numbers are never read."""
    config, ffn, dtype = form.config, form.config.ffn_config, getattr(torch, form.dtype)
    d, width = config.d_model, config.head_dim
    norm = torch.empty(d, dtype=dtype)
    x = torch.empty(1, 1, d, dtype=dtype)
    angles = torch.empty(1, 1, 1, width)
    qkv = (config.n_heads + 2 * config.attn_config.kv_n_heads) * width
    found: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "attend_in": (AttendIn(config), (x, angles, angles.clone(), norm, _matrix(form.dense, dtype, qkv, d))),
        "attend_out": (
            AttendOut(config),
            (
                x,
                torch.empty(1, 1, config.n_heads, width, dtype=dtype),
                _matrix(form.dense, dtype, d, d),
                norm,
                torch.empty(ffn.moe_num_experts, d, dtype=dtype),
            ),
        ),
        "head": (Head(), (x, _matrix(form.dense, dtype, config.vocab_size, d))),
    }
    if form.experts is not None:
        hidden = ffn.ffn_hidden_size
        experts = [
            tuple(_matrix(form.experts, dtype, *shape) for shape in ((hidden, d), (hidden, d), (d, hidden)))
            for _ in range(ffn.moe_top_k)
        ]
        found["experts"] = Experts(config), (x, torch.empty(1, d), torch.empty(1, ffn.moe_top_k), experts)
    return found


def _matrix(kind: Matrices, dtype: torch.dtype, outputs: int, inputs: int) -> tuple[Tensor, ...]:
    if kind == "floats":
        return (torch.empty(outputs, inputs, dtype=dtype),)
    if kind == "words":
        return torch.empty(outputs, -(-inputs // WORD)), torch.empty(outputs)
    return torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)


if __name__ == "__main__":
    main()
