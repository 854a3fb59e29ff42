"""What `dbrx bench` measures: a prompt read, tokens made, and how near that is to what the memory allows."""

from __future__ import annotations

import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from model.kernels import choose, probe
from model.kv_cache import KVCache
from model.machine import memory_bandwidth
from model.prefill import prefill
from model.scheduler import Coming
from model.sequence import finite

if TYPE_CHECKING:
    from model.causal_lm import DbrxForCausalLM

WARM_UP_TOKENS = 16
PROBE_ROWS, PROBE_SIZE = 512, 2048  # of the product that the matrix rate is measured with
PROBE_BYTES = 2**27  # of the matrix that is read: much larger than a cache
PREFILLS = 3  # runs, of which the median counts
MOST_IDS = 100_000  # ids above are special ones


@dataclass(frozen=True)
class Machine:
    """The computer, measured: bytes and operations a second."""

    cpu: str
    threads: int
    torch: str
    kernels: dict[str, str]
    stream_gb_s: float
    matrix_tflop_s: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One row: a model as it was loaded, with one length of prompt."""

    attn: str
    dtype: str
    quantize: str
    kernel: str
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_ms_p50: float
    decode_ms_p95: float
    bytes_per_token: int
    bandwidth_gb_s: float
    stream_gb_s: float
    fraction_of_limit: float
    peak_rss_bytes: int
    card: dict[str, Any] | None = None  # `DbrxForCausalLM.on_card`, where there is one

    def to_dict(self) -> dict[str, Any]:
        """As the contract's JSON."""
        return {name: value for name, value in asdict(self).items() if name != "card" or value}


def measure_machine(threads: int | None = None) -> Machine:
    """Two seconds: the fastest reading of memory that can be made, and the best rate of each kind of product."""
    if threads:
        torch.set_num_threads(threads)
    rates = {name: rate for name in probe() if (rate := _matrix_rate(name)) is not None}
    stream = max(memory_bandwidth(), _reading_rate())
    return Machine(_cpu_name(), torch.get_num_threads(), torch.__version__, probe(), stream / 1e9, rates)


def measure(network: DbrxForCausalLM, prompt_tokens: int, new_tokens: int, machine: Machine, load_s: float) -> Result:
    """Read a random prompt and make tokens greedily; medians after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    most = min(MOST_IDS, network.config.vocab_size)
    ids = torch.randint(0, most, (1, prompt_tokens), generator=generator).to(network.device)
    prefill(network, ids[:, :WARM_UP_TOKENS], KVCache(network.config.n_layers))
    reading = []
    for _ in range(PREFILLS):
        cache = KVCache(network.config.n_layers)
        start = time.perf_counter()
        logits = prefill(network, ids, cache)
        _synchronize(network)
        reading.append(time.perf_counter() - start)
    finite(logits.float())
    steps = _decode(network, logits, cache, new_tokens)
    seconds = statistics.median(steps)
    per_token = bytes_per_token(network, prompt_tokens + new_tokens // 2)
    return Result(
        attn=network.transformer.attention,
        dtype=str(network.kv_dtype).removeprefix("torch."),
        quantize=network.kernels.quantize if network.kernels else "none",
        kernel=network.kernels.name if network.kernels else "float",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        load_s=load_s,
        prefill_tokens_per_s=prompt_tokens / statistics.median(reading),
        decode_tokens_per_s=1 / seconds,
        decode_ms_p50=seconds * 1e3,
        decode_ms_p95=sorted(steps)[math.ceil(0.95 * len(steps)) - 1] * 1e3,
        bytes_per_token=per_token,
        bandwidth_gb_s=per_token / seconds / 1e9,
        stream_gb_s=machine.stream_gb_s,
        fraction_of_limit=per_token / seconds / 1e9 / machine.stream_gb_s,
        peak_rss_bytes=peak_rss(),
        card=network.on_card(),
    )


def bytes_per_token(network: DbrxForCausalLM, context: int) -> int:
    """Bytes that a decode step must read: active weights as they are held, and keys and values of `context` tokens."""
    config, ffn = network.config, network.config.ffn_config
    kernels, itemsize = network.kernels, network.kv_dtype.itemsize
    d, kv = config.d_model, 2 * config.attn_config.kv_n_heads * config.head_dim
    matrices = config.n_layers * [(d + kv, d), (d, d)] + [(config.vocab_size, d)]
    if kernels is not None:
        dense = sum(kernels.dense.nbytes(*shape) for shape in matrices)
    else:
        dense = sum(outputs * inputs for outputs, inputs in matrices) * itemsize
    router = config.n_layers * ffn.moe_num_experts * d * network.dtype.itemsize
    return config.n_layers * (ffn.moe_top_k * network.expert_bytes + context * kv * itemsize) + dense + router


def peak_rss() -> int:
    """Most bytes that this process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.inference_mode()
def _decode(network: DbrxForCausalLM, logits: torch.Tensor, cache: KVCache, count: int) -> list[float]:
    """Seconds of each step, but for the first two."""
    came = []
    for _ in range(count + 2):
        ids = logits.argmax(-1)[:, None]
        coming = Coming(ids)
        logits = network(ids, past_key_values=cache).logits[:, -1]  # begun before they are known, as of a reply
        coming.read()
        came.append(time.perf_counter())
    return [after - before for before, after in pairwise(came)][1:]


def _synchronize(network: DbrxForCausalLM) -> None:
    if network.device.type == "cuda":
        torch.cuda.synchronize()


def _matrix_rate(name: str) -> float | None:
    """10^12 operations a second with that kind of weights, many rows at once; None where there is no kernel."""
    x, weight = torch.randn(PROBE_ROWS, PROBE_SIZE), torch.randn(PROBE_SIZE, PROBE_SIZE)
    kernel = choose(name)
    if kernel is None:
        return None
    packed, rows = kernel.pack(weight), kernel.prepare(x.to(kernel.dtype))
    return 2 * PROBE_ROWS * PROBE_SIZE**2 / _best(lambda: kernel.run(rows, packed)) / 1e12


def _reading_rate() -> float:
    """Bytes a second at which a large int8 matrix is multiplied with one row: nothing reads faster."""
    kernel = choose("int8")
    assert kernel is not None
    packed = kernel.load(_ones(PROBE_BYTES // 4096, 4096))
    row = kernel.prepare(torch.ones(1, 4096))
    return PROBE_BYTES / _best(lambda: kernel.run(row, packed), 6)


def _ones(outputs: int, inputs: int) -> Any:
    from model.weights import QuantizedMatrix

    return QuantizedMatrix(torch.ones(outputs, inputs, dtype=torch.int8), torch.ones(outputs))


@torch.inference_mode()
def _best(work: Callable[[], object], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plot(results: Sequence[Result], machine: Machine) -> str:
    """The results as an SVG picture: tokens a second over the context, and dashed what reading the weights allows."""
    width, height, left, top, right, bottom = 720, 400, 70, 30, 170, 50
    contexts = [result.prompt_tokens for result in results]
    limits = [machine.stream_gb_s * 1e9 / result.bytes_per_token for result in results]
    low, high = (0, 2 * contexts[0]) if len(set(contexts)) == 1 else (min(contexts), max(contexts))
    step = _step(max(*limits, *(result.decode_tokens_per_s for result in results)) / 4)
    most = 1.1 * max(*limits, *(result.decode_tokens_per_s for result in results))

    def x(context: float) -> float:
        return left + (context - low) / (high - low) * (width - left - right)

    def y(rate: float) -> float:
        return height - bottom - rate / most * (height - top - bottom)

    def line(rates: Sequence[float], style: str, label: str) -> str:
        points = [(x(c), y(rate)) for c, rate in zip(contexts, rates, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        dots = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="#0b62a4"/>' for px, py in points)
        end = points[-1]
        if len(points) == 1:  # a level, since one length is no curve
            path = f"{left:.1f},{end[1]:.1f} {width - right:.1f},{end[1]:.1f}"
            end = (width - right, end[1])
        return f'<polyline points="{path}" fill="none" {style}/>{dots}' + _text(end[0] + 8, end[1] + 4, label)

    marks = [_text(left - 8, y(step * i) + 4, f"{step * i:g}", "end") for i in range(int(most / step) + 1)]
    marks += [_text(x(c), height - bottom + 18, str(c), "middle") for c in sorted(set(contexts))]
    first = results[0]
    title = f"Decoding: {first.quantize if first.quantize != 'none' else first.dtype}, {machine.threads} threads"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="white"/>',
            f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="#888"/>',
            *marks,
            line(limits, 'stroke="#c33" stroke-dasharray="5 4" stroke-width="2"', "limit of memory"),
            line([r.decode_tokens_per_s for r in results], 'stroke="#0b62a4" stroke-width="2"', "measured"),
            _text(left, 18, title),
            _text((left + width - right) / 2, height - 10, "tokens of context", "middle"),
            _text(8, 18, "tokens/s"),
            "</svg>\n",
        ]
    )


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ...: between marks of an axis."""
    power = 10.0 ** math.floor(math.log10(max(least, 1e-9)))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe}</text>'
