"""The machine that a model is planned for: this one, measured, or one that is described in words.

Imports without torch.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError, ModelError
from .placement import Device, Machine

if TYPE_CHECKING:
    from .weights import Extent

GIB, GB = 2**30, 10**9
# Memory in GiB and its bandwidth in GB/s, from the makers' data sheets.
GPUS: Mapping[str, tuple[float, float]] = {
    "T4": (16, 320), "L4": (24, 300), "A10": (24, 600), "A10G": (24, 600), "RTX3090": (24, 936),
    "RTX4090": (24, 1008), "RTX5090": (32, 1792), "V100": (32, 900), "A40": (48, 696), "A6000": (48, 768),
    "L40S": (48, 864), "A100": (80, 2039), "A100-40": (40, 1555), "H100": (80, 3350), "H100-PCIE": (80, 2000),
    "H200": (141, 4800), "B200": (180, 7700),
}  # fmt: skip
# What is assumed where nothing is known; a plan says so.
GPU_BANDWIDTH, LINK, CPU_MEMORY, CPU_BANDWIDTH, DISK_BANDWIDTH = 900 * GB, 25 * GB, 64 * GIB, 50 * GB, 3 * GB
GPU_USABLE, CPU_USABLE = 0.94, 0.9  # the driver's context; the system and this program
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
PROBE = 256 * 2**20  # bytes that a measurement reads
LONGEST = 16 * 2**20  # of an expert's matrix


def parse_size(text: str, flag: str) -> int:
    """Bytes from 8GiB, 24GB, 1.5T or a plain number; `InputError` names the flag that gave something else."""
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match:
        raise InputError(f"{flag}: {text.strip()!r} is not a size", "write it like 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2]])


def parse_devices(text: str) -> Machine:
    """A machine such as "4xH100", "2x80GiB@2000GB/s,cpu=256GiB" or "cpu=64GiB@80GB/s,disk=7GB/s".

    What is not said is assumed. `InputError` names the part that cannot be read.
    """
    gpus: list[Device] = []
    cpu = Device("cpu", int(CPU_MEMORY * CPU_USABLE), CPU_BANDWIDTH)
    disk = Device("disk", 0, DISK_BANDWIDTH)
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if equals and name == "cpu":
            memory, _, rate = value.partition("@")
            size = int(parse_size(memory, "--devices") * CPU_USABLE)
            cpu = Device("cpu", size, _rate(rate) if rate else CPU_BANDWIDTH)
        elif equals and name == "disk":
            disk = replace(disk, bandwidth=_rate(value))
        elif equals or not name:
            raise InputError(
                f"--devices: {part.strip()!r} is not a device", "write 4xH100, 24GiB, cpu=64GiB or disk=3GB/s"
            )
        else:
            gpus += _gpus(name, len(gpus))
    return Machine(tuple(gpus), cpu, disk)


def _gpus(text: str, first: int) -> list[Device]:
    match = re.fullmatch(r"(?:(\d{1,4})\s*x\s*)?([^@]+)(?:@(.+))?", text)
    if not match or match[1] == "0":
        raise InputError(f"--devices: {text!r} is not a GPU", "write 4xH100 or 2x24GiB@900GB/s")
    key = match[2].strip().upper().replace(" ", "")
    if key in GPUS:
        memory, rate = GPUS[key]
        size, bandwidth = memory * GIB, rate * GB
    elif re.fullmatch(r"[\d.]+[KMGT]?I?B?", key):
        size, bandwidth = parse_size(key, "--devices"), GPU_BANDWIDTH
    else:
        raise InputError(f"--devices: {match[2]!r} is not a known GPU", f"give its memory, or one of {', '.join(GPUS)}")
    bandwidth = _rate(match[3]) if match[3] else bandwidth
    count = int(match[1] or 1)
    return [Device(f"cuda:{first + i}", int(size * GPU_USABLE), bandwidth, LINK) for i in range(count)]


def _rate(text: str) -> float:
    rate = parse_size(text.strip().removesuffix("/s"), "--devices")
    if not rate:
        raise InputError(f"--devices: {text!r} is no bandwidth", "write it like 900GB/s")
    return float(rate)


def this_machine(experts: Sequence[Sequence[Extent]] = ()) -> Machine:
    """This machine, measured in about a second; the disk where there are `experts` to read, as they lie in files."""
    from .kernels import card_facts, kernel_facts

    disk = disk_bandwidth(experts) if experts else None
    return Machine(
        tuple(_nvidia()),
        Device("cpu", int(available_memory() * CPU_USABLE), memory_bandwidth()),
        Device("disk", 0, disk or DISK_BANDWIDTH),
        kernel_facts,
        card_facts,
    )


def free_memory(gpus: bool) -> Machine:
    """This machine as loading finds it: what is free now, and the kernels that are right here. Nothing is measured."""
    from .kernels import card_facts, kernel_facts

    cpu = Device("cpu", int(available_memory() * CPU_USABLE), 0)
    return Machine(tuple(_torch_gpus()) if gpus else (), cpu, Device("disk", 0, 0), kernel_facts, card_facts)


def _torch_gpus() -> Iterator[Device]:
    import torch

    for i in range(torch.cuda.device_count()):
        yield Device(f"cuda:{i}", int(torch.cuda.mem_get_info(i)[0] * GPU_USABLE), 0)


def limited(machine: Machine, limits: Mapping[int | str, int | str]) -> Machine:
    """The same machine with --max-memory: device number or "cpu" -> the most that it may take; others as they are."""
    most = {str(name): parse_size(str(amount), "--max-memory") for name, amount in limits.items()}
    numbers = {gpu.name: gpu.name.removeprefix("cuda:") for gpu in machine.gpus}
    gpus = tuple(replace(gpu, memory=min(gpu.memory, most.get(numbers[gpu.name], gpu.memory))) for gpu in machine.gpus)
    cpu = replace(machine.cpu, memory=min(machine.cpu.memory, most.get("cpu", machine.cpu.memory)))
    return replace(machine, gpus=gpus, cpu=cpu)


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, within the limits of its control groups."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit, usage, cache in _control_groups():
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there, or "max"
            continue
        free = min(free, max(0, most - used + int(stat.get(cache, 0))))  # cached files give way
    return free


def _control_groups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's memory control groups and of those around them, with the names of their files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        inner = top / path.lstrip("/")
        yield from ((folder, *files) for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def memory_bandwidth(threads: int | None = None) -> float:
    """Bytes a second at which all cores together read memory."""
    import numpy

    workers = threads or len(os.sched_getaffinity(0))
    parts = [numpy.ones(PROBE // 4 // workers, dtype=numpy.float32) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        best = min(_timed(lambda: list(pool.map(numpy.max, parts))) for _ in range(4))
    return sum(part.nbytes for part in parts) / best


def disk_bandwidth(experts: Sequence[Sequence[Extent]]) -> float | None:
    """Bytes a second at which some of a checkpoint's experts are streamed, past the page cache.

    None where that cannot be done, or the experts are too small to tell.
    """
    from .streaming import DiskSource
    from .streaming.slots import CpuSlot
    from .streaming.source import Ticket, slot_size

    # Others each time, as far as there are: a disk remembers what it read.
    chosen = [[replace(extent, nbytes=min(extent.nbytes, LONGEST)) for extent in some] for some in experts]
    random.shuffle(chosen)
    sizes = list(accumulate(sum(extent.nbytes for extent in some) for some in chosen))
    chosen = chosen[: bisect(sizes, 2 * PROBE) + 1]
    nbytes = sum(extent.nbytes for some in chosen for extent in some)
    if nbytes < PROBE // 8:
        return None
    source = DiskSource(chosen[0][0].file.parent)
    try:
        os.close(os.open(chosen[0][0].file, os.O_RDONLY | os.O_DIRECT))
        slots = [CpuSlot(slot_size(chosen)) for _ in range(4)]
        for slot in slots:
            slot.tensor.fill_(1)  # its pages are there, as they are after the first use

        def read() -> None:
            tickets = [Ticket(slot) for slot, _ in zip(cycle(slots), chosen)]  # nobody wants the bytes
            for ticket, some in zip(tickets, chosen, strict=True):
                source.start(ticket, some)
            for ticket in tickets:
                source.wait(ticket)

        return nbytes / _timed(read)
    except (OSError, AttributeError, ModelError):  # no direct reading, here or on this system
        return None
    finally:
        source.close()


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _nvidia() -> Iterator[Device]:
    """The NVIDIA GPUs, as the driver's own tool lists them; none without it."""
    if shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    for i, line in enumerate(listed.stdout.splitlines() if listed.returncode == 0 else ()):
        name, _, free = line.rpartition(",")
        known = next((key for key in sorted(GPUS, key=len, reverse=True) if key in name.upper().replace(" ", "")), None)
        bandwidth = GPUS[known][1] * GB if known else GPU_BANDWIDTH
        yield Device(f"cuda:{i}", int(float(free) * 2**20 * GPU_USABLE), bandwidth, LINK)
