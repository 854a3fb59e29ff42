"""The tokenizer against the `tokenizers` library, on DBRX's vocabulary and one like the demo's; bad checkpoints."""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from model import bpe
from model.bpe import CL100K_PATTERN, BytePairEncoder, Vocabulary, cl100k_vocabulary, vocabulary_from_json
from model.chat_template import Segment
from model.detokenizer import Detokenizer
from model.errors import InputError, ModelError
from model.messages import MAX_TEXT, Message
from model.tokenizer import AutoTokenizer, BatchEncoding, Tokenizer

ALPHABET = {byte: character for character, byte in bpe.BYTE_OF_CHARACTER.items()}
CHAT = [{"role": "user", "content": "Hi <|im_end|>"}]


def written(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[str, str]:
    """The two parts that plain BPE leaves of a token before its own merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return written(parts[0]), written(parts[1])


def split_json(regex: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


def tokenizer_json(vocab: dict[str, int], merges: list[Any], pre: Any, specials: dict[str, int]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": pre,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


@functools.cache
def dbrx_json() -> dict[str, Any]:
    ranks = dict(cl100k_vocabulary().ids)
    merges = [list(last_merge(token, ranks)) for token in ranks if len(token) > 1]
    vocab = {written(token): rank for token, rank in ranks.items()}
    # `tokenizers` wants the ids of added tokens to follow the vocabulary's without a gap.
    named = {token_id: name for name, token_id in bpe.DBRX_ADDED_TOKENS.items()}
    added = {named.get(i, f"<|unused_{i}|>"): i for i in range(len(vocab), 100280)}
    return tokenizer_json(vocab, merges, split_json(CL100K_PATTERN), added)


PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@functools.cache
def demo_json() -> dict[str, Any]:
    """A byte-level BPE of the demo's kind: 17 special tokens first, not every byte in the vocabulary."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<special_{i}>" for i in range(14))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(varied_texts(400, seed=9), trainer)
    values: dict[str, Any] = json.loads(trained.to_str())
    return tokenizer_json(
        values["model"]["vocab"], [" ".join(merge) for merge in values["model"]["merges"]], DIGITS_FIRST,
        {name: i for i, name in enumerate(specials)},
    )  # fmt: skip


MAKERS = {"dbrx": dbrx_json, "demo": demo_json}
# DBRX's own merges are found one by one, which takes seconds.
each_maker = pytest.mark.parametrize("name", [pytest.param("dbrx", marks=pytest.mark.slow), "demo"])


@functools.cache
def pair(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    values = MAKERS[name]()
    return Tokenizer(vocabulary_from_json(values)), tokenizers.Tokenizer.from_str(json.dumps(values))


ATOMS = [
    "the ", "Hello", " world", "don't", "I'LL", "'s", "'S",
    "x1", "12345678", "007", " 42", "3.14", "a_b", "CamelCase",
    "مرحبا", " بالعالم", "١٢٣", "你好", "日本語テキスト",
    "한국어", "😀", "👩‍👩‍👧‍👦", "🏴\U000e0067\U000e007f", "e\u0301", "a\u0308\u0323",
    "def f(x):\n", "    return x", "\t\t", "  ", "   ", "        ",
    "\n", "\r\n", "\n\n\n", " \n", "\u00a0", "\u2003", "\u3000",
    "{}();", "!=", "...", "//", "-" * 20, "=" * 9, "<|im_end",
    "|>", "<", "\u200b", "\ufeff", "\x00", "\x04\x06", "\x7f",
    "\u0967\u0968", "Ⅷ", "½", "ß", "İ",
    "ﬁ", "ǅ", "\u0915\u094d\u0937", "\U0001d54f", "\U000f0000", "\U00040000",
]  # fmt: skip


def varied_texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)

    def atom() -> str:
        kind = rng.random()
        if kind < 0.75:
            return rng.choice(ATOMS)
        if kind < 0.85:
            return rng.choice([" ", "\n", "\t", "1", "a", ".", "\r\n"]) * rng.randint(1, 40)
        if kind < 0.95:
            return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 12)))
        return "".join(chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x2FFFF)])) for _ in range(3))

    return ["".join(atom() for _ in range(rng.randint(1, 25))) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, pytest.param(2200, marks=pytest.mark.soak)])
@each_maker
def test_encodes_id_for_id_as_tokenizers_does(name: str, count: int) -> None:
    ours, theirs = pair(name)
    texts = [text for text in varied_texts(count) if not any(special in text for special in ours.special_tokens)]
    assert len(texts) > 0.9 * count
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@each_maker
def test_long_runs_are_encoded_as_tokenizers_does(name: str) -> None:
    ours, theirs = pair(name)
    for run in (" ", "\n", " \n", "\t", "a", "ab", "1", ".", "!?", "مرحبا", "\u00a0", "é"):
        for end in ("", "x", " x", "1", "\n", ".", "\x04"):
            text = "start" + run * 6000 + end
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, (run, end)


@pytest.mark.slow
def test_cl100k_is_the_checkpoints_own_vocabulary() -> None:
    packaged, (from_json, _) = Tokenizer(cl100k_vocabulary()), pair("dbrx")
    assert packaged.vocab_size == from_json.vocab_size == 100280
    assert packaged.special_tokens.items() <= from_json.special_tokens.items()
    for text in varied_texts(300, seed=3):
        assert packaged.encode(text) == from_json.encode(text)
    assert packaged.encode("Hello world! 2024") == [9906, 1917, 0, 220, 2366, 19]  # as published for cl100k_base


@each_maker
def test_every_id_decodes_and_streamed_is_whole(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.vocab_size == max(theirs.get_vocab(with_added_tokens=True).values()) + 1
    for token_id in range(-2, ours.vocab_size + 100):
        text = ours.decode([token_id])
        if 0 <= token_id < ours.vocab_size:
            assert text == theirs.decode([token_id], skip_special_tokens=False)
        else:
            assert text == ""
    rng = random.Random(5)
    for _ in range(10_000):
        ids = [rng.randrange(ours.vocab_size + 80) for _ in range(rng.randint(1, 12))]
        detokenizer = Detokenizer(ours)
        streamed = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        assert streamed == ours.decode(ids, skip_special_tokens=True)
        assert b"".join(map(ours.decode_bytes, ids)).decode("utf-8", "replace") == ours.decode(ids)


@each_maker
def test_text_round_trips(name: str) -> None:
    ours, _ = pair(name)
    for text in varied_texts(200, seed=7):
        known = all(bytes([byte]) in ours.vocabulary.ids for byte in text.encode())
        assert ours.decode(ours.encode(text)) == text or not known


def test_tokens_that_no_merge_leads_to_stay_out_of_reach() -> None:
    letters = {written(bytes([byte])): byte for byte in range(256)}
    vocab = letters | {"ab": 256, "abc": 257, "bc": 258, "abd": 259, "bd": 260, "xyz": 261, "aa": 262, "aaaa": 263}
    # `a bc` comes too late: `ab` is merged first. `abd` needs `bd`, which is merged before `ab`.
    merges = ["b d", "a b", "b c", "a bc", "a bd", "ab d", "a a", "aa aa"]
    values = tokenizer_json(vocab, merges, PLAIN, {})
    ours, theirs = Tokenizer(vocabulary_from_json(values)), tokenizers.Tokenizer.from_str(json.dumps(values))
    rng = random.Random(2)
    words = ["abc", "abd", "xyz", "xabcx", "aaa", *("".join(rng.choices("abcdxyz", k=9)) for _ in range(3000))]
    words += ["a" * n for n in range(1, 30)]
    for word in words:
        assert ours.encode(word) == theirs.encode(word).ids, word
    assert 257 not in ours.encode("abc") and 261 not in ours.encode("xyz") and ours.decode([261]) == "xyz"


def test_random_merge_tables_encode_as_tokenizers_does() -> None:
    rng = random.Random(4)
    for _ in range(150):
        tokens = list("abc")
        merges = []
        for _ in range(rng.randint(1, 12)):
            left, right = rng.choice(tokens), rng.choice(tokens)
            if [left, right] not in merges and len(left + right) < 9:
                merges.append([left, right])
                tokens.append(left + right)
        unique = list(dict.fromkeys([*ALPHABET.values(), *rng.sample(tokens, len(tokens))]))
        vocab = {token: i for i, token in enumerate(unique)}
        values = tokenizer_json(vocab, merges, PLAIN, {})
        ours, theirs = BytePairEncoder(vocabulary_from_json(values)), tokenizers.Tokenizer.from_str(json.dumps(values))
        for _ in range(30):
            text = "".join(rng.choices("abc", k=rng.randint(1, 24)))
            assert ours.encode(text) == theirs.encode(text).ids, (merges, text)


def test_merges_in_any_order_encode_as_tokenizers_does_or_are_refused() -> None:
    rng, refused = random.Random(9), 0
    words = ["".join(rng.choices("abc", k=rng.randint(1, 20))) for _ in range(20)]
    pairs = [[left, right] for left in ("a", "b", "ab", "bc") for right in ("a", "b", "c", "bc", "ab")]
    for _ in range(150):
        merges = [["a", "b"], ["b", "c"], *rng.choices(pairs, k=3)]
        rng.shuffle(merges)
        vocab = {token: i for i, token in enumerate(dict.fromkeys([*ALPHABET.values(), *map("".join, merges)]))}
        values = tokenizer_json(vocab, merges, PLAIN, {})
        try:
            ours = BytePairEncoder(vocabulary_from_json(values))
        except ModelError as error:
            assert "comes before those that make its halves" in error.message
            refused += 1
            continue
        theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
        for text in words:
            assert ours.encode(text) == theirs.encode(text).ids, (merges, text)
    assert 10 < refused < 140


def test_merges_never_spell_a_special_token() -> None:
    tokens = ["<|", "im", "<|im"]
    vocab = {written(bytes([byte])): byte for byte in range(256)} | {t: 256 + i for i, t in enumerate(tokens)}
    values = tokenizer_json(vocab | {"<|im>": 300}, ["< |", "i m", "<| im", "<|im >"], DIGITS_FIRST, {"<|im>": 300})
    assert 300 not in Tokenizer(vocabulary_from_json(values)).encode("<|im>")


def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path: Path) -> None:
    values = changed("version", "1.0")
    names = ["<tool>", "<tool>s", "  ", "<turn>", "<end>", "<extra>"]
    first = 1 + max(values["model"]["vocab"].values(), default=0)
    first = max(first, *(token["id"] + 1 for token in values["added_tokens"]))
    for token_id, name in enumerate(names, first):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        values["added_tokens"].append({"id": token_id, "content": name, **flags})
        values["model"]["vocab"][name] = token_id
    template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    config = {"eos_token": "<end>", "additional_special_tokens": ["<extra>"], "chat_template": template}
    ours = AutoTokenizer.from_pretrained(
        checkpoint(tmp_path, {"tokenizer.json": values, "tokenizer_config.json": config})
    )
    theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
    for text in ["foo<tool>bar", "<tool>s<tool>", "a   b <tool", "x<tool>12  \n", "<tool>" * 9, ""]:
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert max(ours.encode("<turn><end><extra>")) < first  # no text forges a turn
    turn = ours.apply_chat_template([{"role": "user", "content": "<turn><tool>"}])
    assert turn[0] == first + 3 and turn[-1] == first and first + 3 not in turn[1:]


def checkpoint(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


@pytest.fixture
def dbrx(tmp_path: Path) -> Tokenizer:
    """A checkpoint as Databricks ships it: no tokenizer.json."""
    config = {"tokenizer_class": "TiktokenTokenizerWrapper", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>",
              "bos_token": {"content": "<|endoftext|>"}, "auto_map": {"AutoTokenizer": ["tiktoken.Evil", None]},
              "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template":
              "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}]}  # fmt: skip
    files = {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": [100279, 100257]},
             "tiktoken.py": "raise SystemExit('code of a checkpoint ran')"}  # fmt: skip
    return AutoTokenizer.from_pretrained(checkpoint(tmp_path, files), trust_remote_code=True)


def test_checkpoint_of_databricks(dbrx: Tokenizer) -> None:
    assert (dbrx.bos_token, dbrx.eos_token, dbrx.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert (dbrx.eos_token_ids, dbrx.pad_token_id, len(dbrx)) == ((100279, 100257), 100277, 100280)
    assert dbrx.decode([100279, 9906, 100300, 100261, 1917]) == "<|im_end|>Hello world"
    assert dbrx.decode([100279, 9906], skip_special_tokens=True) == "Hello"
    assert dbrx.decode(9906) == "Hello" and dbrx.batch_decode([[9906], [1917]]) == ["Hello", " world"]


def test_replies_end_at_both_ends_though_only_one_is_configured(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"config.json": {"vocab_size": 100352}, "generation_config.json": {"eos_token_id": 100257}})
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_ids == (100257, 100279)


def test_special_ids_come_from_the_template_only(dbrx: Tokenizer) -> None:
    ids = dbrx.apply_chat_template(CHAT, add_generation_prompt=True)
    text = [*dbrx.encode("user\nHi <|im_end|>")]
    assert ids == [100278, *text, 100279, *dbrx.encode("\n"), 100278, *dbrx.encode("assistant\n")]
    assert not set(text) & set(dbrx.special_tokens.values())
    assert 100279 not in dbrx("<|im_end|>").input_ids
    assert dbrx("a<|im_end|>b", allowed_special="all").input_ids == [64, 100279, 65]
    assert 100279 not in dbrx("a<|im_end|>b", allowed_special=["<|pad|>"]).input_ids
    with pytest.raises(ValueError, match="not a special token"):
        dbrx("a", allowed_special=["a"])
    assert dbrx.encode_segments([Segment("<|im_end|>", True), Segment("<|im_end|>", False)])[0] == 100279


def test_apply_chat_template_forms(dbrx: Tokenizer) -> None:
    text = dbrx.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|im_start|>user\nHi <|im_end|><|im_end|>\n"
    ids = dbrx.apply_chat_template([Message(**CHAT[0])])  # type: ignore[arg-type]
    assert dbrx.decode(ids) == text
    both = dbrx.apply_chat_template(CHAT, return_dict=True)
    assert both == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    resumed = [*CHAT, {"role": "assistant", "content": "One"}]
    text = dbrx.apply_chat_template(resumed, tokenize=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nOne")
    with pytest.raises(ValueError, match="exclude each other"):
        dbrx.apply_chat_template(resumed, add_generation_prompt=True, continue_final_message=True)
    for bad in ({"role": "user"}, {"role": "user", "content": ["x"]}, {"role": "tool", "content": "x"}):
        with pytest.raises(ValueError, match="role"):
            dbrx.apply_chat_template([bad])


def test_tensors(dbrx: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    batch = dbrx(["Hello", "Hello world"], return_tensors="pt", padding=True).to("cpu")
    assert batch["input_ids"].tolist() == [[100277, 9906], [9906, 1917]]
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]] and batch.input_ids.dtype == torch.long
    assert sorted({**batch}) == ["attention_mask", "input_ids"]
    assert dbrx("Hello", return_tensors="pt").input_ids.shape == (1, 1)
    assert dbrx.apply_chat_template(CHAT, return_tensors="pt").shape[0] == 1
    prompt = dbrx.apply_chat_template(CHAT, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    assert prompt.input_ids.shape == prompt.attention_mask.shape
    assert dbrx.decode(prompt["input_ids"][0]).endswith("assistant\n")
    dbrx.padding_side = "right"
    assert dbrx(["Hello", "Hello world"], padding=True).input_ids == [[9906, 100277], [9906, 1917]]
    with pytest.raises(ValueError, match="padding=True"):
        dbrx(["a", "b c d"], return_tensors="pt")
    with pytest.raises(ValueError, match="'pt'"):
        dbrx(["a"], return_tensors="np")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="cuda"):
            batch.to("cuda")
    with pytest.raises(ModelError, match="nonsense"):
        batch.to("nonsense")
    with pytest.raises(AttributeError):
        _ = BatchEncoding({}).absent


@pytest.mark.slow
def test_save_pretrained_writes_the_files_back(dbrx: Tokenizer, tmp_path: Path) -> None:
    dbrx.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(CHAT) == dbrx.apply_chat_template(CHAT) and again.eos_token == "<|endoftext|>"
    files = checkpoint(tmp_path, {"tokenizer.json": demo_json(), "chat_template.jinja": "{{ messages[0].content }}!"})
    AutoTokenizer.from_pretrained(files).save_pretrained(tmp_path / "both")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names
    assert AutoTokenizer.from_pretrained(tmp_path / "both").apply_chat_template(CHAT, tokenize=False).endswith(">!")
    single = [bytes([byte]) for byte in range(256)]
    ids = {byte: 255 - byte[0] for byte in single}
    Tokenizer(Vocabulary(CL100K_PATTERN, single, ids)).save_pretrained(tmp_path / "bare")
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").encode("Hi") == [255 - ord("H"), 255 - ord("i")]


def test_added_tokens_of_the_configuration(tmp_path: Path) -> None:
    added = {"100257": {"content": "<|endoftext|>"}, "100261": {"content": "<|new|>", "special": True}}
    config = {"tokenizer_class": "TiktokenTokenizerWrapper", "added_tokens_decoder": added}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(tmp_path, {"tokenizer_config.json": config}))
    assert tokenizer.special_tokens["<|new|>"] == 100261 and tokenizer.decode([100261], True) == ""


def changed(path: str, value: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(demo_json()))
    target, (*keys, last) = values, path.split(".")
    for key in keys:
        target = target[key]
    target[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("normalizer", {"type": "NFC"}, "normalizer NFC"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, "normalizer Lowercase"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer Metaspace"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "pre_tokenizer"),
        ("pre_tokenizer", split_json(r"\p{L}+|\s+"), "leaves text out"),
        ("pre_tokenizer", split_json(r"\p{L"), "pattern"),
        ("pre_tokenizer", split_json(r"x*"), "leaves text out"),
        ("pre_tokenizer", split_json(r"\s+$|[\s\S]"), r"has \$, which programs read in two ways"),
        ("pre_tokenizer", split_json(r"^\s|[\s\S]"), r"has \^, which"),
        ("pre_tokenizer", split_json(r"(?i-m:.)|\s"), r"has \(\?i-m, which"),
        ("pre_tokenizer", split_json(r"(?s:.)"), r"has \(\?s, which"),
        ("pre_tokenizer", split_json(r"[[:alpha:]]+|[\s\S]"), r"has \[:alpha:\], which"),
        ("post_processor", {"type": "TemplateProcessing"}, "post_processor TemplateProcessing"),
        ("decoder", {"type": "WordPiece"}, "decoder WordPiece"),
        ("model.type", "Unigram", "model Unigram"),
        ("model.type", "WordPiece", "model WordPiece"),
        ("model.byte_fallback", True, "byte_fallback"),
        ("model.dropout", 0.1, "dropout"),
        ("model.merges", ["q q"], "merge of 'q' and 'q'"),
        ("model.merges", ["a b c"], "the merge 'a b c' is not of two tokens"),
        ("model.merges", [["a"]], "is not of two tokens"),
        ("model.vocab", ["a"], "model: holds a value"),
        ("model", {"type": "BPE"}, "model: lacks 'vocab'"),
        ("added_tokens", [{"id": 256}], "added_tokens: lacks 'content'"),
        ("pre_tokenizer", {"type": "Sequence"}, "pre_tokenizer: "),
        ("model.vocab", {"a": -1}, "token 'a'"),
        ("model.vocab", {"a": 10**12}, "token 'a'"),
        ("added_tokens", [{"id": 1, "content": "<a>", "rstrip": True}], "rstrip"),
        ("added_tokens", [{"id": 10**12, "content": "<a>"}], "'<a>'"),
        ("added_tokens", [{"id": 256, "content": 5}], "content of an added token is 5"),
        ("added_tokens", [{"id": 256, "content": None}], "content of an added token is None"),
        ("added_tokens", [{"id": 256, "content": ""}], "content of an added token is empty"),
        ("added_tokens", 3, "added_tokens: holds a value"),
        ("model", None, "model: holds a value"),
        ("pre_tokenizer", None, "there is no pre_tokenizer"),
    ],
)
def test_what_cannot_be_represented_is_refused(path: str, value: Any, named: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {"tokenizer.json": changed(path, value)})
    with pytest.raises(ModelError, match=named) as caught:
        AutoTokenizer.from_pretrained(tmp_path)
    assert "tokenizer.json: " in caught.value.message


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": {"vocab_size": 32000}},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "[" * 100_000},
        {"tokenizer.json": "[]"},
        {"tokenizer_config.json": '"x"', "config.json": {"vocab_size": 100352}},
        {"tokenizer_config.json": {"chat_template": 3}, "config.json": {"vocab_size": 100352}},
        {"tokenizer_config.json": {"chat_template": [{"name": "x"}]}, "config.json": {"vocab_size": 100352}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": 1}}, "config.json": {"vocab_size": 100352}},
    ],
)
def test_unusable_folders_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        AutoTokenizer.from_pretrained(checkpoint(tmp_path, files))


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        AutoTokenizer.from_pretrained(tmp_path, no_such_option=1)


def test_cl100k_is_taken_only_with_the_right_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good,) = (path for path in bpe._cl100k_paths() if path.is_file() and path.name == "cl100k_base.tiktoken")
    cached = tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # tiktoken's name for it
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)
    cached.write_bytes(b"YQ== 0\n")
    with pytest.raises(ModelError, match="not installed"):
        cl100k_vocabulary()
    shutil.copyfile(good, cached)
    assert len(cl100k_vocabulary().merged) == 100256


def test_lone_surrogates_and_too_much_text_are_refused(dbrx: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"U\+DC80.* character 1"):
        dbrx.encode("a\udc80")
    with pytest.raises(InputError, match="MiB"):
        dbrx.encode("a" * (MAX_TEXT + 1))


def test_a_pattern_that_backtracks_without_end_is_an_input_error() -> None:
    single = [bytes([byte]) for byte in range(256)]
    encoder = BytePairEncoder(Vocabulary(r"(?:(?=x)x+)+y|[\s\S]", single, {byte: byte[0] for byte in single}))
    with pytest.raises(InputError, match="pattern"):
        encoder.encode("x" * 60)


@pytest.mark.slow
@pytest.mark.parametrize("size", [MAX_TEXT // 8, pytest.param(MAX_TEXT, marks=pytest.mark.soak)])
@each_maker
@pytest.mark.parametrize("unit", [" ", "a", "\n", " \n", "1.", "\t x", "\x04", "مرحبا"])
def test_long_texts_end_within_ten_seconds(name: str, unit: str, size: int) -> None:
    """Of this process's own: an eighth of the longest text in an eighth of the time."""
    ours, _ = pair(name)
    ours.encode("")  # the encoder is there
    text = (unit * size).encode()[:size].decode("utf-8", "ignore")
    start = time.process_time()
    ours.encode(text)
    assert time.process_time() - start < 10 * size / MAX_TEXT
