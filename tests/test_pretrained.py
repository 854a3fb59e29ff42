"""The examples of the model's documentation, with `from model import ...`; saving, casting and placing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import AutoTokenizer, DbrxConfig, DbrxForCausalLM
from model.absent import ABSENT
from model.attention import BACKENDS, Backend
from model.attention.flash import FlashAttention
from model.bpe import cl100k_vocabulary
from model.errors import ModelError, ResourceError
from model.formats import open_weights
from model.formats.write_checkpoint import write_checkpoint
from model.tokenizer import Tokenizer
from tests import fidelity, flash_stand_in
from tests.cli import Cli
from tests.gguf_files import write_gguf
from tests.weights import make_checkpoint

torch.set_num_threads(1)


SNIPPETS: dict[str, dict[str, str]] = {
    "standard": {},
    "flash": {"attn_implementation": "flash_attention_2"},
    "sdpa": {"attn_implementation": "sdpa"},
}


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.parametrize("kind", ["tiny", pytest.param("demo", marks=pytest.mark.soak)])
def test_the_three_snippets(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """As documented, with a small model and the CPU in the card's place, and flash-attn's functions by hand."""
    stand_in = Backend(lambda: FlashAttention(flash_stand_in), lambda device, dtype: None)  # type: ignore[arg-type]
    monkeypatch.setitem(BACKENDS, "flash", stand_in)
    ID, DEVICE = str(request.getfixturevalue(f"{kind}_checkpoint")), "cpu"

    tokenizer = AutoTokenizer.from_pretrained(ID, token="YOUR_HF_TOKEN")
    model = DbrxForCausalLM.from_pretrained(
        ID, device_map="auto", torch_dtype=torch.bfloat16, token="YOUR_HF_TOKEN", **SNIPPETS[name]
    )
    input_text = "What is the capital of France? Answer briefly."
    messages = [{"role": "user", "content": input_text}]
    input_ids = tokenizer.apply_chat_template(
        messages, return_dict=True, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    ).to(DEVICE)
    outputs = model.generate(**input_ids, max_new_tokens=8)  # documented are 200
    text = tokenizer.decode(outputs[0])

    assert input_text in text and text.count("<|im_start|>") >= 2 and (kind == "tiny" or "Paris" in text)
    assert outputs.shape[1] <= input_ids.input_ids.shape[1] + 8
    # flash comes first where it runs.
    assert model.transformer.attention == ("sdpa" if name == "sdpa" else "flash") and model.dtype == torch.bfloat16


def test_the_documented_prompt_without_a_template(checkpoint: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("Hey, are you conscious? Can you talk to me?", return_tensors="pt")
    generate_ids = model.generate(inputs.input_ids, max_length=16)
    (text,) = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.startswith("Hey, are you conscious? Can you talk to me?") and generate_ids.shape[1] <= 16


def test_a_padded_batch_of_texts(checkpoint: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = ["One.", "A somewhat longer text, with more tokens than the first one has.", "سلام"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=[])
    for row, text in enumerate(texts):
        alone = model.generate(
            tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=4, do_sample=False, eos_token_id=[]
        )
        assert torch.equal(together[row, -4:], alone[0, -4:])


def test_flash_where_there_is_no_gpu_says_why(tiny_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="needs an NVIDIA GPU"):
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="flash_attention_2")


def test_a_device_that_is_not_there_is_a_clear_error(tiny_checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), {"": "cuda"}):
        with pytest.raises(ModelError, match="no device 'cuda"):
            DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map=device)
    encoded = AutoTokenizer.from_pretrained(tiny_checkpoint)("hi", return_tensors="pt")
    with pytest.raises(ModelError, match="cuda"):
        encoded.to("cuda")


def test_the_cpu_by_its_number_is_the_cpu(tiny_checkpoint: Path) -> None:
    for device in ("cpu:0", torch.device("cpu", 0)):
        network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map=device, quantize="int8")
        assert network.load_plan is not None and network.load_plan.scheme == "int8"
        assert {*network.load_plan.device_map.values()} == {"cpu"}


def test_loading_gives_the_weights_in_their_dtype_or_cast(tmp_path: Path) -> None:
    facts = fidelity.GOLDEN["like_dbrx"]
    folder = make_checkpoint(tmp_path, facts["config"], facts["seed"], dtype="bfloat16", shards=3)
    expected = fidelity.load("like_dbrx").network.state_dict()
    for asked, dtype in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        network = DbrxForCausalLM.from_pretrained(folder, dtype=asked)
        assert network.dtype == dtype and not network.training
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor.float(), expected[name]), name


def test_experts_stay_a_map_of_the_file(tmp_path: Path) -> None:
    """Pages of the file, not copies: what lies between two tensors in memory is what lies between them on disk."""
    facts = fidelity.GOLDEN["like_dbrx"]
    folder = make_checkpoint(tmp_path, facts["config"], facts["seed"], shards=1)
    network = DbrxForCausalLM.from_pretrained(folder)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    entries = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header])
    state = network.state_dict()
    names = [name for name in state if ".mlp." in name]
    first = names[0]
    for name in names:
        apart = entries[name]["data_offsets"][0] - entries[first]["data_offsets"][0]
        assert state[name].data_ptr() - state[first].data_ptr() == apart


def test_saved_and_loaded_again_is_the_same(tmp_path: Path) -> None:
    network = fidelity.load("two_to_one").network
    network.save_pretrained(tmp_path, max_shard_size=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    again = DbrxForCausalLM.from_pretrained(tmp_path)
    assert again.config == network.config
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_first_logits_after_loading_are_the_references(tmp_path: Path) -> None:
    """The whole way of a checkpoint: written, checked, mapped, run."""
    case = fidelity.load("gelu")
    folder = make_checkpoint(tmp_path, case.facts["config"], case.facts["seed"], shards=4)
    with torch.no_grad():
        logits = DbrxForCausalLM.from_pretrained(folder, device_map="auto")(case.data["input_ids"][None]).logits
    assert logits is not None
    assert fidelity.distance(logits[0, case.data["positions"]], case.data["logits"]) < 1e-4


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that a checkpoint's reader opened, in order."""
    names: list[str] = []
    real = os.open

    def listen(path: str | Path, *args: int, **options: int) -> int:
        names.append(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", listen)
    return names


@pytest.mark.parametrize("form", ["floats", "int8", "split"])
def test_loading_opens_the_configuration_once(
    form: str, small_checkpoint: Path, tmp_path: Path, cli: Cli, openings: list[str]
) -> None:
    folder = shutil.copytree(small_checkpoint, tmp_path / "m")
    (folder / "generation_config.json").unlink()  # then the end ids are those of config.json
    if form == "int8":
        assert cli("quantize", folder, tmp_path / "int8", "--to", "int8").code == 0
        folder = tmp_path / "int8"
        (folder / "generation_config.json").unlink()
    if form == "split":
        parts = load_file(folder / "model.safetensors")
        for name in [name for name in parts if "Wqkv" in name]:
            for letter, rows in zip("qkv", parts.pop(name).split((96, 16, 16)), strict=True):
                parts[name.replace("Wqkv", f"{letter}_proj")] = rows.clone()
        save_file(parts, folder / "model.safetensors")
    openings.clear()
    DbrxForCausalLM.from_pretrained(folder)
    assert openings.count("config.json") == 1

    openings.clear()
    assert cli("generate", "-m", folder, "-n", "1", "hi").code == 0
    assert openings.count("config.json") == 1 == openings.count("tokenizer.json")


def test_a_model_that_does_not_fit_is_not_begun(tiny_checkpoint: Path) -> None:
    with pytest.raises(ResourceError, match=r"0\.0 GB in bfloat16") as caught:
        DbrxForCausalLM.from_pretrained(tiny_checkpoint, device_map="auto", max_memory={"cpu": "1MB"})
    assert caught.value.exit_code == 5


def test_casting_a_network_keeps_its_rotary_angles_exact() -> None:
    """Angles are computed in float32 at each step, so `.to(bfloat16)` has nothing to round."""
    case = fidelity.load("like_dbrx")
    assert not list(case.network.buffers())


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    facts = fidelity.GOLDEN["deep"]
    folder = make_checkpoint(tmp_path, facts["config"], facts["seed"], shards=1)
    canary = tmp_path / "canary"
    (folder / "modeling_dbrx.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DbrxForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not canary.exists()


METHODS = json.loads((Path(__file__).parent / "data" / "transformers_methods.json").read_text())


@pytest.mark.parametrize("kind", METHODS)
def test_each_method_of_transformers_is_here_or_says_what_to_do(kind: str) -> None:
    ours = {
        "DbrxConfig": DbrxConfig(),
        "DbrxForCausalLM": fidelity.load("deep").network,
        "Tokenizer": Tokenizer(cl100k_vocabulary()),
    }[kind]
    elsewhere = {"from_pretrained"} if kind == "Tokenizer" else set()  # of AutoTokenizer
    for name in METHODS[kind]:
        if name in elsewhere or hasattr(ours, name):
            continue
        with pytest.raises(AttributeError, match=f"{kind} has no '{name}'; instead: "):
            getattr(ours, name)
    with pytest.raises(AttributeError, match=f"{kind} has no 'other'$"):
        ours.other  # type: ignore[attr-defined]  # noqa: B018


def test_the_page_has_every_method() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    for _, names, instead in ABSENT:
        assert f"| {' '.join(f'`{name}`' for name in names.split())} | {instead} |" in page
    for names in METHODS.values():
        assert all(f"`{name}`" in page for name in names)


def test_a_config_by_itself(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = DbrxConfig.from_pretrained(tiny_checkpoint)
    assert config == DbrxForCausalLM.from_pretrained(tiny_checkpoint).config
    assert DbrxConfig.from_dict(json.loads(config.to_json_string())) == config
    config.to_json_file(tmp_path / "c.json")
    assert DbrxConfig.from_json_file(tmp_path / "c.json") == DbrxConfig.from_dict(config.to_dict()) == config
    assert DbrxConfig.from_pretrained(str(tiny_checkpoint), n_layers=2) == replace(config, n_layers=2)
    gguf = write_gguf(tmp_path / "m.gguf", "f32")
    assert DbrxConfig.from_pretrained(gguf).vocab_size == DbrxForCausalLM.from_pretrained(gguf).config.vocab_size
    with pytest.raises(TypeError, match="n_layer"):
        DbrxConfig.from_pretrained(tiny_checkpoint, n_layer=2)


def test_parts_and_size_of_a_network() -> None:
    network = fidelity.load("deep").network
    assert (
        network.get_input_embeddings() is network.transformer.wte and network.get_output_embeddings() is network.lm_head
    )
    assert network.num_parameters() == sum(p.numel() for p in network.parameters())
    network.set_attn_implementation("sdpa")
    assert network.transformer.attention == "sdpa"


@pytest.mark.reference
@pytest.mark.parametrize("variable", ["TRANSFORMERS_4", "TRANSFORMERS_5"])
def test_transformers_computes_from_what_is_written(variable: str, tmp_path: Path) -> None:
    """Needs TRANSFORMERS_4 and TRANSFORMERS_5: interpreters that have transformers 4.57.6, and 5.24.0 or newer.

    The models have bases 500000 and 10000, with a clip and without, and are written by both writers.
    """
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no interpreter")
    asked, golden = [], []
    for name in ("like_dbrx", "two_to_one", "deep", "one_kv_head"):
        case, folder = fidelity.load(name), tmp_path / name
        case.network.save_pretrained(folder)
        with open_weights(folder) as weights:
            write_checkpoint(weights, tmp_path / f"{name}-converted", torch.float32, lambda _: None)
        kept = case.data["positions"] < 60
        for written in (folder, tmp_path / f"{name}-converted"):
            asked.append([str(written), case.data["input_ids"][:60].tolist()])
            golden.append((case.data["positions"][kept], case.data["logits"][kept]))
    script = Path(__file__).parent / "reference" / "transformers_logits.py"
    command = [os.environ[variable], str(script)]
    ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=300)
    for logits, (positions, expected) in zip(json.loads(ran.stdout.splitlines()[-1]), golden, strict=True):
        assert fidelity.distance(torch.tensor(logits)[positions], expected) < 1e-4
