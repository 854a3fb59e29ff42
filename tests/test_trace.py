"""`dbrx trace`: what is recorded against the network's own outputs, the figures against brute force, the picture
against routing that was planted."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dbrx_cli.commands.trace import describe
from dbrx_cli.render import routing
from model import AutoTokenizer, DbrxConfig, DbrxForCausalLM
from model.bpe import cl100k_vocabulary
from model.tokenizer import Tokenizer
from model.trace import Trace, entropy, hit_rates, layer_hit_rates, lookahead, record, reuse, usage, whole_hit_rates
from tests.cli import Cli
from tests.conftest import TINY

TEXT = "In 1969, 2 people walked on the Moon; 600000000 watched!"
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;b&gt;"
DIGITS, WORDS, SIGNS, SPECIAL = range(4)


def kind_of(piece: str) -> int:
    """The class that the planted router sees in a token."""
    if re.fullmatch(r"<\|.*\|>", piece):
        return SPECIAL
    if re.fullmatch(r"[0-9]+", piece):
        return DIGITS
    return WORDS if re.fullmatch(r"[ ]?[A-Za-z]+", piece) else SIGNS


def planted_experts(kind: int, layer: int) -> list[int]:
    """Four experts a class, moved on by one a layer; the heaviest first."""
    return [(4 * kind + place + layer) % 16 for place in range(4)]


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose blocks change nothing, so that each router sees the token's class and nothing else."""
    network = DbrxForCausalLM(DbrxConfig.from_dict(TINY)).eval()
    tokenizer = Tokenizer(cl100k_vocabulary())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.zero_()
            assert parameter.dim() > 1 or "norm" in name
        pieces = [tokenizer.decode_bytes(token).decode("utf-8", "replace") for token in range(tokenizer.vocab_size)]
        kinds = torch.tensor([kind_of(piece) for piece in pieces])
        network.transformer.wte.weight[torch.arange(len(kinds)), kinds] = 1.0
        for layer, block in enumerate(network.transformer.blocks):
            for kind in range(4):
                for place, expert in enumerate(planted_experts(kind, layer)):
                    block.ffn.router.layer.weight[expert, kind] = 0.1 * (4 - place)
    folder = tmp_path_factory.mktemp("planted")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def planted_trace(planted: Path) -> tuple[Trace, list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(planted)
    ids = tokenizer.encode_segments(tokenizer.chat_template.segments([], add_generation_prompt=True))
    ids = [*ids, *tokenizer.encode(TEXT)]
    return record(DbrxForCausalLM.from_pretrained(planted), ids), [tokenizer.decode(i) for i in ids]


def fake(chosen: Any, n_experts: int) -> Trace:
    ids = np.asarray(chosen, np.int16)
    weights = np.full(ids.shape, 1 / ids.shape[2], np.float32)
    return Trace(tuple(range(ids.shape[1])), ids, weights, ids[:-1], n_experts, 100)


def test_what_is_recorded_is_what_the_network_says(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    ids = [(i * 7919) % 100_000 for i in range(530)]  # more than one step of the prefill
    trace = record(network, ids)
    with torch.no_grad():
        routers = network.transformer(torch.tensor([ids]), output_router_logits=True).router_logits
    assert routers is not None
    assert trace.ids == tuple(ids) and (trace.n_layers, trace.n_experts, trace.top_k) == (3, 16, 4)
    assert trace.expert_bytes == 4 * 3 * 40 * 48
    in_bytes = DbrxForCausalLM.from_pretrained(tiny_checkpoint, quantize="int8")
    assert 3 * 40 * 48 < record(in_bytes, ids[:9]).expert_bytes < 2 * 3 * 40 * 48  # and scales
    for layer, probabilities in enumerate(routers):
        best = probabilities.topk(4)
        weights = best.values / best.values.sum(-1, keepdim=True)
        assert np.abs(trace.router_weights[layer] - weights.numpy()).max() < 1e-5
        clear = (probabilities.topk(5).values.diff().abs() > 1e-6).all(-1).numpy()  # no ties within rounding
        assert clear.mean() > 0.9 and (trace.expert_ids[layer] == best.indices.numpy())[clear].all()


def test_what_is_foreseen_is_what_the_next_router_makes_of_this_state(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    ids = [(i * 7919) % 100_000 for i in range(40)]
    states: list[Any] = []
    hooks = [b.ffn.register_forward_pre_hook(lambda _, x: states.append(x[0][0])) for b in network.transformer.blocks]
    with torch.no_grad():
        network(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        scores = [states[i] @ network.transformer.blocks[i + 1].ffn.router.layer.weight.T for i in range(2)]
    trace = record(network, ids)
    found = 0
    for layer, rows in enumerate(scores):
        for token, row in enumerate(rows):
            best = set(row.argsort(descending=True)[:4].tolist())
            assert set(trace.foreseen[layer, token].tolist()) == best
            found += len(best & set(trace.expert_ids[layer + 1, token].tolist()))
    assert lookahead(trace).mean() == pytest.approx(found / (2 * 40 * 4))
    assert lookahead(fake([[[0, 1]], [[1, 2]], [[1, 2]]], 4)).tolist() == [0.5, 1.0]


def test_recording_leaves_no_hook(tiny_checkpoint: Path) -> None:
    network = DbrxForCausalLM.from_pretrained(tiny_checkpoint)
    record(network, [1, 2, 3])
    with pytest.raises(ValueError):
        record(network, [])
    assert not any(module._forward_hooks for module in network.modules())


traces = st.integers(2, 7).flatmap(
    lambda n: st.integers(1, n).flatmap(
        lambda k: st.lists(
            st.lists(st.permutations(range(n)).map(lambda p: p[:k]), min_size=6, max_size=6), min_size=1, max_size=3
        ).map(lambda chosen: fake(chosen, n))
    )
)


def lru(requests: list[int], size: int) -> float:
    """Hit rate of a cache that is really kept."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for each in requests:
        hits += each in held
        held[each] = None
        held.move_to_end(each)
        if len(held) > size:
            held.popitem(last=False)
    return hits / len(requests)


@settings(max_examples=60)
@given(trace=traces)
def test_figures_against_brute_force(trace: Trace) -> None:
    for layer in range(trace.n_layers):
        tokens = [set(map(int, token)) for token in trace.expert_ids[layer]]
        shares = [sum(e in token for token in tokens) / len(tokens) for e in range(trace.n_experts)]
        assert usage(trace)[layer] == pytest.approx(shares)
        parts = [share / sum(shares) for share in shares if share]
        assert entropy(usage(trace))[layer] == pytest.approx(-sum(p * math.log2(p) for p in parts))
        overlaps = [len(a & b) / trace.top_k for a, b in itertools.pairwise(tokens)]
        assert reuse(trace.expert_ids)[layer] == pytest.approx(sum(overlaps) / len(overlaps))
        requests = [int(e) for token in trace.expert_ids[layer] for e in token]
        expected = [lru(requests, size) for size in range(trace.n_experts + 1)]
        assert layer_hit_rates(trace)[layer] == pytest.approx(expected)
    whole = [
        layer * trace.n_experts + int(e)
        for token in range(trace.expert_ids.shape[1])
        for layer in range(trace.n_layers)
        for e in trace.expert_ids[layer, token]
    ]
    assert whole_hit_rates(trace) == pytest.approx([lru(whole, s) for s in range(trace.n_layers * trace.n_experts + 1)])


def test_figures_at_the_edges() -> None:
    one = fake([[[0, 1]]], 4)
    assert reuse(one.expert_ids) == [0] and entropy(usage(one)) == [1] and hit_rates([], 3).tolist() == [0, 0, 0, 0]
    everything = fake([[[0, 1], [1, 0]]], 2)
    assert not everything.chooses and reuse(everything.expert_ids) == [1]


def test_planted_routing_is_recorded(planted_trace: tuple[Trace, list[str]]) -> None:
    trace, pieces = planted_trace
    assert {kind_of(piece) for piece in pieces} == {DIGITS, WORDS, SIGNS, SPECIAL}
    for layer in range(3):
        assert trace.expert_ids[layer].tolist() == [planted_experts(kind_of(piece), layer) for piece in pieces]


def drawn(trace: Trace, width: int, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, legacy_windows=False, **options).print(routing.heat_map(trace))
    return out.getvalue()


def test_the_terminals_map_shows_what_was_planted(planted_trace: tuple[Trace, list[str]]) -> None:
    trace, pieces = planted_trace
    kinds = [kind_of(piece) for piece in pieces]
    head, *lines = drawn(trace, 100).splitlines()
    assert head.split() == ["layer", *map(str, range(16)), "used", "reuse"]
    for layer in range(3):
        cells = [lines[layer][6 + 4 * e : 10 + 4 * e].strip() for e in range(16)]
        for expert in range(16):
            share = sum(expert in planted_experts(kind, layer) for kind in kinds) / len(kinds)
            assert cells[expert] == f"{share * 100:.0f}"
    coloured = drawn(trace, 100, force_terminal=True, color_system="truecolor")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()[:4] == [head, *lines[:3]]
    # The expert of the commonest class is the brightest, those of a rare class darker, in this layer's row.
    row = re.findall(r"48;2;(\d+);(\d+);(\d+)m", coloured.splitlines()[1])
    bright = [sum(map(int, cell)) for cell in row]
    commonest = max(range(4), key=kinds.count)
    assert len(row) == 16 and bright.index(max(bright)) in planted_experts(commonest, 0)


@pytest.mark.parametrize("experts", [4, 16, 64, 300])
@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_the_map_fits_every_terminal(experts: int, colour: str | None) -> None:
    rng = np.random.default_rng(0)
    trace = fake([[rng.permutation(experts)[:3] for _ in range(9)] for _ in range(12)], experts)
    for width in range(40, 201, 20):
        lines = drawn(trace, width, force_terminal=bool(colour), color_system=colour).splitlines()
        plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
        assert all(len(line) <= width for line in plain) and len(plain) == 14
        assert len({len(line) for line in plain[:-1]}) == 1
        assert colour or "\x1b" not in "".join(lines)


def test_shades_where_there_are_no_colours(planted_trace: tuple[Trace, list[str]]) -> None:
    assert set("░█") & set(drawn(planted_trace[0], 50)) and "█" not in drawn(planted_trace[0], 50, force_terminal=True)
    assert "█" in drawn(planted_trace[0], 50, force_terminal=True, no_color=True)


def test_json_as_documented(cli: Cli, planted: Path) -> None:
    result = cli("trace", "-m", planted, "--raw", "--json", "-n", "2", TEXT)
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    page = (Path(__file__).parent.parent / "docs" / "trace.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert set(values) == documented
    tokens = values["tokens"]
    assert "".join(t["text"] for t in tokens if t["part"] == "prompt") == TEXT
    assert sum(t["part"] == "reply" for t in tokens) == 2
    shape = (3, len(tokens), 4)
    assert np.shape(values["chosen"]) == np.shape(values["weights"]) == shape
    assert np.shape(values["usage"]) == (3, 16) and np.shape(values["hit_rate"]["layer"]) == (3, 17)
    assert np.shape(values["hit_rate"]["whole"]) == (49,) and len(values["entropy_bits"]) == len(values["reuse"]) == 3
    assert np.allclose(np.sum(values["weights"], -1), 1, atol=1e-3)
    assert np.allclose(np.sum(values["usage"], -1), 4, atol=1e-3)


def test_the_command_line(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = cli("trace", "-m", tiny_checkpoint, stdin="hello [bold]there\n")
    assert result.code == 0 and result.err == ""
    assert "4 of 16 experts a token" in result.out and "cache of 24" in result.out
    page = tmp_path / "page.html"
    result = cli("trace", "-m", tiny_checkpoint, "--html", page, HOSTILE)
    assert (result.code, result.out) == (0, "") and str(page) in result.fault
    for args, code, word in (
        (["--html", tmp_path / "no" / "x.html", "hi"], 2, "--html"),
        (["--raw", "-s", "x", "hi"], 2, "--raw"),
        ([""], 2, "no prompt"),
        (["-n", "10000", "hi"], 6, "context"),
    ):
        result = cli("trace", "-m", tiny_checkpoint, *args)
        assert result.code == code and word in result.fault


def test_a_model_that_uses_all_experts_is_said_to_choose_nothing(cli: Cli, tmp_path: Path) -> None:
    ffn = {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 4}
    DbrxForCausalLM(DbrxConfig.from_dict({**TINY, "ffn_config": ffn})).save_pretrained(tmp_path)
    result = cli("trace", "-m", tmp_path, "hello")
    assert result.code == 0 and "every token uses all 4 experts" in result.out
    result = cli("trace", "-m", tmp_path, "--json", "hello")
    assert "every token uses all 4 experts" in result.fault and json.loads(result.out)["top_k"] == 4


def page_of(trace: Trace, tokenizer: Tokenizer) -> str:
    return routing.html_page(routing.to_dict(trace, describe(tokenizer, trace.ids, 5), HOSTILE, None))


def test_the_page_asks_for_nothing_and_holds_no_markup_of_others(planted_trace: tuple[Trace, list[str]]) -> None:
    tokenizer = Tokenizer(cl100k_vocabulary())
    ids = tokenizer.encode(HOSTILE + "\u2028<!-- @script-hash@")
    page = page_of(fake(np.zeros((2, len(ids), 1)), 4), tokenizer)
    assert "owned'</" not in page and "<img" not in page and 'onerror="' not in page and "<!--" not in page
    assert page.count("<script") == 2 and "default-src 'none'" in page and "@" not in page.split("<script")[0][:900]
    page = re.sub(r"<script id.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|url\(|https?://(?!www\.w3\.org/2000/svg)|fetch\(|import ", page)


# What a person does with the page, and what they see then; added to a copy of it, whose policy is taken out.
DRIVER = """
<script>
const pixel = (canvas, x, y) => {
  const scale = canvas.width / parseFloat(canvas.style.width);
  return [...canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data].join();
};
const swatch = expert => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour(expert);
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].join();
};
const seen = {top: [], lit: [], usage: []};
const swatches = Array.from({length: experts}, (_, expert) => swatch(expert));
for (let layer = 0; layer < layers; layer++)
  seen.top.push(tokens.map((_, t) => swatches.indexOf(pixel($("map"), LEFT + across * t + 2, TOP + down * layer + 1))));
for (let layer = 0; layer < layers; layer++)
  seen.usage.push(Array.from({length: experts}, (_, e) => +pixel($("usage"), LEFT + 34 * e + 4, TOP + 22 * layer + 4)
    .split(",")[3]));
$("map").focus();
const press = key => $("map").dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
["End", "ArrowLeft", "ArrowDown"].forEach(press);
seen.keys = [state.token, state.layer, $("details").textContent];
const box = $("map").getBoundingClientRect();
$("map").dispatchEvent(new MouseEvent("mousemove",
  {clientX: box.left + LEFT + across * 3 + 2, clientY: box.top + TOP + down * 2 + 2, bubbles: true}));
seen.hover = [state.token, state.layer, $("details").textContent];
$("experts").children[5].click();
seen.lit = tokens.map((_, t) => +pixel($("map"), LEFT + across * t + 2, TOP + 2).split(",")[3] > 0);
seen.heading = $("colouring").textContent;
press("Escape");
seen.cleared = state.expert === null;
seen.text = [...$("text").children].map(span => span.textContent).join("");
seen.dark = getComputedStyle(document.body).backgroundColor;
document.body.append(make("pre", JSON.stringify(seen), "seen"));
</script>
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    return found


def browse(chromium: str, page: Path, *flags: str) -> str:
    """The document after its scripts ran."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*command, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.slow
def test_the_page_shows_what_was_planted(chromium: str, planted_trace: tuple[Trace, list[str]], tmp_path: Path) -> None:
    trace, pieces = planted_trace
    page = page_of(trace, Tokenizer(cl100k_vocabulary()))
    driven = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", DRIVER + "</body>")
    (tmp_path / "driven.html").write_text(driven, "utf-8")
    looks = {}
    for scheme, flag in (("dark", "0"), ("light", "1")):
        dom = browse(chromium, tmp_path / "driven.html", f"--blink-settings=preferredColorScheme={flag}")
        found = re.search(r'<pre class="seen">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-500:]
        looks[scheme] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    seen = looks["light"]
    kinds = [kind_of(piece) for piece in pieces]
    assert seen["top"] == [[planted_experts(kind, layer)[0] for kind in kinds] for layer in range(3)]
    for layer in range(3):
        used = {e for kind in kinds for e in planted_experts(kind, layer)}
        assert {e for e, alpha in enumerate(seen["usage"][layer]) if alpha} == used
    last = len(pieces) - 1
    assert seen["keys"][:2] == [last - 1, 1] and f"Token {last - 1}, layer 1" in seen["keys"][2]
    assert seen["hover"][:2] == [3, 2] and f"expert {planted_experts(kinds[3], 2)[0]}" in seen["hover"][2]
    assert seen["lit"] == [5 in planted_experts(kind, 0) for kind in kinds]
    assert "expert 5" in seen["heading"] and seen["cleared"] and seen["text"] == "".join(pieces)
    assert looks["dark"]["dark"] != seen["dark"] and looks["dark"]["top"] == seen["top"]


@pytest.mark.slow
def test_no_script_in_the_text_runs(chromium: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(cl100k_vocabulary())
    ids = tokenizer.encode(HOSTILE)
    trace = fake(np.zeros((2, len(ids), 1)), 4)
    page = page_of(Trace(tuple(ids), trace.expert_ids, trace.router_weights, trace.expert_ids[:-1], 4, 1), tokenizer)
    (tmp_path / "page.html").write_text(page, "utf-8")
    dom = browse(chromium, tmp_path / "page.html")
    assert "<title>Routing: &lt;/script&gt;" in dom and "<img" not in dom and dom.count("<script") == 2
    # Even where markup got into the page, its policy would stop it: this script is put in and must not run.
    (tmp_path / "pierced.html").write_text(page.replace("</body>", "<script>document.title = 'owned'</script></body>"))
    dom = browse(chromium, tmp_path / "pierced.html")
    assert "<title>Routing:" in dom and "<title>owned" not in dom
