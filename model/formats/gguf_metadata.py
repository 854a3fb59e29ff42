"""What a GGUF file of DBRX says beside its weights: configuration, tokenizer, template, ends of a reply (no torch).

The tokenizer is given as the files of a checkpoint folder would hold it, so that there is one way to read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..bpe import CL100K_PATTERN
from ..safetensors_file import shown
from .gguf_file import IMPORTANCE_MATRIX, GgufFile, open_gguf

if TYPE_CHECKING:
    from ..model_files import ModelFiles
    from .ollama import Manifest

EPS = 1e-5
NO_CLAMP = 1e29  # llama.cpp has no null for clip_qkv: converters write 0 or a number that no activation reaches
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types
# llama.cpp takes these for an end of a turn by their spelling, whatever type a converter gave them.
ENDS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end|>",
    "<EOT>",
    "<end_of_turn>",
)
SPELLED_SPECIAL = re.compile(r"<\|[^|]+\|>")
# Files of GGUF that are no models, by general.type.
OTHER_FILES = {
    "adapter": (
        "is a LoRA adapter of llama.cpp, not a model",
        "give the base with -m, and with --adapter the folder that this was converted from, as peft saves it",
    ),
    "imatrix": IMPORTANCE_MATRIX,
    "mmproj": ("is the projector of a model that sees images, not a model", "give the GGUF file of a DBRX model"),
}

# Pre-tokenizers by llama.cpp's name, as a tokenizer.json writes them. It cuts dbrx, smaug-bpe and llama-bpe alike;
# files from before the name was invented have none.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT = {"type": "Split", "pattern": {"Regex": CL100K_PATTERN}, "behavior": "Removed", "invert": True}
_CL100K = {"type": "Sequence", "pretokenizers": [_SPLIT, {**_BYTES, "use_regex": False}]}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
PRE_TOKENIZERS: Mapping[str, Any] = {
    "dbrx": _CL100K, "smaug-bpe": _CL100K, "llama-bpe": _CL100K, "default": _CL100K,
    "smollm": _DIGITS, "gpt-2": _BYTES,
}  # fmt: skip


def check_architecture(file: GgufFile) -> None:
    """`ModelError` names the architecture where it is not DBRX."""
    kind = file.values.get("general.type")
    if isinstance(kind, str) and kind in OTHER_FILES:
        raise file.fault(*OTHER_FILES[kind])
    architecture = file.value("general.architecture", str)
    if architecture == "dbrx":
        return
    hint = "give the GGUF file of a DBRX model, or `-m demo` for a small model"
    if architecture == "llama":
        hint = "give the GGUF file of a DBRX model; the demo model is made from a Llama with `-m demo`"
    raise file.fault(f"holds a model of the architecture {shown(repr(architecture))}, not 'dbrx'", hint)


def config_values(file: GgufFile) -> dict[str, Any]:
    """What config.json would say; `ModelError` for what DBRX does not have, since it would change the numbers."""
    check_architecture(file)

    def number(key: str, default: float | None = None) -> float:
        return float(file.value(f"dbrx.{key}", (int, float), default))

    def whole(key: str) -> int:
        return int(file.value(f"dbrx.{key}", int))

    clamp = number("attention.clamp_kqv")
    eps = number("attention.layer_norm_epsilon", EPS)
    scaling = file.value("dbrx.rope.scaling.type", str, "none")
    if not math.isclose(eps, EPS, rel_tol=1e-5):
        raise file.fault(f"its norms have eps {eps:g}, DBRX's have {EPS:g}")
    if scaling != "none":
        raise file.fault(f"its rotary positions are scaled ({shown(scaling)}), DBRX's are not")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        what = "tensor token_embd.weight is missing" if file.tensors else "holds a vocabulary and no weights"
        raise file.fault(what, "take another conversion of the model")
    return {
        "d_model": whole("embedding_length"),
        "n_heads": whole("attention.head_count"),
        "n_layers": whole("block_count"),
        "max_seq_len": whole("context_length"),
        "vocab_size": embedding.shape[0],
        "attn_config": {
            "kv_n_heads": whole("attention.head_count_kv"),
            "clip_qkv": clamp if 0 < clamp < NO_CLAMP else None,
            "rope_theta": number("rope.freq_base"),
        },
        "ffn_config": {
            "ffn_hidden_size": whole("feed_forward_length"),
            "moe_num_experts": whole("expert_count"),
            "moe_top_k": whole("expert_used_count"),
        },
    }


def check_head_dim(file: GgufFile, head_dim: int) -> None:
    """`ModelError` if the file speaks of heads of another size than the configuration's."""
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        size = file.value(f"dbrx.{key}", (int, float), head_dim)
        if size != head_dim:
            raise file.fault(f"{key} is {size:g}, not the head's size of {head_dim}")


class GgufTokenizer:
    """The tokenizer's part of a header, in the form of a checkpoint's files; and what ollama's manifest adds."""

    def __init__(self, file: GgufFile, manifest: Manifest | None = None) -> None:
        self.file, self.manifest = file, manifest
        self.tokens = self._list("tokenizer.ggml.tokens", str)
        self.types = self._list("tokenizer.ggml.token_type", int, [NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise file.fault(f"has {len(self.tokens)} tokens and {len(self.types)} token types")
        self._correct_types()

    @classmethod
    def open(cls, files: ModelFiles) -> GgufTokenizer:
        """Read a file's header."""
        file = open_gguf(files.path)
        check_architecture(file)
        return cls(file, files.manifest)

    def files(self) -> dict[str, dict[str, Any]]:
        """Contents of tokenizer.json, tokenizer_config.json and generation_config.json."""
        return {
            "tokenizer.json": self._tokenizer(),
            "tokenizer_config.json": self._tokenizer_config(),
            "generation_config.json": self.generation_config(),
        }

    def _correct_types(self) -> None:
        """Special tokens are known by their spelling, too: some converters call them normal, or give no types."""
        spelled = {i for i, token in enumerate(self.tokens) if token in ENDS or SPELLED_SPECIAL.fullmatch(token)}
        merges = self._list("tokenizer.ggml.merges", str, []) if spelled else []
        of_text = {merge.replace(" ", "") for merge in merges}
        for i in spelled:
            if self.tokens[i] in ENDS or (self.types[i] != USER_DEFINED and self.tokens[i] not in of_text):
                self.types[i] = CONTROL

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        values = self.file.value(key, list, default)
        if not all(isinstance(value, kind) for value in values):
            raise self.file.fault(f"{key} does not hold {kind.__name__} throughout")
        return list(values)

    def _tokenizer(self) -> dict[str, Any]:
        model = self.file.value("tokenizer.ggml.model", str)
        pre = self.file.value("tokenizer.ggml.pre", str, "default")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise self.file.fault(
                f"has the tokenizer {shown(f'{model}/{pre}')}, which is none of DBRX's",
                "take another conversion; if it is DBRX's all the same: gguf-new-metadata --pre-tokenizer dbrx IN OUT",
            )
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": i, "content": self.tokens[i], **flags, "special": kind == CONTROL}
            for i, kind in enumerate(self.types)
            if kind in (CONTROL, USER_DEFINED)
        ]
        apart = (CONTROL, USER_DEFINED, UNUSED)
        vocab = {token: i for i, token in enumerate(self.tokens) if self.types[i] not in apart}
        if len(vocab) + len({token["content"] for token in added}) + self.types.count(UNUSED) != len(self.tokens):
            raise self.file.fault("has the same token twice")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZERS[pre],
            "post_processor": None,
            "decoder": _BYTES,
            "model": {"type": "BPE", "vocab": vocab, "merges": self._list("tokenizer.ggml.merges", str)},
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        ids = {key: self._id(name) for key, name in names.items()}
        if ids["pad_token"] is None:
            ids["pad_token"] = self._control("<|pad|>")
        template = self.file.values.get("tokenizer.chat_template")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: self.tokens[i] for key, i in ids.items() if i is not None},
            **({} if template is None else {"chat_template": template}),
        }

    def generation_config(self) -> dict[str, Any]:
        """A turn ends with `<|im_end|>`, a plain text with `<|endoftext|>`: a file names only one as its eos."""
        values: dict[str, Any] = {} if self.manifest is None else self.manifest.parameters
        stops = {text: self._control(text) for text in values.pop("stop", [])}
        if others := [text for text, token_id in stops.items() if token_id is None]:
            values["stop"] = others
        ends = [*map(self._id, ("eos", "eot", "eom")), *map(self._control, ENDS), *stops.values()]
        return values | {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.file.values:
            return None
        token_id = self.file.value(key, int)
        if not 0 <= token_id < len(self.tokens):
            raise self.file.fault(f"{key} is {token_id}, but there are {len(self.tokens)} tokens")
        return int(token_id)

    def _control(self, spelling: str) -> int | None:
        """The id of a special token, where the file has it."""
        found = (i for i, kind in enumerate(self.types) if kind == CONTROL and self.tokens[i] == spelling)
        return next(found, None)
