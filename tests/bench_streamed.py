"""Measures streamed experts with memory held down, cold: speed, bytes read, memory; and peers on the same weights.

    python -m tests.bench_streamed dbrx FOLDER --limit 900MiB --cache 100MiB
    python -m tests.bench_streamed accelerate FOLDER --limit 1500MiB --tokens 3
    python -m tests.bench_streamed llama.cpp FILE.gguf --limit 900MiB
    python -m tests.bench_streamed disk FOLDER

Each runs in a process of its own in a memory control group (version 1, as root), which bounds its memory and the page
cache together; the files' pages are dropped first. Prints a JSON object. The figures are in docs/streaming.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.machine import parse_size

GROUPS = Path("/sys/fs/cgroup/memory")
PEERS = os.environ.get("DBRX_PEERS", "")  # a folder with llama_cpp.mjs and node-llama-cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dbrx", "accelerate", "llama.cpp", "disk"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--limit", default="900MiB", help="memory of the process, page cache included")
    parser.add_argument("--cache", default=None, help="--expert-cache of dbrx")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "disk":
        print(json.dumps(disk(args.path)))
    elif args.inside:
        print(json.dumps(dbrx(args) if args.what == "dbrx" else with_accelerate(args)))
    else:
        drop(args.path)
        print(json.dumps(limited(args)))


def limited(args: argparse.Namespace) -> dict[str, Any]:
    """Run the measurement in a group of its own; its figures, and the most memory that the group had."""
    command = [sys.executable, "-m", "tests.bench_streamed", *sys.argv[1:], "--inside"]
    if args.what == "llama.cpp":
        command = ["node", f"{PEERS}/llama_cpp.mjs", str(args.path.resolve()), str(args.prompt), str(args.tokens)]
    with group(parse_size(args.limit, "--limit")) as folder:
        before = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", *command],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            cwd=PEERS if args.what == "llama.cpp" else None,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        figures = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        figures["wall_s"] = time.perf_counter() - before
        figures["limit"] = args.limit
        figures["group_peak_bytes"] = int((folder / "memory.max_usage_in_bytes").read_text())
    return {"what": args.what, "model": args.path.name, **figures}


@contextmanager
def group(limit: int) -> Iterator[Path]:
    """A memory control group with a limit."""
    folder = GROUPS / f"dbrx-bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield folder
    finally:
        for _ in range(50):  # the last process may still be leaving
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def drop(path: Path) -> None:
    """Have the system forget the files' pages; refuses to go on if some other process keeps them."""
    held = 0
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        held += cached(fd)
        os.close(fd)
    if held > 50 * 2**20:
        raise SystemExit(f"{held / 1e9:.2f} GB of {path} stay in the page cache: another process maps them")


def cached(fd: int) -> int:
    """Bytes of a file that are in the page cache."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), seen)
        del start
    return sum(page & 1 for page in seen) * mmap.PAGESIZE


def disk(path: Path) -> dict[str, Any]:
    """Bytes a second of the files as the program's own reader gets them: four threads, directly, in pieces."""
    from model.streaming.reader import DiskSource
    from model.streaming.slots import CpuSlot
    from model.streaming.source import Ticket, slot_size
    from model.weights import Extent

    drop(path)
    source, rates = DiskSource(path if path.is_dir() else path.parent), []
    for file in files_of(path)[:6]:
        extents = (Extent(file, 4096, min(file.stat().st_size - 4096, 2**28)),)
        ticket = Ticket(CpuSlot(slot_size([extents])))
        ticket.slot.tensor.fill_(1)  # its pages are there, as they are after the first use
        start = time.perf_counter()
        source.start(ticket, extents)
        source.wait(ticket)
        rates.append(extents[0].nbytes / (time.perf_counter() - start))
    source.close()
    return {"what": "disk", "gb_s": round(statistics.median(rates) / 1e9, 2), "all": [round(r / 1e9, 2) for r in rates]}


def dbrx(args: argparse.Namespace) -> dict[str, Any]:
    """This program, experts on disk."""
    import torch

    torch.set_num_threads(args.threads)
    imported = status("VmRSS")
    from model.causal_lm import DbrxForCausalLM

    start = time.perf_counter()
    network = DbrxForCausalLM.from_pretrained(
        args.path, offload="disk", expert_cache=args.cache and parse_size(args.cache, "--cache"), dtype=args.dtype
    )
    load = time.perf_counter() - start
    store = network.expert_store
    assert store is not None
    figures = run(network, args)
    counters = store.counters
    return {
        "rss_after_import_bytes": imported,
        "rss_peak_bytes": status("VmHWM"),
        "load_s": load,
        "places": store.capacity,
        **figures,
        "counters": vars(counters),
    }


def with_accelerate(args: argparse.Namespace) -> dict[str, Any]:
    """accelerate's disk offload of whole blocks, on this project's network: a second copy of the weights on disk."""
    import torch

    torch.set_num_threads(args.threads)
    from accelerate import dispatch_model, init_empty_weights

    from model.causal_lm import DbrxForCausalLM
    from model.formats import open_weights

    copy = args.path.parent / f"{args.path.name}-offloaded"
    with open_weights(args.path) as weights, init_empty_weights():
        network = DbrxForCausalLM(weights.config).to(torch.bfloat16).eval()
        places: dict[str, Any] = {f"transformer.blocks.{i}": "disk" for i in range(weights.config.n_layers)}
        places |= {"transformer.wte": "cpu", "transformer.norm_f": "cpu", "lm_head": "cpu"}
        if not (copy / "index.json").exists():
            write_copy(copy, weights, list(network.state_dict()))
        state = {n: weights.read(n, owned=True) for n in network.state_dict() if ".blocks." not in n}
    network.load_state_dict(state, assign=True, strict=False)
    network.transformer.set_attention("sdpa")
    dispatch_model(
        network, places, main_device="cpu", offload_dir=copy, offload_buffers=True, preload_module_classes=["DbrxBlock"]
    )
    return {"rss_peak_bytes": status("VmHWM"), **run(network, args)}


def write_copy(folder: Path, weights: Any, names: list[str]) -> None:
    """The files that accelerate reads: as its `offload_state_dict` writes them, a tensor at a time."""
    from accelerate.utils import offload_weight

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        index: dict[str, Any] = {}
        for name in names:
            if ".blocks." in name:
                index = offload_weight(weights.read(name), name, temporary, index=index)
                weights.give_back()
        (Path(temporary) / "index.json").write_text(json.dumps(index))
        shutil.copytree(temporary, folder)


def run(network: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Read a random prompt, then tokens one by one."""
    import torch

    from model.kv_cache import KVCache
    from model.prefill import prefill
    from model.sampling import SamplingParams
    from model.sequence import Sequence
    from tests.decoding import one_by_one

    ids = torch.randint(0, network.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    cache = KVCache(network.config.n_layers)
    start, read = time.perf_counter(), io("read_bytes")
    logits = prefill(network, ids, cache)
    prompt_s, prompt_read = time.perf_counter() - start, io("read_bytes") - read
    store = network.expert_store
    before = store.counters.copy() if store else None
    steps, made, read = [], [], io("read_bytes")
    params = SamplingParams(temperature=0, max_tokens=args.tokens + 1)
    start = time.perf_counter()
    row = Sequence(ids[0].tolist(), params, kv=cache.rows[0], logits=logits[0])
    for token in one_by_one(network, row):
        steps.append(time.perf_counter() - start)
        made.append(token)
        start = time.perf_counter()
    figures: dict[str, Any] = {
        "prompt_s": prompt_s,
        "prompt_read_bytes": prompt_read,
        "decode_tokens_per_s": args.tokens / sum(steps[1:]),
        "seconds_p50": statistics.median(steps[1:]),
        "decode_read_bytes": io("read_bytes") - read,
        "tokens": made,
    }
    if store and before:
        decoding = store.counters.since(before)
        expert = network.config.ffn_config.ffn_hidden_size * network.config.d_model * 3 * 2
        figures |= {
            "decode_counters": vars(decoding),
            "decode_bytes_beyond_misses": figures["decode_read_bytes"] - decoding.misses * expert,
            "allowed_beyond_misses": decoding.misses * 3 * 2 * 4096,
        }
    return figures


def io(key: str) -> int:
    """A figure of /proc/self/io."""
    match = re.search(rf"^{key}: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def status(key: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM at most."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
