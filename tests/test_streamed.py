"""Experts from disk: the numbers of experts in memory, a fixed number of them held, clear ends to what goes wrong."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.causal_lm import DbrxForCausalLM
from model.errors import ModelError, ResourceError
from model.experts.streamed import open_store
from model.formats import open_weights
from model.kernels import FloatGlu, kernel_facts
from model.kv_cache import KVCache
from model.load_plan import LoadOptions, Stored
from model.load_planner import plan_load
from model.placement import FORMATS, Device, Machine, capacity, sizes
from model.prefill import prefill
from model.sampling import SamplingParams
from model.streaming import HostSource
from model.streaming.reader import DiskSource
from model.streaming.slots import BLOCK, CpuSlot
from model.streaming.source import Ticket, data_in, layout, slot_size
from model.weights import Extent
from tests.cli import ROOT, Cli
from tests.conftest import TINY
from tests.decoding import reply
from tests.weights import make_checkpoint

EXPERT = 3 * 48 * 40 * 2  # bytes of one of TINY's experts in bfloat16
SLOT = 6 * BLOCK  # two blocks for each of its matrices, of one block less a bit
LAYERS, EXPERTS = 3, 16
PROMPT = list(range(100, 130))
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY with a small vocabulary, which loads in no time."""
    folder = tmp_path_factory.mktemp("streamed") / "tiny"
    return make_checkpoint(folder, TINY | {"vocab_size": 500}, seed=7, dtype="bfloat16", shards=3)


def streamed(folder: Path, places: int = 8, **options: Any) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(folder, offload="disk", expert_cache=places * SLOT, **options)


def answer(network: DbrxForCausalLM, chunk: int | None = None) -> tuple[Tensor, list[int]]:
    """Logits behind the prompt, and greedy tokens."""
    cache = KVCache(network.config.n_layers)
    network.prefill_chunk = chunk or network.prefill_chunk
    logits = prefill(network, torch.tensor([PROMPT]), cache)
    return logits, reply(network, PROMPT, GREEDY, kv=cache.rows[0], logits=logits[0])


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def in_memory(tiny: Path, request: pytest.FixtureRequest) -> tuple[str, list[tuple[Tensor, list[int]]]]:
    """What a network whose experts lie in memory answers, read at once and in chunks of 7."""
    network = DbrxForCausalLM.from_pretrained(tiny, dtype=request.param)
    return request.param, [answer(network, chunk) for chunk in (None, 7)]


@pytest.mark.parametrize("places", [2, 3, 7, 20, 48])
def test_the_numbers_are_those_of_experts_in_memory(
    tiny: Path, in_memory: tuple[str, list[tuple[Tensor, list[int]]]], places: int
) -> None:
    """To the bit: the same kernel, the same order of the sum."""
    dtype, expected = in_memory
    cast = 3 * 48 * 40 * 4 if dtype == "float32" else 0
    network = DbrxForCausalLM.from_pretrained(tiny, offload="disk", expert_cache=places * SLOT + cast, dtype=dtype)
    assert network.expert_store is not None and network.expert_store.capacity == places
    for chunk, (logits, tokens) in zip((None, 7), expected, strict=True):
        found, found_tokens = answer(network, chunk)
        assert torch.equal(found, logits)
        assert found_tokens == tokens


def test_every_expert_is_read_once_where_all_can_be_held(tiny: Path) -> None:
    network = streamed(tiny, LAYERS * EXPERTS)
    store = network.expert_store
    assert store is not None
    answer(network)
    first = store.counters.copy()
    answer(network)
    assert first.misses <= LAYERS * EXPERTS
    assert store.counters.since(first).misses == store.counters.since(first).bytes_read == 0


def test_bytes_read_are_the_misses(tiny: Path) -> None:
    network = streamed(tiny, 5)
    store = network.expert_store
    assert store is not None
    answer(network)
    assert store.counters.misses > 100
    least = store.counters.misses * EXPERT
    assert least <= store.counters.bytes_read <= least + store.counters.misses * 3 * 2 * BLOCK


def test_a_prompt_reads_each_expert_once_a_chunk(tiny: Path) -> None:
    network = streamed(tiny, 2)
    prefill(network, torch.tensor([PROMPT * 9]), KVCache(LAYERS))  # 540 tokens: more than the usual chunk
    assert network.expert_store is not None
    assert network.expert_store.counters.misses <= LAYERS * EXPERTS


class SlowSource:
    """Fills nothing; notes what it is asked for."""

    bytes_read = 0

    def __init__(self) -> None:
        self.asked: list[Sequence[Extent]] = []
        self.waited: list[Ticket] = []

    def start(self, ticket: Ticket, extents: Sequence[Extent]) -> None:
        self.asked.append(extents)

    def wait(self, ticket: Ticket) -> None:
        self.waited.append(ticket)

    def cancel(self, ticket: Ticket) -> None: ...

    def close(self) -> None: ...


def store_of(places: int, layers: int = 4, source: SlowSource | None = None) -> tuple[Any, SlowSource]:
    from model.streaming import ExpertStore

    source = source or SlowSource()
    extents = [[(Extent(Path(f"{layer}"), expert, 8),) for expert in range(EXPERTS)] for layer in range(layers)]
    slots = [CpuSlot(BLOCK) for _ in range(places)]
    store = ExpertStore(source, extents, slots, lambda *_: (), capacity=places, in_place=True)
    return store, source


def test_what_is_missing_is_asked_for_at_once_and_what_is_here_comes_first() -> None:
    store, source = store_of(8)
    list(store.fetch(0, [3, 5]))
    del source.asked[:], source.waited[:]
    coming = store.fetch(0, [1, 3, 4, 5])
    assert next(coming)[0] == 3 and [extents[0].start for extents in source.asked] == [1, 4]
    assert next(coming)[0] == 5 and not source.waited
    assert [expert for expert, _ in coming] == [1, 4]
    assert len(source.waited) == 2
    assert (store.counters.hits, store.counters.misses) == (2, 4)


def test_reading_ahead_goes_as_far_as_there_is_room() -> None:
    store, source = store_of(2)
    coming = store.fetch(0, list(range(EXPERTS)))
    given = []
    for expert, _ in coming:
        given.append(expert)
        assert len(source.asked) <= len(given) + 1  # this one, and the next
    assert given == list(range(EXPERTS))


def test_a_layer_keeps_its_share_when_others_take_their_turn() -> None:
    """8 places, of which the layer that computes uses 4: the others keep some, although a round asks for 16."""
    store, _ = store_of(8)
    for _ in range(3):
        for layer in range(4):
            list(store.fetch(layer, [0, 1, 2, 3]))
    before = store.counters.copy()
    for layer in range(4):
        list(store.fetch(layer, [0, 1, 2, 3]))
    assert store.counters.since(before).hits >= 4  # evicting by age alone would leave none


def test_chance_alone_hits_as_often_as_there_are_places() -> None:
    rng = torch.Generator().manual_seed(3)
    store, _ = store_of(32)  # half of 64
    for turn in range(400):
        if turn == 100:
            before = store.counters.copy()
        for layer in range(4):
            list(store.fetch(layer, sorted(torch.randperm(EXPERTS, generator=rng)[:4].tolist())))
    seen = store.counters.since(before)
    assert seen.hits / (seen.hits + seen.misses) == pytest.approx(0.5, abs=0.04)


@pytest.fixture
def some_file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(3 * 2**20 + 1234))
    return path


def refuse_direct(fd: int, buffers: Any, offset: int, real: Callable[..., int] = os.preadv) -> int:
    """A file system that takes O_DIRECT when a file is opened, and refuses the reads."""
    import fcntl

    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return real(fd, buffers, offset)


@pytest.mark.parametrize("direct", ["as it is", "not opened", "not read"])
def test_reads_bring_exactly_the_bytes(some_file: Path, monkeypatch: pytest.MonkeyPatch, direct: str) -> None:
    if direct == "not opened":
        monkeypatch.delattr(os, "O_DIRECT")
    if direct == "not read":
        monkeypatch.setattr(os, "preadv", refuse_direct)
    monkeypatch.setattr("model.streaming.reader.PIECE", 64 * 1024)
    size = some_file.stat().st_size
    content = some_file.read_bytes()
    source = DiskSource(some_file.parent)
    cases = [(0, 1), (4096, 4096), (4088, 16), (8, 500_000), (40_001, 70_001), (size - 1234, 1234), (size - 9, 9)]
    for first in cases:
        extents = (Extent(some_file, *first), Extent(some_file, 16, 200_000))
        ticket = Ticket(CpuSlot(slot_size([extents])))
        before = source.bytes_read
        source.start(ticket, extents)
        source.wait(ticket)
        for extent, data in zip(extents, data_in(ticket.slot, extents), strict=True):
            assert bytes(data.numpy()) == content[extent.start : extent.start + extent.nbytes]
            assert data.data_ptr() % 8 == 0
        wanted = sum(extent.nbytes for extent in extents)
        assert wanted <= source.bytes_read - before <= wanted + len(extents) * 2 * BLOCK
    source.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slot_may_have_huge_pages() -> None:
    """Private, and marked for them: a disk fills scattered pages at half the speed."""
    slot = CpuSlot(8 * 2**20)
    start = slot.tensor.data_ptr()
    regions = Path("/proc/self/smaps").read_text().split("VmFlags:")
    ends = [int(found[1], 16) for found in map(re.compile(r"(?m)^[0-9a-f]+-([0-9a-f]+) ").search, regions) if found]
    flags = [after.splitlines()[0].split() for after in regions[1:]]
    mine = next(flag for end, flag in zip(ends, flags, strict=True) if start < end)
    assert "hg" in mine and "sh" not in mine


def test_places_in_a_slot_do_not_overlap() -> None:
    extents = [Extent(Path("x"), start, 5000) for start in (0, 8, 4095, 4096, 12_000)]
    placed, nbytes = layout(extents)
    ends = [at + extent.nbytes for extent, at in placed]
    for (_, at), end in zip(placed[1:], ends, strict=False):
        assert at // BLOCK >= -(-end // BLOCK)
    assert nbytes % BLOCK == 0 and nbytes >= ends[-1]


def test_threads_and_files_go_with_the_network(tiny: Path) -> None:
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "expert reader"]

    def shards() -> int:
        return sum(str(tiny) in os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir())

    gc.collect()
    for thread in readers():  # those of other tests
        thread.join(20)
    network = streamed(tiny)
    answer(network)
    left = readers()
    assert left and shards() == 2 * len(list(tiny.glob("*.safetensors")))
    del network
    gc.collect()
    for thread in left:
        thread.join(20)
    assert not readers() and not shards()


@pytest.mark.slow
def test_a_process_may_end_while_it_reads(tmp_path: Path) -> None:
    """Threads that outlive the interpreter would abort it."""
    script = """
import os, sys; from pathlib import Path
from model.weights import Extent
from model.streaming import DiskSource
from model.streaming.slots import CpuSlot
from model.streaming.source import Ticket
closes = os.fork() == 0
file = Path(sys.argv[1]); source = DiskSource(file.parent)
for _ in range(20):
    source.start(Ticket(CpuSlot(2**24)), (Extent(file, 0, 2**24),))
if closes: source.close()
else:
    import weakref; weakref.finalize(Path, source.close)
    assert os.wait()[1] == 0
"""
    (tmp_path / "bytes").write_bytes(b"x" * 2**24)
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "bytes"], stderr=subprocess.PIPE, cwd=ROOT)
    assert (run.stderr, run.returncode) == (b"", 0)


def test_a_network_that_streams_cannot_be_saved(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streamed"):
        streamed(tiny).save_pretrained(tmp_path / "copy")


# What goes wrong


def test_a_file_that_shrank_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    network = streamed(folder)
    for shard in folder.glob("*.safetensors"):
        os.truncate(shard, 10_000)
    with pytest.raises(ModelError, match=r"model-0000\d-of-00003.safetensors: became shorter") as caught:
        answer(network)
    assert caught.value.exit_code == 3 and "\n" not in caught.value.one_line


def test_a_fault_of_the_disk_is_named_and_passes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = streamed(tiny)
    expected = answer(network)[1]
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "preadv", broken)
        with pytest.raises(ModelError, match="cannot be read: Input/output error") as caught:
            answer(network)
        assert "\n" not in caught.value.one_line
    assert answer(network)[1] == expected


def test_files_that_are_removed_are_still_read(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    network = streamed(folder, 4)
    expected = answer(network)
    shutil.rmtree(folder)
    assert torch.equal(answer(network)[0], expected[0])


@pytest.mark.slow
def test_an_interruption_is_quick_and_leaves_nothing_wrong(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a slow disk is waited for, at many moments; then the same answer as before."""
    gc.collect()  # the networks of other tests: what interrupts the closing of one is not raised
    network = streamed(tiny, 5)
    expected = answer(network)
    real = os.preadv

    def slow(*args: Any) -> int:
        time.sleep(0.05)
        return real(*args)

    for tick in range(1, 8):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", slow)
            moment = time.monotonic() + 0.013 * tick
            timer = threading.Timer(0.013 * tick, lambda: os.kill(os.getpid(), 2))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                answer(network)
            assert time.monotonic() - moment < 0.5
            timer.join()
        logits, tokens = answer(network)
        assert torch.equal(logits, expected[0]) and tokens == expected[1]


# How much is held, and when at all


def test_a_cache_that_is_too_small_or_too_large_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="too small for two experts") as caught:
        streamed(tiny, 1)
    assert caught.value.exit_code == 5 and "1MiB" in caught.value.one_line
    config = open_weights(tiny).config
    parts = sizes(config, FORMATS["bfloat16"])
    beside = parts.total - LAYERS * parts.experts + parts.buffers + LAYERS * parts.kv * capacity(config.max_seq_len)

    def free_for_experts(nbytes: int) -> None:
        """Nine tenths of what is free are taken."""
        monkeypatch.setattr("model.machine.available_memory", lambda: (beside + nbytes) * 10 // 9 + 1)

    free_for_experts(10**6)
    with pytest.raises(ResourceError, match=r"only 0\.0 GB are free beside the rest"):
        streamed(tiny, 1000)
    store = DbrxForCausalLM.from_pretrained(tiny, offload="disk").expert_store
    assert store is not None and store.capacity == 750_000 // SLOT
    free_for_experts(2 * SLOT * 4 // 3 - 10)
    with pytest.raises(ResourceError, match="are not free beside the rest"):
        DbrxForCausalLM.from_pretrained(tiny, offload="disk")


def test_auto_streams_what_does_not_fit(tiny: Path) -> None:
    weights = open_weights(tiny)
    config = weights.config
    parts = sizes(config, FORMATS["bfloat16"])
    beside = parts.buffers + LAYERS * parts.kv * capacity(config.max_seq_len)
    whole, dense = parts.total + beside, parts.total - LAYERS * parts.experts + beside

    def choice(wanted: str, free: float, limit: int | None = None, gpu: bool = False) -> str:
        gpus = (Device("cuda:0", 10**9, 1e12),) if gpu else ()
        machine = Machine(gpus, Device("cpu", int(free), 1e11), Device("disk", 0, 1e9))
        limits: dict[int | str, int | str] | None = {"cpu": str(limit)} if limit else None
        options = LoadOptions(offload=wanted, device_map="auto" if gpu else "cpu", max_memory=limits)
        plan = plan_load(config, Stored.of(weights), machine, options)
        return plan.offload if plan.runs else "nowhere"

    assert choice("auto", whole) == "none"
    assert choice("auto", whole - 1) == "disk"  # even where the weights alone would fit
    assert choice("auto", whole * 9, whole - 1) == "disk"
    assert choice("auto", dense) == choice("disk", dense) == "nowhere"
    assert choice("none", whole - 1) == "none"  # pages of the files give way
    assert choice("none", dense) == choice("none", whole * 9, whole - 1) == "nowhere"
    assert choice("disk", whole * 9) == "disk"
    assert choice("cpu", whole) == "none"  # where they are is where they are computed
    assert choice("cpu", whole, gpu=True) == "cpu" and choice("auto", whole, gpu=True) == "none"
    with pytest.raises(ValueError, match="is not one of"):
        choice("gpu", whole)


def test_experts_from_the_cpus_memory_are_the_same(tiny: Path) -> None:
    """What a GPU would be given, with the CPU in its place."""
    network = streamed(tiny, 6)
    expected = answer(network)
    weights = open_weights(tiny)
    kernel = FloatGlu(torch.nn.functional.silu)
    store = open_store(weights, kernel, torch.bfloat16, torch.device("cpu"), capacity=6, host=True)
    for block in network.transformer.blocks:
        block.get_submodule("ffn.experts").store = store  # type: ignore[assignment]
    assert torch.equal(answer(network)[0], expected[0])
    assert isinstance(store._source, HostSource) and store._source.bytes_read >= LAYERS * EXPERTS * EXPERT


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_a_gpu_computes_the_same_tokens(tiny: Path, offload: str) -> None:
    """Through pinned memory and a stream of its own, into slots that are used again and again."""
    expected = answer(DbrxForCausalLM.from_pretrained(tiny, dtype="float32"))[1]
    network = DbrxForCausalLM.from_pretrained(
        tiny, dtype="float32", device_map="cuda:0", offload=offload, expert_cache=6 * SLOT + 2 * EXPERT
    )
    cache = KVCache(LAYERS)
    logits = prefill(network, torch.tensor([PROMPT], device="cuda:0"), cache)
    tokens = reply(network, PROMPT, GREEDY, kv=cache.rows[0], logits=logits[0])
    assert tokens == expected
    assert network.expert_store is not None and network.expert_store.counters.misses > 48


# As a user sees it


def test_the_command_line_streams(cli: Cli, tiny_checkpoint: Path) -> None:
    args = ("generate", "-m", tiny_checkpoint, "--raw", "-t", "0", "-n", "5", "one two three", "--json")
    resident = json.loads(cli(*args).out)
    result = cli(*args, "--offload", "disk", "--expert-cache", "1MiB", "-v")
    reply = json.loads(result.out)
    assert reply["text"] == resident["text"] and reply["token_ids"] == resident["token_ids"]
    assert resident["experts"] is None and reply["experts"]["misses"] > 0
    assert reply["experts"]["bytes_read"] >= reply["experts"]["misses"] * EXPERT
    assert "of 48 are kept at a time" in result.err and "from the cache" in result.err
    bad = cli(*args, "--offload", "disk", "--expert-cache", "lots")
    assert bad.code == 2 and "--expert-cache: 'lots' is not a size" in bad.fault
    small = cli(*args, "--offload", "disk", "--expert-cache", "10KB")
    assert small.code == 5 and "too small for two experts" in small.fault


def test_the_user_is_told_when_auto_streams(cli: Cli, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just less than all takes; how much that is depends on the kernels here."""
    roomy = Machine((), Device("cpu", 10**9, 0), Device("disk", 0, 0), kernel_facts)
    with open_weights(tiny_checkpoint) as weights:
        plan = plan_load(weights.config, Stored.of(weights), roomy, LoadOptions(pack=True))
    needed = 10**9 - plan.free(roomy.cpu)
    monkeypatch.setattr("model.machine.available_memory", lambda: needed * 10 // 9 - 50_000)
    result = cli("generate", "-m", tiny_checkpoint, "--raw", "-t", "0", "-n", "2", "one two three")
    assert result.code == 0 and "the experts do not fit into memory" in result.fault
