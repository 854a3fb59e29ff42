"""Decoding through compiled functions: against the plain network, and what goes wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from model import DbrxForCausalLM, KVCache, quantization
from model.compiled import Compiler
from model.compiled.block import (
    CompiledBlock,
    CompiledExperts,
    CompiledLinear,
    form_of,
)
from model.compiled.call import Function
from model.compiled.form import Form
from model.compiled.functions import attend, times
from model.compiled.many import Bytes, Tiles, many
from model.compiled.products import (
    LONGEST,
    BlockProduct,
    ByteProduct,
    NibbleProduct,
    Product,
    ShortProduct,
    product,
)
from model.config import DbrxConfig
from model.decode import prefill
from model.errors import ModelError
from model.experts import MatricesKernel
from model.formats import QuantizedMatrix
from model.packing import Packing
from model.quantization import MatrixKernel, int4, int8
from model.quantization.blocks import FloatBlocks, fit
from model.quantization.nibbles import NibbleRows
from model.quantization.rows import ByteRows
from model.quantization.widened import multiplies_bfloat16
from tests.cli import Cli
from tests.conftest import TINY
from tests.weights import make_checkpoint

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler here"
)
pytestmark = pytest.mark.timeout(900)  # compiling takes a minute or two, more on a busy machine, and others wait for it
PROMPT = torch.arange(100, 160)[None]  # so many that no kind of experts takes them one by one
STEPS = 6
WHOLE_BLOCKS = {"d_model": 64, "n_heads": 4, "ffn_config": TINY["ffn_config"] | {"ffn_hidden_size": 128}}
CAPACITY = 31  # twice that is full in the middle of the steps, and grows


@pytest.fixture(scope="module")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers: parts that networks share are compiled once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@dataclass(frozen=True)
class OneAtATime(Compiler):
    """Of all workers: so none compiles what another one does. missing: whether a part was, of each form asked for."""

    missing: list[bool] = field(default_factory=list)

    def functions(self, form: Form) -> Mapping[str, Function]:
        with FileLock(self.folder / ".lock"):
            self.missing.append(not all((self.folder / part.key).is_dir() for part in form.parts()))
            return super().functions(form)


@pytest.fixture(scope="module")
def whole_blocks_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the tiny one, but of matrices that oneDNN's blocks fill."""
    folder = tmp_path_factory.mktemp("checkpoints") / "blocks"
    make_checkpoint(folder, TINY | WHOLE_BLOCKS, seed=7, dtype="bfloat16", shards=2)
    return folder


@pytest.fixture
def bytes_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that multiplies bytes, or on one that does not."""
    if request.param and not quantization.rows.multiplies_bytes():
        pytest.skip("not on this CPU")
    monkeypatch.setattr(quantization.rows, "multiplies_bytes", lambda: request.param)
    quantization.choose.cache_clear()
    yield
    quantization.choose.cache_clear()


@torch.inference_mode()
def decoded(network: DbrxForCausalLM, follow: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the prompt, of a few tokens, after the prompt and after each of some tokens; and these.

    They are the likeliest, or those of `follow`.
    """
    cache = KVCache(network.config.n_layers, capacity=CAPACITY)
    rows, ids = [network(ids).logits[0].float() for ids in (PROMPT, PROMPT[:, :3])], []
    rows.append(prefill(network, PROMPT, cache).float())
    for step in range(STEPS):
        ids.append(rows[-1].argmax(-1) if follow is None else follow[step])
        rows.append(network(ids[-1][:, None], past_key_values=cache).logits[:, -1].float())
    return torch.cat(rows), torch.stack(ids)


def dtype_of(form: Form) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, form.dtype)
    return dtype


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("bytes_fast")
@pytest.mark.parametrize(
    ("quantize", "dtype", "bytes_fast", "within", "shape"),
    [
        ("none", "float32", False, 1.1, "tiny"),
        ("none", "bfloat16", False, 1.1, "tiny"),
        ("none", "bfloat16", False, 1.1, "whole_blocks"),
        ("int8", "auto", True, 1.1, "tiny"),
        ("int4", "auto", True, 1.1, "tiny"),
        ("int8", "auto", False, 1.5, "tiny"),  # rows of 16 bits err otherwise than those of plain steps
        ("int4", "auto", False, 1.5, "tiny"),
    ],
    indirect=["bytes_fast"],
)
def test_compiled_steps_are_as_near_to_float32_as_plain_ones(
    request: pytest.FixtureRequest, compiled_folder: Path, quantize: str, dtype: str, within: float, shape: str
) -> None:
    checkpoint: Path = request.getfixturevalue(f"{shape}_checkpoint")
    built: list[int] = []
    compiler = OneAtATime(compiled_folder, lambda: built.append(1))
    network = DbrxForCausalLM.from_pretrained(checkpoint, quantize=quantize, dtype=dtype, compiler=compiler)
    assert all(isinstance(block, CompiledBlock) for block in network.transformer.blocks)
    assert network.packing is not None
    form, block = form_of(network.config, network.packing, experts=True), network.transformer.blocks[0]
    assert form.experts is not None and form.dense is not None
    way, dense = (many(kind, product(kind, form.group), dtype_of(form)) for kind in (form.experts, form.dense))
    assert isinstance(block.ffn.experts, CompiledExperts)
    assert (form.experts == "blocks") == (shape == "whole_blocks" and multiplies_bfloat16())
    assert (block.ffn.experts.many_rows is None) == (way is None)
    assert isinstance(block.norm_attn_norm.attn.Wqkv, CompiledLinear) == isinstance(dense, Tiles | Bytes)
    exact, ids = decoded(DbrxForCausalLM.from_pretrained(checkpoint, dtype="float32"))
    plain, _ = decoded(DbrxForCausalLM.from_pretrained(checkpoint, quantize=quantize, dtype=dtype), ids)
    found, _ = decoded(network, ids)
    assert (found - exact).norm() <= max(1e-5 * exact.norm(), within * (plain - exact).norm())
    told = [1] * compiler.missing[0]  # nothing to build where other networks have left all parts
    assert built == told
    again = DbrxForCausalLM.from_pretrained(checkpoint, quantize=quantize, dtype=dtype, compiler=compiler)
    assert torch.equal(decoded(again, ids)[0], found)
    assert built == told  # what was compiled was kept
    assert compiler.missing[1:] == [False]


@needs_compiler
@pytest.mark.slow
def test_streamed_experts_beside_compiled_attention(tiny_checkpoint: Path, compiled_folder: Path) -> None:
    compiler = OneAtATime(compiled_folder, lambda: None)
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", offload="disk", compiler=compiler)
    assert network.expert_store is not None
    meant, ids = decoded(DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32"))
    assert (decoded(network, follow=ids)[0] - meant).norm() <= 1e-4 * meant.norm()

    cache = KVCache(network.config.n_layers)  # a step of padding alone leaves what was read as it is
    prefill(network, PROMPT, cache)
    before = [part[:, : len(cache)].clone() for parts in cache.layers() for part in parts]
    with torch.inference_mode():
        network(PROMPT[:, :1], torch.zeros(1, 1), past_key_values=cache)
    assert len(cache) == PROMPT.shape[1]
    after = [part[:, : len(cache)] for parts in cache.layers() for part in parts]
    assert all(map(torch.equal, before, after))


def test_streamed_experts_keep_the_kernel_that_they_have_otherwise(tiny_checkpoint: Path, tmp_path: Path) -> None:
    class Nothing(Compiler):
        def functions(self, form: Form) -> Mapping[str, Function]:
            assert form.experts is None
            return dict.fromkeys(("attend", "head"), lambda arguments: arguments)

    loaded = [
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int4", offload="disk", compiler=compiler, pack=True)
        for compiler in (Nothing(tmp_path, lambda: None), None)
    ]
    compiled, plain = (network.transformer.blocks[0].ffn.experts.kernel for network in loaded)
    assert compiled.name == plain.name and "words" not in compiled.name
    assert isinstance(loaded[0].transformer.blocks[0], CompiledBlock)


@needs_compiler
@pytest.mark.slow
def test_the_command_line_uses_what_was_compiled(
    cli: Cli, tiny_checkpoint: Path, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = OneAtATime(compiled_folder, lambda: None)
    DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", offload="disk", compiler=compiler)
    args = ("generate", "-m", tiny_checkpoint, "--dtype", "float32", "--offload", "disk", "--raw", "-t", "0", "-n", "5")
    monkeypatch.setenv("DBRX_CACHE", str(compiled_folder.parent))
    compiled, plain = cli(*args, "Hello", "--compile"), cli(*args, "Hello")
    assert compiled.code == 0, compiled.err
    assert compiled.out == plain.out and compiled.out.strip()
    assert "compiling" not in compiled.err


@pytest.mark.slow
def test_the_command_line_says_that_it_compiles(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # without a compiler: that it works is what the others see
    done = cli("generate", "-m", tiny_checkpoint, "--dtype", "float32", "--raw", "-n", "5", "Hello", "--compile")
    assert done.code == 3 and not done.out
    assert "compiling for this processor" in done.err and "install g++" in done.err


def test_a_folder_that_others_may_write_is_refused(
    cli: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBRX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    done = cli("generate", "-m", tiny_checkpoint, "--raw", "-n", "5", "Hello", "--compile")
    assert done.code == 1 and not done.out
    assert f"everybody can write to {folder}" in done.err and "set DBRX_CACHE" in done.err


def test_one_line_where_there_is_no_compiler(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32", compiler=Compiler(tmp_path, lambda: None))
    assert "install g++" in caught.value.one_line
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="for one CPU"):
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float16", compiler=Compiler(tmp_path, lambda: None))


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    form = Form(DbrxConfig(), "float32", "floats", "floats")
    for part in form.parts():
        (tmp_path / part.key).mkdir()
    (tmp_path / part.key / "experts.so").write_bytes(b"no library")
    with pytest.raises(ModelError) as caught:
        Compiler(tmp_path, lambda: None).functions(form)
    assert f"rm -r '{tmp_path / part.key}'" in caught.value.one_line


def test_forms_share_nothing_that_differs() -> None:
    forms = [Form(DbrxConfig(), *rest) for rest in (("float32", "floats", None), ("float32", "bytes", None))]
    forms.append(Form(DbrxConfig(d_model=4096), "float32", "floats", None))
    assert len({form.key for form in forms}) == 3
    assert Form.from_dict(forms[0].to_dict()) == forms[0]


def test_forms_share_the_part_that_does_not_differ() -> None:
    int8_form, int4_form = (Form(DbrxConfig(), "float32", "bytes", *rest) for rest in (("bytes",), ("nibbles", 32)))
    streamed = Form(DbrxConfig(), "float32", "bytes", None)
    (dense, experts), others = int8_form.parts(), int4_form.parts()
    assert [dense] == streamed.parts() == others[:1]
    assert experts.key != others[1].key


@pytest.mark.parametrize("shape", [(12, 48), (8, 3 * LONGEST), (7, LONGEST + 2)])
def test_a_product_of_long_rows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, scale, x = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]), torch.randn(shape[1])
    exact = (values.double() @ x.double()) * scale.double()
    torch.testing.assert_close(times(ByteProduct(), x, (values, scale)).double(), exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("shape", [(12, 48), (5, 4 * LONGEST), (7, 46)])
def test_a_product_of_bytes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(shape[1])
    stored = int8.quantize(weight)
    stored.values[0] = torch.where(x > 0, 127, -128)  # the largest sum, and both ends of a byte
    check(ByteRows(), ShortProduct(), x, stored, int8.dequantize(stored), lone=4e-5)  # a row has 16 bits


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (192, 3 * LONGEST)])
def test_a_product_of_blocks(shape: tuple[int, int]) -> None:
    if not multiplies_bfloat16():
        pytest.skip("not on this CPU")
    assert fit(shape)
    torch.manual_seed(0)
    weight, x = torch.randn(shape).to(torch.bfloat16), torch.randn(shape[1]).to(torch.bfloat16)
    exact, kernel = weight.double() @ x.double(), FloatBlocks()
    packed = kernel.pack(weight)
    torch.testing.assert_close(times(BlockProduct(), x.float(), packed).double(), exact, rtol=1e-5, atol=1e-3)
    several = kernel.run(kernel.prepare(torch.stack((x, -x))), packed).double()
    assert (several - torch.stack((exact, -exact))).abs().max() < 0.01 * exact.abs().max()


def test_blocks_are_for_matrices_that_fill_them() -> None:
    assert not fit((48, 64)) and not fit((64, 40)) and not fit((64, 64), (96, 32))


@pytest.mark.parametrize("shape", [(12, 64), (6, 4096), (8, 46), (4, 160)])
@pytest.mark.parametrize("group", [32, 128])
def test_a_product_of_nibbles(shape: tuple[int, int], group: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randint(-126, 127, (shape[1],)).float() / 8
    x[::32] = 127 / 8  # the range of a block: no number of it is rounded
    x[32:64] = -127 / 8
    stored = int4.quantize(weight, group)
    stored.values[0] = torch.where(x[0::2] > 0, 0xFF, 0x00)  # the largest sums, of both halves of the words
    stored.values[shape[0] // 2] = 0xFF
    stored.values[1] = 0x0F
    check(NibbleRows(group), NibbleProduct(group), x, stored, int4.dequantize(stored, group))
    stored, x = int4.quantize(weight, group), torch.randn(shape[1])
    exact, packed = int4.dequantize(stored, group) @ x, NibbleRows(group).load(stored)
    assert (times(NibbleProduct(group), x, packed) - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_nibbles_fit_into_16_bits(sign: int) -> None:
    stored, x = int4.quantize(torch.randn(8, 512), 32), torch.full((512,), sign * 127 / 8)
    stored.values[:4], stored.values[4:] = 0x00, 0xFF  # both outputs of a word
    stored.values[::2] ^= 0xFF
    check(NibbleRows(32), NibbleProduct(32), x, stored, int4.dequantize(stored, 32))


def test_nibbles_are_not_compiled_where_their_loops_would_be_no_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(quantization.choose("int4 rows"), NibbleRows)
    monkeypatch.setattr(quantization.nibbles, "short_loops", lambda: False)
    quantization.choose.cache_clear()
    experts, dense = quantization.choose("int4 rows"), quantization.choose("int8 rows")
    quantization.choose.cache_clear()
    assert experts is not None and dense is not None
    packing = Packing("int4", MatricesKernel(experts, functional.silu), dense, compiled=True)
    assert form_of(DbrxConfig(), packing, experts=True).experts is None


def check(
    kernel: MatrixKernel, product: Product, x: Tensor, stored: QuantizedMatrix, meant: Tensor, lone: float = 1e-5
) -> None:
    """A kernel's matrix, by a compiled product and by its own, of several rows. lone: how near the first has to be."""
    exact = meant.double() @ x.double()
    packed = kernel.load(stored)
    example = product.example(*meant.shape, torch.float32)
    assert [(part.shape, part.dtype) for part in packed] == [(part.shape, part.dtype) for part in example]
    assert (times(product, x, packed) - exact).abs().max() < lone * exact.abs().max()
    rows, several = (torch.stack((row, -row, 2 * row)) for row in (x, exact))
    near = 0.01 if multiplies_bfloat16() else 1e-5
    assert (kernel.run(kernel.prepare(rows), packed) - several).abs().max() < near * several.abs().max()


@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_attention_of_a_lone_token(tokens: int) -> None:
    torch.manual_seed(0)
    q, (keys, values) = 3 * torch.randn(6, 8), torch.randn(2, 2, tokens, 8)
    exact = scaled_dot_product_attention(q.view(2, 3, 8).double(), keys.double(), values.double())
    torch.testing.assert_close(attend(q, keys, values).double(), exact.view(6, 8), rtol=1e-5, atol=1e-5)
