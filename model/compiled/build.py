"""Compiles the functions of a decode step into a folder: run as a process of its own, for its memory and for Ctrl-C.

Reads what to compile from stdin, as JSON: see `Form`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import nn
from torch.export import Dim

from ..quantization.nibbles import LANES, short_loops
from .form import Form
from .functions import Attend, Expert, Experts, Head, Linear
from .many import Blocks, Floats, Many, Tiles, many
from .products import product
from .tiles import LOOPS, OUTPUTS, ROWS

TOKENS = 512  # that are cached, for an example


class Example(NamedTuple):
    """A function, arguments of the right types and shapes, whose numbers are never read, and which sizes vary."""

    function: nn.Module
    arguments: tuple[Any, ...]
    sizes: tuple[Any, ...] | None = None


def main() -> None:
    """Write a library for each function into the folder that is the only argument."""
    import torch._inductor
    from torch._inductor import config, cpp_builder

    folder = Path(sys.argv[1])
    form = Form.from_dict(json.load(sys.stdin))
    config.cpp.dynamic_threads = True  # as many as are set when it runs
    config.cpp.enable_floating_point_contract_flag = "fast"  # multiply and add at once
    config.aot_inductor.precompile_headers = False  # 150 MB each, in a folder that is not ours, and no faster
    found = functions(form)
    if short_loops() and cpp_builder.is_gcc():  # to others PyTorch does not forbid it
        config.cpp.march = LOOPS  # the others are as fast with it
    if form.experts == "nibbles":  # groups come by eights: the half of a wider vector is left to a slow loop
        config.cpp.simdlen = 8 * torch.float32.itemsize * LANES
    config.assert_indirect_indexing = False  # ids of experts are the router's; a loop that asks is no vector's
    if form.experts == "blocks":
        _let_onednn_weights_vary()
    for name, (function, example, sizes) in found.items():
        with torch.no_grad():
            exported = torch.export.export(function.eval(), example, dynamic_shapes=sizes)
        with TemporaryDirectory() as scratch:
            package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{scratch}/{name}.pt2")
            with ZipFile(package) as archive:
                (library,) = (member for member in archive.namelist() if member.endswith(".so"))
                (folder / f"{name}.so").write_bytes(archive.read(library))


def functions(form: Form) -> dict[str, Example]:
    """All of a form, by name."""
    config, ffn, dtype = form.config, form.config.ffn_config, getattr(torch, form.dtype)
    d, width, kv_heads = config.d_model, config.head_dim, config.attn_config.kv_n_heads
    x, rows = torch.empty(1, 1, d, dtype=dtype), torch.empty(2 * ROWS, d, dtype=dtype)
    found: dict[str, Example] = {}
    # No tensor serves as two arguments: they would be taken for one.
    if form.dense is not None:
        dense = product(form.dense, form.group)
        cos, sin = torch.empty(2, 1, 1, 1, width).unbind()
        keys, values = (torch.empty(1, kv_heads, 2 * TOKENS, width, dtype=dtype) for _ in range(2))
        norm_1, norm_2 = (torch.empty(d, dtype=dtype) for _ in range(2))
        router = torch.empty(ffn.moe_num_experts, d, dtype=dtype)
        Wqkv = dense.example((config.n_heads + 2 * kv_heads) * width, d, dtype)
        out_proj = dense.example(d, d, dtype)
        capacity, tokens = ({axis: Dim(name, max=2**31)} for name, axis in (("capacity", 2), ("tokens", 0)))
        fixed = (None,) * len(Wqkv)
        found["attend"] = Example(
            Attend(config, dense),
            (x, cos, sin, keys, values, torch.arange(TOKENS), norm_1, Wqkv, out_proj, norm_2, router),
            (None, None, None, capacity, capacity, tokens, None, fixed, fixed, None, None),
        )
        found["head"] = Example(Head(dense), (x, dense.example(config.vocab_size, d, dtype)))
        way = many(form.dense, dense, dtype)
        if way is not None and not isinstance(way, Floats):  # there is nothing around that product
            example = dense.example(2 * OUTPUTS, d, dtype)
            outputs = ({0: OUTPUTS * Dim("pairs", max=2**30)},) * len(example)
            found["linear"] = Example(Linear(way), (rows, example), (_varying(way), outputs))
    if form.experts is not None:
        sparse = product(form.experts, form.group)
        shapes = (ffn.ffn_hidden_size, d), (ffn.ffn_hidden_size, d), (d, ffn.ffn_hidden_size)
        one = [sparse.example(*shape, dtype) for shape in shapes]
        experts = [tuple(part.new_empty(ffn.moe_num_experts, *part.shape) for part in matrix) for matrix in one]
        weights, chosen = torch.empty(1, ffn.moe_top_k), torch.zeros(1, ffn.moe_top_k, dtype=torch.long)
        found["experts"] = Example(Experts(config, sparse), (x, torch.empty(1, d), weights, chosen, *experts))
        way = many(form.experts, sparse, dtype)
        if way is not None and not (isinstance(way, Tiles) and ffn.ffn_hidden_size % OUTPUTS):
            k, n = ffn.moe_top_k, Dim("n", max=2**27)
            weights, out = torch.empty(k * len(rows), dtype=dtype), torch.empty(k * len(rows), d, dtype=dtype)
            if isinstance(way, Blocks):
                one = [(torch.empty(shape, dtype=dtype),) for shape in shapes]
            sizes = {0: n}, {0: k * n}, _varying(way), {0: k * n}, *((None,) * len(m) for m in one)
            found["expert"] = Example(Expert(config, way), (rows, weights, torch.arange(2 * ROWS), out, *one), sizes)
    return found


def _let_onednn_weights_vary() -> None:
    """Of products with weights in oneDNN's order, PyTorch's compiler asks for constants of the function; not here."""
    import torch._inductor.mkldnn_lowerings
    from torch._inductor import ir, lowering, mkldnn_ir

    def product(*arguments: Any) -> Any:
        return ir.TensorBox.create(mkldnn_ir.LinearUnary.create(*arguments))  # type: ignore[no-untyped-call]

    lowering.lowerings[torch.ops.mkldnn._linear_pointwise.default] = product


def _varying(way: Many) -> dict[int, Any]:
    """How many rows there can be, or places of rows."""
    return {0: ROWS * Dim("tiles", max=2**27) if isinstance(way, Tiles) else Dim("rows", max=2**29)}


if __name__ == "__main__":
    main()
