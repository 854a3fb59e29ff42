"""Way 3: segments or text <-> ids. `AutoTokenizer` finds what a checkpoint says about its tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections import UserDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .absent import absent
from .bpe import AddedToken, BytePairEncoder, Vocabulary, added_token, cl100k_vocabulary, vocabulary_from_json
from .chat_template import ChatTemplate, Segment
from .errors import ModelError
from .generation_config import GenerationConfig
from .json_text import TOKENIZER
from .messages import Message
from .model_files import ModelFiles
from .safetensors_file import read_json, read_text, shown
from .tokenizer_files import reads_alike, tokenizer_config, tokenizer_json

DBRX_PADDED_VOCAB = 100352
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PATTERNS = [*FILES, "config.json", "generation_config.json"]
# Where tokenizer_config.json lists special tokens: transformers 4, 5 before and after it loads a dict of them.
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
HALF = re.compile("[\ud800-\udfff]")  # of a character, which JSON can spell
# What code written for transformers passes, and what changes nothing here.
IGNORED_ARGUMENTS = {"trust_remote_code", "use_fast", "legacy"}


class BatchEncoding(UserDict[str, Any]):
    """`input_ids` and `attention_mask`, by key, by attribute, or as `**` arguments."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> BatchEncoding:
        """Move the tensors; `ModelError` when there is no such device. Lists stay as they are."""
        try:
            moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()}
        except (AssertionError, RuntimeError) as error:  # torch raises both for a device that is not there
            raise ModelError(
                f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}", "use the device 'cpu'"
            ) from None
        return BatchEncoding(moved)


class Tokenizer:
    """Text <-> ids of one checkpoint.

    Special tokens come from the chat template only: in text, their spellings are encoded as the characters they are.
    So are those of all tokens that the template writes or that the configuration calls special or an end.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        template_source: str | None = None,
        template_name: str = "built-in chat template",
        system: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        padding_side: Literal["left", "right"] = "left",
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.special_tokens = {name: token.id for name, token in vocabulary.added.items()}
        self.named_tokens = dict(named_tokens or {})
        if short := next((name for name in self.special_tokens if len(name) < 2), None):
            where = f"the tokenizer's files in {folder}" if folder else template_name
            raise ModelError(
                f"{where}: the special token {shown(short)!r} cannot be told from text", "give it a longer name there"
            )
        self.chat_template = ChatTemplate(
            template_source, tuple(self.special_tokens), self.named_tokens, template_name, system
        )
        self.padding_side = padding_side
        self.vocabulary = vocabulary
        self._folder = folder
        self._config = dict(config or {})  # of tokenizer_config.json
        table = {token_id: token for token, token_id in vocabulary.ids.items()}
        table |= {token.id: name.encode() for name, token in vocabulary.added.items()}
        self._bytes = [table.get(token_id, b"") for token_id in range(max(table) + 1)]
        self._skipped = frozenset(token.id for token in vocabulary.added.values() if token.special)
        self.eos_token_ids = self._ends(eos_token_ids)

    def _ends(self, configured: Iterable[int]) -> tuple[int, ...]:
        ends = [*configured, self._named_id("eos_token")]
        if "<|im_end|>" in self.chat_template.text:
            ends.append(self.special_tokens.get("<|im_end|>"))
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def _named_id(self, name: str) -> int | None:
        return self.special_tokens.get(self.named_tokens.get(name, ""))

    @cached_property
    def _encoder(self) -> BytePairEncoder:
        apart = {*self.named_tokens.values(), *_called_special(self._config)}
        found = [
            name
            for name, token in self.vocabulary.added.items()
            if not (token.special or name in apart or name in self.chat_template.text or token.id in self.eos_token_ids)
        ]
        return BytePairEncoder(self.vocabulary, found)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise absent("Tokenizer", name)

    @property
    def vocab_size(self) -> int:
        """Ids in use: one more than the largest (the network's table may be padded further)."""
        return len(self._bytes)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.named_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The first of `eos_token_ids`; a reply ends at any of them."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def pad_token_id(self) -> int | None:
        named = self._named_id("pad_token")
        return self.special_tokens.get("<|pad|>") if named is None else named

    def require_rows(self, rows: int, source: Path) -> None:
        """`ModelError` for ids beyond a network's table of so many rows; both were read from `source`."""
        names = ("tokenizer.json", "tokenizer_config.json")
        files = " and ".join(name for name in names if self._file(name)) or "its tokenizer"
        said = {f"{files} beside it has ids up to": self.vocab_size - 1}
        said["an eos_token_id beside it is"] = max(self.eos_token_ids, default=0)
        for what, largest in said.items():
            if largest >= rows:
                where = f"{source / 'config.json'}: vocab_size is" if source.is_dir() else f"{source}: its table has"
                raise ModelError(f"{where} {rows}, and {what} {largest}", "take the files that belong to the weights")

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; a special token's spelling in it is text. `InputError` if it is not Unicode."""
        return self._encoder.encode(text)

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """The ids of a prompt in segments."""
        ids: list[int] = []
        for segment in segments:
            ids += [self.special_tokens[segment.text]] if segment.special else self.encode(segment.text)
        return ids

    def decode_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """One id's bytes, maybe part of a character; none for an id without a token."""
        if not 0 <= token_id < len(self._bytes) or (skip_special_tokens and token_id in self._skipped):
            return b""
        return self._bytes[token_id]

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: Literal[False] = False
    ) -> str:
        """The text of ids (a list, a 1-d tensor, or one id), never cleaned up; broken UTF-8 becomes U+FFFD."""
        if clean_up_tokenization_spaces:
            raise ValueError("text is never cleaned up: that would spoil code")
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = [ids] if isinstance(ids, int) else ids
        return b"".join(self.decode_bytes(i, skip_special_tokens) for i in ids).decode("utf-8", "replace")

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """`decode` of each sequence."""
        return [self.decode(ids, skip_special_tokens, **options) for ids in sequences]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: Literal["pt"] | None = None,
        padding: bool = False,
        add_special_tokens: bool = True,
        allowed_special: Literal["all"] | Collection[str] = (),
    ) -> BatchEncoding:
        """Encode a text or a batch of texts.

        A special token's spelling is text unless `allowed_special` names it, so that text from a user forges no turn.
        `add_special_tokens` is accepted for code written for transformers: DBRX adds none.
        """
        batch = [text] if isinstance(text, str) else list(text)
        rows = [self._encode_with_special(each, allowed_special) for each in batch]
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({"input_ids": rows[0], "attention_mask": [1] * len(rows[0])})
        return self._batch(rows, return_tensors, padding)

    def _encode_with_special(self, text: str, allowed: Literal["all"] | Collection[str]) -> list[int]:
        names = sorted(self.special_tokens if allowed == "all" else allowed, key=len, reverse=True)
        for name in names:
            if name not in self.special_tokens:
                raise ValueError(f"{name!r} is not a special token of this tokenizer")
        if not names:
            return self.encode(text)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return self.encode_segments(Segment(part, special=bool(i % 2)) for i, part in enumerate(parts))

    def _batch(self, rows: list[list[int]], return_tensors: str | None, padding: bool) -> BatchEncoding:
        masks = [[1] * len(row) for row in rows]
        if padding:
            pad = self.pad_token_id if self.pad_token_id is not None else self.eos_token_id
            if pad is None:
                raise ValueError("padding needs a pad token, which this tokenizer has not")
            rows, masks = self._padded(rows, pad), self._padded(masks, 0)
        return BatchEncoding(
            {"input_ids": _tensors(rows, return_tensors), "attention_mask": _tensors(masks, return_tensors)}
        )

    def _padded(self, rows: list[list[int]], value: int) -> list[list[int]]:
        width = max(map(len, rows), default=0)
        left = self.padding_side == "left"
        fills = [[value] * (width - len(row)) for row in rows]
        return [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]

    def apply_chat_template(
        self,
        conversation: Sequence[Message | Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_tensors: Literal["pt"] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Render a conversation: a string, a list of ids or a tensor [1, seq]; with `return_dict` a `BatchEncoding`."""
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        messages = [m if isinstance(m, Message) else _message(m) for m in conversation]
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize:
            return self.chat_template.render(messages, **options)
        ids = self.encode_segments(self.chat_template.segments(messages, **options))
        if not return_dict:
            return ids if return_tensors is None else _tensors([ids], return_tensors)
        if return_tensors is None:
            return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return self._batch([ids], return_tensors, padding=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write this tokenizer into `folder`; what other programs would number otherwise is written anew."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config, path = tokenizer_config(self._config, self.named_tokens), self._file("tokenizer.json")
        if path is None or not reads_alike(read_json(path, TOKENIZER), self.vocabulary):
            _write_json(target / "tokenizer.json", tokenizer_json(self.vocabulary))
        else:
            _copy(path, target)
        if template := self._file("chat_template.jinja"):
            _copy(template, target)
        elif path is None:  # the template may have been in the code of the tokenizer
            config.setdefault("chat_template", self.chat_template.text)
        _write_json(target / "tokenizer_config.json", config)

    def _file(self, name: str) -> Path | None:
        path = self._folder / name if self._folder else None
        return path if path and path.is_file() else None

    @classmethod
    def from_folder(cls, folder: str | Path | ModelFiles, padding_side: Literal["left", "right"] = "left") -> Tokenizer:
        """Read a checkpoint's folder; `ModelError` when it holds no tokenizer that can be used."""
        files = ModelFiles.of(folder)
        folder = files.path
        config = _read_json(folder / "tokenizer_config.json")
        vocabulary = _with_configured_tokens(_vocabulary(files, config), config, folder)
        source, name = _template(folder, config)
        return cls(
            vocabulary,
            template_source=source,
            template_name=name,
            named_tokens=_named_tokens(_read_json(folder / "special_tokens_map.json") | config),
            eos_token_ids=GenerationConfig.from_folder(files).eos_token_id,
            padding_side=padding_side,
            folder=folder,
            config=config,
        )

    @classmethod
    def from_gguf(cls, path: str | Path | ModelFiles, padding_side: Literal["left", "right"] = "left") -> Tokenizer:
        """Read the tokenizer in a GGUF file's header; `ModelError` when there is none that can be used."""
        from .formats.gguf_metadata import GgufTokenizer

        files = ModelFiles.of(path)
        contents = GgufTokenizer.open(files).files()
        config, where = contents["tokenizer_config.json"], f"{files.path}: tokenizer.chat_template"
        template = config.get("chat_template")
        if not isinstance(template, str | None):
            raise ModelError(f"{where}: is not text")
        return cls(
            vocabulary_from_json(contents["tokenizer.json"], str(files.path)),
            template_source=template,
            template_name="built-in chat template" if template is None else where,
            system=None if files.manifest is None else files.manifest.system,
            named_tokens=_named_tokens(config),
            eos_token_ids=contents["generation_config.json"]["eos_token_id"],
            padding_side=padding_side,
            config=config,
        )

    @classmethod
    def from_source(cls, source: Path | ModelFiles, padding_side: Literal["left", "right"] = "left") -> Tokenizer:
        """Read what belongs to the weights in `source`: a checkpoint's folder, or a GGUF file."""
        files = ModelFiles.of(source)
        if files.path.is_dir():
            return cls.from_folder(files, padding_side)
        return cls.from_gguf(files, padding_side)


class AutoTokenizer:
    """Finds a checkpoint's tokenizer, under the name that code written for transformers uses."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        padding_side: Literal["left", "right"] = "left",
        **ignored: Any,
    ) -> Tokenizer:
        """Load from a folder, a GGUF file or a Hub id. `trust_remote_code` is ignored: no code of a checkpoint runs."""
        if unknown := set(ignored) - IGNORED_ARGUMENTS:
            raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(sorted(unknown))}")
        from .formats.ollama import manifest_of
        from .hub import resolve

        source = resolve(str(name_or_path), revision=revision, token=token, patterns=PATTERNS)
        return Tokenizer.from_source(ModelFiles(source, manifest_of(name_or_path)), padding_side)


def _vocabulary(files: ModelFiles, config: dict[str, Any]) -> Vocabulary:
    path = files.path / "tokenizer.json"
    if path.is_file():
        return vocabulary_from_json(read_json(path, TOKENIZER), str(path))
    wrapped = config.get("tokenizer_class") == "TiktokenTokenizerWrapper"
    if wrapped or files.settings.get("vocab_size") == DBRX_PADDED_VOCAB:
        return cl100k_vocabulary()
    raise ModelError(
        f"{files.path}: has no tokenizer.json, and its vocabulary is not DBRX's",
        "copy the tokenizer.json of the model that it was made from into the folder",
    )


def _with_configured_tokens(vocabulary: Vocabulary, config: dict[str, Any], folder: Path) -> Vocabulary:
    """tokenizer_config.json may add tokens to those of the vocabulary, and call ordinary ones special."""
    path, added = folder / "tokenizer_config.json", dict(vocabulary.added)
    for name in set(_called_special(config)) - added.keys():
        token_id = vocabulary.ids.get(name.encode())
        if token_id is not None and name.encode() not in vocabulary.merged:  # what a text can hold stays text
            added[name] = AddedToken(token_id)
    taken = {*vocabulary.ids.values(), *(token.id for token in added.values())}
    try:
        for key, flags in (config.get("added_tokens_decoder") or {}).items():
            token_id, name = int(key), str(flags["content"])
            if name not in added and token_id not in taken:
                added[name] = added_token(name, token_id, flags)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: added_tokens_decoder must map ids to objects with a content") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", error.hint) from None
    return Vocabulary(vocabulary.pattern, vocabulary.merged, vocabulary.ids, added)


def _named_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """`eos_token` and its kin: a string, or an object with the string as its content."""
    named = {}
    for name in NAMED_TOKENS:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[name] = value
    return named


def _called_special(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _named_tokens(config).values()
    for key in SPECIAL_LISTS:
        listed = config.get(key) or ()
        for value in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ():
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                yield value


def _template(folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """The checkpoint's chat template and where it was found: a file of its own, else in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path), str(path)
    where, source = f"{folder / 'tokenizer_config.json'}: chat_template", config.get("chat_template")
    if isinstance(source, list):  # named templates
        named = {str(each.get("name")): each.get("template") for each in source if isinstance(each, dict)}
        if "default" not in named:
            raise ModelError(f"{where}: has no template named 'default'")
        source = named["default"]
    if source is None:
        return None, "built-in chat template"
    if not isinstance(source, str) or HALF.search(source):
        raise ModelError(f"{where}: is not text")
    return source, where


def _message(values: Mapping[str, Any]) -> Message:
    role, content = values.get("role"), values.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a message needs a role and a content, both strings: {dict(values)!r}")
    return Message(role, content)  # type: ignore[arg-type]  # Message checks the role


def _tensors(rows: list[list[int]], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return rows
    if return_tensors != "pt":
        raise ValueError(f"return_tensors must be 'pt' or None, not {return_tensors!r}")
    if len(set(map(len, rows))) > 1:
        raise ValueError("the texts differ in length: pass padding=True to make one tensor of them")
    import torch

    return torch.tensor(rows, dtype=torch.long)


def _copy(path: Path, folder: Path) -> None:
    if path.resolve() != (folder / path.name).resolve():
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json(path) if path.is_file() else {}
