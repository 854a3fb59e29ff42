"""Compiles kernels for cards that are not here, and reads from the machine code what it will do there.

`python -m tests.cuda_offline` prints the table of docs/notebook/2026-11-30-cuda-offline.md. Triton's wheel has tools.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.kernels.cuda_attention import SPLITS, TILE, append_kernel, attend_kernel, merge_kernel
from model.kernels.cuda_glu import DOWN, down_kernel, gate_up_kernel
from model.kernels.cuda_linear import Tile, dequantize_kernel, gemv_kernel, tile
from model.kernels.cuda_norm import AT_ONCE, norm_kernel, router_kernel

TOOLS = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
D_MODEL, HIDDEN, TOP_K = 6144, 10752, 4
FORMATS = {"int4 g32": (4, 32), "int4 g128": (4, 128), "int8": (8, 0), "bfloat16": (16, 0)}
LATENCY = 700e-9  # s from a load to its data, of a card that is busy; measured ones are 500 to 800 ns
# Per clock and multiprocessor 128 instructions are issued, of which 64 of these: integers, and conversions of integers
# of 32 bits; all other conversions are 16.
INTEGERS = ("LOP3", "SHF", "IADD3", "I2FP", "PRMT", "SEL", "ISETP", "LEA", "SGXT", "VIADD", "IMNMX", "PLOP3")


class Card(NamedTuple):
    """Of the makers' data sheets: multiprocessors, clock, bandwidth; bytes and warps of a multiprocessor."""

    name: str
    count: int
    clock: float
    bandwidth: float
    shared: int
    warps: int


CARDS = {
    80: Card("A100", 108, 1.41e9, 2039e9, 164 * 1024, 64),
    89: Card("RTX 4090", 128, 2.52e9, 1008e9, 100 * 1024, 48),
    90: Card("H200", 132, 1.83e9, 4800e9, 228 * 1024, 64),
    100: Card("B200", 148, 1.85e9, 7700e9, 228 * 1024, 64),
    120: Card("RTX 5090", 170, 2.41e9, 1792e9, 100 * 1024, 48),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of card."""

    kernel: str
    form: str
    arch: int
    num_warps: int
    programs: int  # with DBRX's shapes
    registers: int
    spilled: int
    shared: int
    wide: int  # loads of 128 bits in its loop
    narrow: int  # others
    barriers: int  # in its loop
    instructions: float  # of its loop a weight
    clocks: float  # that these take of a multiprocessor

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor has at the same time."""
        card, threads = CARDS[self.arch], 32 * self.num_warps
        most = min(65536 // (-(-self.registers // 8) * 8 * threads), card.warps // self.num_warps, 32)
        return min(most, card.shared // (self.shared + 1024), -(-self.programs // card.count))

    @property
    def in_flight(self) -> int:
        """Bytes of weights that a multiprocessor has asked for at the same time."""
        return self.resident * 32 * self.num_warps * self.wide * 16

    @property
    def fraction(self) -> float:
        """Of the bandwidth: bytes in flight against what the latency wants, and instructions against what is issued."""
        card, (bits, group) = CARDS[self.arch], FORMATS[self.form]
        by_loads = self.in_flight * card.count / (card.bandwidth * LATENCY)
        nbytes = bits / 8 + (4 / group if group else 0)
        weights = card.bandwidth / nbytes / card.count / card.clock  # a clock and multiprocessor
        return min(0.92, by_loads, 1 / (weights * self.clocks))


def kernels() -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], Tile, int]]:
    """Name, format, function, types of its arguments, constants, tile and programs, in DBRX's shapes."""
    for form, (bits, group) in FORMATS.items():
        outer, inner = (-(-width * bits // 128) for width in (D_MODEL, HIDDEN))
        same = {"BITS": bits, "GROUP": group}
        made = tile(1, bits)
        words = {"table": "*i64"}
        glu = {"TOP_K": TOP_K, **same}
        types = {"x": "*fp32", "expert_ids": "*i32", **words, "inner": "*fp32", "hidden": "i32"}
        constants = {"ACTIVATION": "silu", "CHUNKS": outer, "INNER_CHUNKS": inner, **glu}
        yield "gate_up", form, gate_up_kernel, types, constants, made, TOP_K * HIDDEN * 2 // made.N
        types = {"inner": "*fp32", "expert_ids": "*i32", "router_weights": "*fp32", **words}
        types |= {"residual": "*fp32", "out": "*fp32", "d_model": "i32"}
        constants = {"CHUNKS": inner, **glu}
        yield "down", form, down_kernel, types, constants, DOWN, D_MODEL // DOWN.N
        if form in ("int4 g32", "int4 g128"):
            continue  # attention and head are int8 beside them
        for tokens in (1, 8):
            made = tile(tokens, bits)
            types = {"x": "*fp32", "values": "*i32", "ranges": "*fp32", "out": "*fp32"}
            types |= {"tokens": "i32", "outputs": "i32"}
            constants = {"T": tokens, "CHUNKS": outer, **same}
            yield f"Wqkv, {tokens} tokens", form, gemv_kernel, types, constants, made, 8192 // made.N


def compile_all(arch: int, only: Collection[tuple[str, str]] | None = None) -> Iterator[Compiled]:
    """Every product for one kind of card, or `only` some kernels in some forms."""
    for name, form, function, types, constants, (N, C, warps, maxnreg), programs in kernels():
        if only is not None and (name, form) not in only:
            continue
        made = _compile(arch, function, types, {**constants, "N": N, "C": C}, num_warps=warps, maxnreg=maxnreg)
        usage, code = _usage(made), _tool("nvdisasm", made, "-c", "-ndf")
        weights = N * C * 128 // constants["BITS"] // (32 * warps)
        loop = _loop(code)
        yield Compiled(
            name,
            form,
            arch,
            warps,
            programs,
            usage["REG"],
            usage["STACK"] + usage["LOCAL"],
            usage["SHARED"],
            wide=sum(op == "LDG.E.128" or op.startswith("LDG.E.128.") for op in loop),
            narrow=sum(op.startswith("LDG") and ".128" not in op for op in loop),
            barriers=sum(op.startswith("BAR") for op in loop),
            instructions=len(loop) / weights,
            clocks=_clocks([op.split(".")[0] for op in loop]) / weights,
        )


def others() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """The same, without format and programs, of what lies between the products, where attention and head are int8."""
    f32, outer, inner = "*fp32", D_MODEL // 16, D_MODEL // 32
    places = {"W": triton.next_power_of_2(D_MODEL), "CHUNKS": outer, "BITS": 8}
    types = {"x": f32, "weight": "*bf16", "out": f32, "width": "i32", "eps": "fp32"}
    yield "norm", norm_kernel, types, places, 8
    types = dict.fromkeys(("x", "y", "residual", "normed", "probabilities", "router_weights"), f32)
    types |= {"weight": "*bf16", "router": "*bf16", "expert_ids": "*i32", "width": "i32", "n_experts": "i32"}
    types |= {"eps": "fp32", "order": "fp32"}
    constants = {"TOP_K": TOP_K, "NORMALIZE": True, "E": 16, "K": TOP_K, "AT_ONCE": AT_ONCE}
    yield "router", router_kernel, types, {**places, **constants, "CHUNKS": inner, "BITS": 4}, 8
    row = {**dict.fromkeys(("qkv", "cos", "sin"), f32), "positions": "*i32", "table": "*i64", "clip": "fp32"}
    row["head_dim"] = "i32"
    lies = {"HEADS": 48, "KV_HEADS": 8, "D": 128, "BLOCKS": 128, "TOKENS": 256, "KV": tl.bfloat16}
    yield "append", append_kernel, row, lies, 1
    types = {**row, **dict.fromkeys(("sums", "tops", "totals"), f32), "scale": "fp32"}
    yield "attend", attend_kernel, types, {**lies, "GROUP": 16, "SPLITS": SPLITS, "TILE": TILE}, 4
    types = {**dict.fromkeys(("sums", "tops", "totals", "out"), f32), "head_dim": "i32"}
    constants = {"HEADS": 48, "D": 128, "SPLITS": SPLITS, "CHUNKS": outer, "BITS": 8}
    yield "merge", merge_kernel, types, constants, 2
    types = {"values": "*i32", "ranges": "*i32", "out": "*bf16", "outputs": "i32", "inputs": "i32"}
    yield "dequantize", dequantize_kernel, types, {"N": 16, "C": 64, "CHUNKS": inner, "BITS": 4, "GROUP": 32}, 4


def compile_others(arch: int) -> Iterator[tuple[str, dict[str, int], int]]:
    """Name, what it uses, and loads of 128 bits."""
    for name, function, types, constants, warps in others():
        made = _compile(arch, function, types, constants, num_warps=warps)
        yield name, _usage(made), len(re.findall(r"ld\.global[\w.]*\.v4\.b32", made.asm["ptx"]))


def _compile(arch: int, function: Any, types: dict[str, str], constants: dict[str, Any], **options: int | None) -> Any:
    names = function.arg_names
    # Pointers are multiples of 16, as PyTorch's are; numbers that are 128 or 6144 here, too.
    whole = [n for n, t in types.items() if t[0] == "*" or n in ("head_dim", "width")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    signature = {n: types.get(n, "constexpr") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _usage(made: Any) -> dict[str, int]:
    """Registers of a thread, its bytes beside them, and shared memory with what a kernel asks for at its launch."""
    used = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _tool("cuobjdump", made, "-res-usage"))
    usage = {name: int(count) for name, count in used}
    return usage | {"SHARED": usage["SHARED"] + made.metadata.shared}


def _tool(name: str, made: Any, *options: str) -> str:
    """What a tool of the wheel says of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [os.path.join(TOOLS, name), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _clocks(operations: list[str]) -> float:
    """That a thread's instructions take, when all pipes are busy: of issue, integers and conversions the longest."""
    integers, conversions = sum(op in INTEGERS for op in operations), sum(op == "I2F" for op in operations)
    return max(len(operations) / 128, integers / 64, conversions / 16)


def _loop(code: str) -> list[str]:
    """Instructions of the innermost loop that loads weights: from a label to the branch that leads back to it."""
    lines, labels, loops = code.splitlines(), {}, []
    for i, line in enumerate(lines):
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = i
        elif (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and found[1] in labels:
            loops.append(lines[labels[found[1]] : i])
    loop = min((loop for loop in loops if any("LDG.E.128" in line for line in loop)), key=len)
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)"
    return [found[1] for line in loop if (found := re.search(pattern, line))]


def main() -> None:
    columns = "card", "kernel", "weights", "registers", "128-bit loads", "KB in flight", "instructions a weight"
    print("| " + " | ".join((*columns, "of the bandwidth")) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for arch, card in CARDS.items():
        for made in compile_all(arch):
            cells = f"{card.name} (sm_{arch})", made.kernel, made.form, made.registers, made.wide
            loop = f"{made.in_flight / 1024:.0f}", f"{made.instructions:.1f}", f"{made.fraction:.0%}"
            print("| " + " | ".join(map(str, (*cells, *loop))) + " |", flush=True)
    print("\n| card | kernel | registers | spilled | shared memory | 128-bit loads |\n|---|---|---|---|---|---|")
    for arch, card in CARDS.items():
        for name, usage, wide in compile_others(arch):
            spilled = usage["STACK"] + usage["LOCAL"]
            print(f"| {card.name} (sm_{arch}) | {name} | {usage['REG']} | {spilled} | {usage['SHARED']} | {wide} |")


if __name__ == "__main__":
    main()
