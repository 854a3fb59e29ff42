"""Few bits a weight: kernels against plain products, files against their source, networks against floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import silu

from model import DbrxForCausalLM, KVCache, kernels
from model.errors import DbrxError, InputError, ModelError, ResourceError
from model.experts import PackedExperts, ResidentExperts
from model.formats import open_weights
from model.formats.quantized import QuantizedWeights
from model.formats.write_quantized import Writer
from model.kernels import FloatGlu, GluExpertKernel, LinearKernel, experts_of, torch_int8, upcast
from model.kernels.torch_floats import RowMajorKernel
from model.kernels.torch_glu import LinearsGlu
from model.kernels.torch_int8 import AtenInt8, FbgemmKernel
from model.kernels.torch_stored import StoredInt8Glu
from model.packing import at_once, read_expert
from model.prefill import prefill
from model.quantization import KEPT, SCHEMES, dequantize, int3, int4, int8, quantize
from model.quantization.equalize import equalizer, quantize_expert
from model.weights import FloatExpert
from tests.cli import Cli
from tests.conftest import TINY
from tests.weights import make_checkpoint

torch.set_num_threads(1)
KERNELS = [
    build for form, several in kernels.KERNELS.items() if form not in KEPT for build in several
]  # they have their own
EXPERTS, HIDDEN, WIDTH = 16, 40, 48
CLOSE = {"none": 0.01, "int8": 0.015, "int4": 0.15, "int3": 0.4}  # error of an output, as a share of the largest


def works(build: Callable[[], LinearKernel]) -> bool:
    return kernels.fault(build()) is None


def share(ours: Tensor, exact: Tensor) -> float:
    """The largest error, as a share of the largest number."""
    return float((ours.float() - exact).abs().max() / exact.abs().max())


def test_int8_rounds_to_the_nearest_of_255_levels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 50)
    weight[3] = 0
    matrix = int8.quantize(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((int8.dequantize(matrix) - weight).abs() <= step / 2 + 1e-7).all()
    assert matrix.values.dtype == torch.int8 and int(matrix.values.abs().max()) == 127


@pytest.mark.parametrize("inputs", [64, 40, 33 * 2])
def test_int4_errs_less_than_plain_rounding(inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, inputs)
    matrix = int4.quantize(weight)
    error = (int4.dequantize(matrix) - weight).square().mean()
    groups = torch.split(weight, 32, dim=1)
    plain = torch.cat([_plain(group) for group in groups], dim=1)
    assert matrix.values.shape == (30, inputs // 2)
    assert error < 0.92 * (plain - weight).square().mean()


@pytest.mark.parametrize("fit", ["native", "plain", "weighted"])
@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("int4", 128), ("int3", 128)])
def test_groups_that_are_all_but_the_same_number_keep_it(scheme: str, group: int, fit: str) -> None:
    """As a GGUF file has them where a scale is 0; a zero point in bfloat16 tells the number to one in 256."""
    torch.manual_seed(0)
    same = torch.tensor([0.3, -1.7, 0.0123, 5e-4])[:, None] * torch.rand(4, 64).add(0.5).repeat_interleave(group, 1)
    weight = same * (1 + torch.randn_like(same) * torch.tensor([0, 1e-7, 1e-5, 1e-4])[:, None])
    if fit == "native":
        kernel = kernels.choose(scheme, group)
        assert kernel is not None
        matrix = kernel.quantize(weight)
    else:
        squares = torch.rand(weight.shape[1]).exp() if fit == "weighted" else None
        matrix = quantize(scheme, group, weight, squares)
    assert ((dequantize(scheme, matrix, group) - weight).abs() <= weight.abs() / 128).all()


def _plain(group: Tensor) -> Tensor:
    low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-9) / 15
    return ((group - low) / step).round() * step + low


def test_int4_keeps_an_even_input_in_the_low_half_of_a_byte() -> None:
    levels = int4.unpack(torch.tensor([[0x21, 0xF3]], dtype=torch.uint8))
    assert levels.tolist() == [[1, 2, 3, 15]]


def test_int3_keeps_two_bits_of_all_inputs_and_then_the_third() -> None:
    weight = torch.arange(8.0).repeat(2, 2)  # is its own levels, with scale 1 and zero point 0
    matrix = int3.quantize(weight)
    assert matrix.values.tolist() == [[0b11100100] * 4 + [0b11110000] * 2] * 2
    torch.testing.assert_close(int3.dequantize(matrix), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scheme", "inputs", "fitting"), [("int4", 33, 2), ("int3", 36, 8)])
def test_inputs_that_fill_no_whole_bytes_are_refused(tmp_path: Path, scheme: str, inputs: int, fitting: int) -> None:
    ffn = {"ffn_hidden_size": inputs, "moe_num_experts": 4, "moe_top_k": 2}
    odd = make_checkpoint(tmp_path / "odd", TINY | {"vocab_size": 320, "n_layers": 1, "ffn_config": ffn}, 0, shards=1)
    said = f"are for inputs in {fitting}s, and a matrix has {inputs}; take int8"
    with pytest.raises(ModelError) as refused:
        DbrxForCausalLM.from_pretrained(odd, quantize=scheme)
    assert said in refused.value.one_line
    with open_weights(odd) as weights, pytest.raises(ModelError, match="and a matrix has"):
        Writer(weights, tmp_path / "out", scheme)


@pytest.mark.parametrize("build", KERNELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 33])
def test_a_kernel_computes_the_product(build: type, rows: int) -> None:
    if not works(build):
        pytest.skip("not on this CPU")
    kernel = build()
    torch.manual_seed(1)
    first, second = torch.randn(128, 64), torch.randn(64, 64)
    x = torch.randn(rows, 64) * torch.rand(rows, 1) + 0.2
    exact = x @ torch.cat((first, second)).t()
    out = kernel.run(kernel.prepare(x.to(kernel.dtype)), kernel.pack(first, second))[:rows]
    assert share(out, exact) < CLOSE[kernel.quantization]
    if kernel.quantization != "none":
        scheme = {"int8": int8, "int4": int4, "int3": int3}[kernel.quantization]
        loaded = kernel.load(scheme.quantize(first), scheme.quantize(second))
        assert torch.equal(kernel.run(kernel.prepare(x.to(kernel.dtype)), loaded)[:rows], out)


@pytest.mark.parametrize("build", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(build: type) -> None:
    if not works(build):
        pytest.skip("not on this CPU")
    kernel = build()
    torch.manual_seed(2)
    packed, x = kernel.pack(torch.randn(64, 64)), torch.randn(6, 64).to(kernel.dtype)
    x[3] *= 1000
    together = kernel.run(kernel.prepare(x), packed).float()
    for i in range(6):
        alone = kernel.run(kernel.prepare(x[i : i + 1]), packed)[:1].float()
        assert share(together[i : i + 1], alone) < 0.01


@pytest.mark.parametrize("build", KERNELS)
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_that_are_not_finite_stay_so(build: type, rows: int) -> None:
    if not works(build):
        pytest.skip("not on this CPU")
    kernel = build()
    layer = kernels.PackedLinear(kernel, kernel.pack(torch.ones(64, 32)), last=True)
    for bad in (torch.nan, torch.inf):
        x = torch.ones(rows, 32, dtype=kernel.dtype)
        x[0, 5] = bad
        assert not layer(x)[0].isfinite().any() and layer(x)[1:].isfinite().all()
    if kernel.quantization != "none":
        with pytest.raises(ModelError, match="not finite"):
            kernel.pack(torch.full((16, 32), torch.nan))
        parts = [part for part in ("scale", "zero") if part in SCHEMES[kernel.quantization].parts]
        for part, bad in product(parts, (torch.nan, torch.inf, -torch.inf)):
            stored = kernel.quantize(torch.ones(16, 32))
            getattr(stored, part)[7] = bad
            with pytest.raises(ModelError, match="not finite"):
                kernel.load(stored)


def test_a_kernel_that_computes_wrong_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(AtenInt8):
        def run(self, x: kernels.Rows, packed: kernels.Packed) -> Tensor:
            return super().run(x, packed).clamp(max=200)  # as sums of bytes that overflow

    class Missing(AtenInt8):
        def run(self, x: kernels.Rows, packed: kernels.Packed) -> Tensor:
            raise NotImplementedError("no such operator\nand a long story")

    assert kernels.fault(Wrong()) == "computes wrong numbers here"
    assert kernels.fault(Missing()) == "no such operator"
    monkeypatch.setitem(kernels.KERNELS, "int8", (Wrong, Missing, AtenInt8))
    kernels.choose.cache_clear()
    assert isinstance(kernels.choose("int8"), AtenInt8)
    assert kernels.probe()["int8"] == "int8 aten"
    kernels.choose.cache_clear()


def test_equalizing_changes_no_output() -> None:
    torch.manual_seed(3)
    expert = FloatExpert(*(torch.randn(HIDDEN, WIDTH) * torch.rand(HIDDEN, 1) for _ in range(3)))
    x = torch.randn(5, WIDTH)
    w1, v1, w2 = expert
    number = equalizer(w1, v1)
    assert number.max() > 2 * number.min()
    outputs = [
        (silu(x @ e.w1.t()) * (x @ e.v1.t())) @ e.w2 for e in (expert, FloatExpert(w1, v1 / number, w2 * number))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", KERNELS)
@pytest.mark.parametrize("tokens", [1, 29])
def test_packed_experts_are_close_to_resident_ones(build: type, tokens: int) -> None:
    if not works(build):
        pytest.skip("not on this CPU")
    torch.manual_seed(4)
    hidden, width = HIDDEN, WIDTH
    resident = ResidentExperts(EXPERTS, hidden, width, silu)
    for parameter in resident.parameters():
        parameter.data.normal_(0, 0.3)
    stacks = [getattr(resident.mlp, name).data.view(EXPERTS, hidden, width) for name in ("w1", "v1", "w2")]
    linear = build()
    kernel = experts_of(linear, "silu")
    packed = PackedExperts(kernel, [kernel.pack(FloatExpert(*(stack[e] for stack in stacks))) for e in range(EXPERTS)])
    x = torch.randn(tokens, width)
    scores = torch.randn(tokens, EXPERTS) + torch.linspace(-2, 2, EXPERTS)  # uneven: some experts get no token
    weights, chosen = scores.softmax(-1).topk(4)
    with torch.no_grad():
        out = packed(x.to(linear.dtype), chosen, weights.to(linear.dtype))
        exact = resident(x, chosen, weights)
    assert share(out, exact) < 2 * CLOSE[kernel.quantization]
    assert not list(packed.parameters())


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / request.param
    with open_weights(tiny_checkpoint) as weights:
        Writer(weights, folder, request.param).write(lambda written: None)
    return folder


def hidden(network: DbrxForCausalLM, ids: Tensor, chunk: int) -> Tensor:
    """Last hidden state of each position, read in chunks."""
    cache = KVCache(network.config.n_layers, rows=len(ids))
    parts = [network.transformer(part, past_key_values=cache).last_hidden_state for part in ids.split(chunk, dim=1)]
    return torch.cat([part.float() for part in parts], dim=1)


@torch.no_grad()
def test_a_quantized_checkpoint_computes_what_quantizing_on_load_does(tiny_checkpoint: Path, quantized: Path) -> None:
    stored = DbrxForCausalLM.from_pretrained(quantized)
    loaded = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize=quantized.name)
    assert stored.kernels is not None and stored.kernels.quantize == quantized.name
    ids = torch.randint(0, 100_000, (1, 21))
    assert torch.equal(stored(ids).logits, loaded(ids).logits)


@torch.no_grad()
def test_a_quantized_network_is_near_the_whole_one(tiny_checkpoint: Path, quantized: Path) -> None:
    whole = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    network = DbrxForCausalLM.from_pretrained(quantized)
    torch.manual_seed(5)
    ids = torch.randint(0, 100_000, (2, 40))
    exact = hidden(whole, ids, 40)
    for chunk in (40, 16, 1):
        ours = hidden(network, ids, chunk)
        error = (ours - exact).norm() / exact.norm()
        assert error < {"int8": 0.1, "int4": 0.3, "int3": 0.6}[quantized.name], chunk


@torch.no_grad()
def test_packed_bfloat16_is_as_near_as_bfloat16(tiny_checkpoint: Path) -> None:
    if kernels.choose("bfloat16") is None:
        pytest.skip("not on this CPU")
    whole = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    plain = DbrxForCausalLM.from_pretrained(tiny_checkpoint)
    packed = DbrxForCausalLM.from_pretrained(tiny_checkpoint, pack=True)
    assert packed.kernels is not None and packed.kernels.quantize == "none"
    ids = torch.randint(0, 100_000, (1, 40))
    exact = hidden(whole, ids, 40)
    bound = (hidden(plain, ids, 40) - exact).norm()
    for chunk in (40, 1):
        assert (hidden(packed, ids, chunk) - exact).norm() < 1.5 * bound
    with pytest.raises(ValueError, match="cannot be saved"):
        packed.save_pretrained("nowhere")


def test_any_program_can_read_the_file(tiny_checkpoint: Path, quantized: Path) -> None:
    """By the documentation alone, with safetensors and a few lines."""
    index = json.loads((quantized / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    prefix = "transformer.blocks.1.ffn.experts.7."

    def tensor(name: str) -> Tensor:
        with safe_open(quantized / index[prefix + name], "pt") as file:
            found: Tensor = file.get_tensor(prefix + name)
            return found

    def matrix(name: str) -> Tensor:
        values, scale = tensor(f"{name}.weight"), tensor(f"{name}.scale").float()
        if quantized.name == "int8":
            return values * scale[:, None]
        bits = torch.from_numpy(np.unpackbits(values.numpy(), axis=1, bitorder="little"))
        if quantized.name == "int4":
            levels = bits.unflatten(1, (-1, 4)) @ torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
        else:
            low, third = bits.split([bits.shape[1] * 2 // 3, bits.shape[1] // 3], dim=1)
            levels = low[:, 0::2] + 2 * low[:, 1::2] + 4 * third
        group = torch.arange(levels.shape[1]) // {"int4": 32, "int3": 128}[quantized.name]
        return (levels - tensor(f"{name}.zero").float()[:, group]) * scale[:, group]

    with open_weights(tiny_checkpoint) as source:
        whole = FloatExpert(*(part.float() for part in source.expert(1, 7)))
    x = torch.randn(6, WIDTH)
    exact = (silu(x @ whole.w1.t()) * (x @ whole.v1.t())) @ whole.w2
    ours = (silu(x @ matrix("w1").t()) * (x @ matrix("v1").t())) @ matrix("w2").t()
    assert share(ours, exact) < CLOSE[quantized.name]


def test_few_large_experts_are_packed_one_at_a_time(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with open_weights(tiny_checkpoint) as weights:
        expert = 3 * HIDDEN * WIDTH * 4
        assert [at_once(weights, room) for room in (0, expert, 3 * expert, 100 * expert)] == [1, 1, 3, 8]


def test_each_expert_is_one_run_of_bytes(quantized: Path) -> None:
    with open_weights(quantized) as weights:
        assert isinstance(weights, QuantizedWeights)
        assert len(weights.expert_extents(2, 5)) == 1
        mapped = weights.quantized_expert(2, 5)
        read = weights.quantized_expert(2, 5, read_expert(weights, 2, 5))
        for ours, theirs in zip(mapped, read, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None)
        stacked = weights.read("transformer.blocks.2.ffn.experts.mlp.w2")
        assert torch.equal(stacked.view(EXPERTS, HIDDEN, WIDTH)[5], weights.expert(2, 5).w2)


def test_an_interrupted_run_is_taken_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done > 0.7 * total:
            with pytest.raises(InputError, match="is in use by another run"):
                Writer(weights, out, "int8").write(lambda written: None)
            raise KeyboardInterrupt

    with open_weights(tiny_checkpoint) as weights:
        with pytest.raises(KeyboardInterrupt):
            Writer(weights, out, "int8").write(lambda written: None, interrupt)
        assert not out.exists()
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.quantizing").iterdir()}
        assert before
        Writer(weights, out, "int8").write(lambda written: None)
    kept = [name for name, when in before.items() if (out / name).stat().st_mtime_ns == when]
    assert kept and not list(tmp_path.glob(".out*"))
    with open_weights(out) as weights:
        assert weights.quantization == "int8"


def test_parts_of_another_run_are_not_taken_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with open_weights(tiny_checkpoint) as weights:
        first = Writer(weights, tmp_path / "a", "int4")
        first.write(lambda written: None)
        shutil.move(tmp_path / "a", tmp_path / ".b.quantizing")
        Writer(weights, tmp_path / "b", "int8").write(lambda written: None)
    with open_weights(tmp_path / "b") as weights:
        assert weights.quantization == "int8"


def test_a_full_disk_and_a_taken_name_are_said_before(
    tiny_checkpoint: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_weights(tiny_checkpoint) as weights:
        with pytest.raises(InputError, match="exists already"):
            Writer(weights, tmp_path, "int8")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ResourceError, match="GB free"):
            Writer(weights, tmp_path / "out", "int8").write(lambda written: None)
    with open_weights(quantized) as weights, pytest.raises(InputError, match="quantized already"):
        Writer(weights, tmp_path / "out", "int8")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "int5"}, "'int5' is not one of"),
        ({"kind": ["int8"]}, "is not one of"),
        ({"version": 2}, "version 2"),
        ({"kind": "int4", "group": 7}, "group 7"),
        ({"kind": "int4", "group": "32"}, "group '32'"),
    ],
)
def test_settings_that_are_not_known_are_refused(
    quantized: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(quantized, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelError, match=message):
        open_weights(folder)


@pytest.mark.parametrize("field, value", [("n_layers", 2), ("n_layers", 2000), ("d_model", 96), ("vocab_size", 5)])
def test_files_that_do_not_fit_the_config_are_refused(quantized: Path, tmp_path: Path, field: str, value: int) -> None:
    folder = shutil.copytree(quantized, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config[field] = value
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(DbrxError, match="safetensors"):
        open_weights(folder)


def test_a_damaged_file_is_named(quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "copy")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ModelError, match=shard.name):
        open_weights(folder)
    shard.write_bytes(shard.read_bytes().replace(b'"I8"', b'"U8"').replace(b'"BF16"', b'"F16" '))
    with pytest.raises(ModelError, match=shard.name):
        open_weights(folder)


def test_the_source_is_recorded(tiny_checkpoint: Path, quantized: Path) -> None:
    import hashlib

    settings = json.loads((quantized / "config.json").read_text("utf-8"))["quantization_config"]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tiny_checkpoint.glob("*.safetensors")}
    assert settings["source_sha256"] == digests


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantize_then_generate(cli: Cli, small_checkpoint: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    result = cli("quantize", str(small_checkpoint), str(out), "--to", to)
    assert result.code == 0 and result.out.strip() == str(out)
    reply = cli("generate", "-m", str(out), "hello", "-n", "3", "-t", "0", "--json")
    assert json.loads(reply.out)["quantize"] == to
    direct = cli("generate", "-m", str(small_checkpoint), "--quantize", to, "hello", "-n", "3", "-t", "0", "--json")
    assert json.loads(direct.out)["token_ids"] == json.loads(reply.out)["token_ids"]


@torch.inference_mode()
def test_prefill_and_decode_of_a_batch(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int8")
    ids = torch.randint(0, 100_000, (3, 9))
    network.prefill_chunk = 4
    logits = prefill(network, ids, KVCache(network.config.n_layers, rows=3))
    for row in range(3):
        alone = prefill(network, ids[row : row + 1], KVCache(network.config.n_layers))
        assert share(logits[row], alone[0]) < 0.05


def test_quantize_expert_is_what_a_kernel_packs() -> None:
    expert = FloatExpert(*(torch.randn(HIDDEN, WIDTH) for _ in range(3)))
    kernel = LinearsGlu(AtenInt8(), silu)
    packed, loaded = kernel.pack(expert), kernel.load(quantize_expert(expert, int8.quantize))
    for ours, theirs in zip(packed, loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_extremes_in_a_row_do_not_drown_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One activation 200 times the others: with a second row the error stays that of the weights."""
    if not works(FbgemmKernel):
        pytest.skip("not on this CPU")
    torch.manual_seed(6)
    weight, x = torch.randn(64, 256), torch.randn(5, 256)
    x[:, 7] = 200
    exact = x @ int8.dequantize(int8.quantize(weight)).t()
    kernel = FbgemmKernel()
    packed = kernel.pack(weight)
    together = kernel.run(kernel.prepare(x), packed)
    alone = torch.cat([kernel.each(row, [packed]) for row in torch.split(x, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)
    monkeypatch.setattr(torch_int8, "OUTLIER", torch.inf)
    coarse = kernel.run(kernel.prepare(x), packed)
    assert (together - exact).square().mean() < 1e-3 * (coarse - exact).square().mean()


def test_rows_inside_an_expert_have_a_second_one_later() -> None:
    x = torch.ones(1, 1024)
    x[0, 7] = 9.2  # 8.9 root mean squares
    assert torch_int8._scale_rows(x, int8.QMAX, inner=False)[2].tolist() == [True]
    assert torch_int8._scale_rows(x, int8.QMAX, inner=True)[2].tolist() == [False]


def test_bytes_that_are_summed_in_16_bits() -> None:
    """The largest sums fit, and all rows are as fine as 16 bits."""
    kernel = FbgemmKernel(torch_int8.SUMMED_QMAX)
    if kernels.fault(kernel):
        pytest.skip("no FBGEMM here")
    torch.manual_seed(8)
    weight, x = torch.randn(64, 256), torch.randn(20, 256)
    weight[:2], x[:2] = torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-3.0]])
    exact = x @ int8.dequantize(int8.quantize(weight)).t()
    packed = kernel.pack(weight)
    assert share(kernel.run(kernel.prepare(x, inner=True), packed), exact) < 1e-4
    assert share(kernel.each(x[:1], [packed]), exact[:1]) < 1e-4


@pytest.mark.parametrize("rows", [1, 7, 8, 30])
def test_bfloat16_is_upcast_where_the_processor_has_none(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(upcast, "PIECE", 1000)  # less than a matrix
    kernel = RowMajorKernel(torch.bfloat16)
    assert kernel.name == "bfloat16 rows upcast"
    torch.manual_seed(9)
    x, weights = torch.randn(rows, 64).bfloat16(), [torch.randn(n, 64).bfloat16() for n in (48, 16)]
    out = kernel.run(kernel.prepare(x), kernel.pack(*weights))
    exact = x.float() @ torch.cat(weights).float().t()
    assert out.dtype == torch.bfloat16 and share(out, exact) < 0.005


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_experts_as_they_are_stored_are_upcast_too(
    monkeypatch: pytest.MonkeyPatch, rows: int, kind: torch.dtype
) -> None:
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(upcast, "PIECE", 1000)
    torch.manual_seed(10)
    expert = FloatExpert(*(torch.randn(HIDDEN, WIDTH).bfloat16() for _ in range(3)))
    x = torch.randn(rows, WIDTH).bfloat16()
    kernel: GluExpertKernel = FloatGlu(silu) if kind == torch.bfloat16 else StoredInt8Glu(silu)
    w1, v1, w2 = (matrix.float() for matrix in expert)
    exact = (silu(x.float() @ w1.t()) * (x.float() @ v1.t())) @ w2
    out = kernel.run(kernel.prepare(x), None, kernel.pack(expert))
    assert out.dtype == torch.bfloat16 and share(out, exact) < CLOSE["none" if kind == torch.bfloat16 else "int8"]


def test_gradients_reach_upcast_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcast, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(upcast, "PIECE", 1000)
    torch.manual_seed(11)
    expert = [torch.randn(HIDDEN, WIDTH).bfloat16().requires_grad_() for _ in range(3)]
    exact = [part.detach().float().requires_grad_() for part in expert]
    x, kernel = torch.randn(30, WIDTH).bfloat16(), FloatGlu(silu)
    for rows, parts in ((x, expert), (x.float(), exact)):
        kernel.run(kernel.prepare(rows), None, kernel.pack(FloatExpert(*parts))).square().sum().backward()
    for part, meant in zip(expert, exact, strict=True):
        assert part.grad is not None and meant.grad is not None
        assert share(part.grad, meant.grad) < 0.02


@pytest.mark.parametrize("build", KERNELS)
def test_each_is_a_row_and_a_matrix_at_a_time(build: Callable[[], LinearKernel]) -> None:
    """A single row times three matrices, and three rows times one each; none depends on those beside it."""
    if not works(build):
        pytest.skip("not on this CPU")
    torch.manual_seed(7)
    kernel = build()
    matrices = [kernel.pack(torch.randn(64, 128)) for _ in range(3)]
    rows = torch.randn(3, 128, dtype=kernel.dtype)
    for x in (rows[:1], rows):
        given = kernel.each(x, matrices)
        for i, row in enumerate(x.expand(3, -1).split(1)):
            assert torch.equal(kernel.each(row, [matrices[i]])[0], given[i])
            product = kernel.run(kernel.prepare(row), matrices[i])[0].float()
            assert (given[i].float() - product).abs().max() < 0.02 * product.abs().max()


@torch.no_grad()
def test_groups_of_128(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with open_weights(tiny_checkpoint) as weights:
        Writer(weights, tmp_path / "out", "int4", 128).write(lambda written: None)
    network = DbrxForCausalLM.from_pretrained(tmp_path / "out")
    whole = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    ids = torch.randint(0, 100_000, (1, 20))
    exact = hidden(whole, ids, 20)
    assert (hidden(network, ids, 20) - exact).norm() < 0.4 * exact.norm()
