"""generation_config.json: which ids end a reply, and how the checkpoint's makers sample."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import ModelError
from .safetensors_file import read_text
from .sampling import SamplingParams


@dataclass(frozen=True)
class GenerationConfig:
    """The keys that this program reads; None where the file says nothing."""

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_source(cls, source: Path) -> GenerationConfig:
        """Read what belongs to the weights in `source`: a checkpoint's folder, or a GGUF file."""
        if source.is_dir():
            return cls.from_folder(source)
        from .formats.gguf_metadata import GgufTokenizer

        return cls(eos_token_id=tuple(GgufTokenizer.open(source).generation_config()["eos_token_id"]))

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationConfig:
        """Read `folder/generation_config.json`; a checkpoint without one says nothing."""
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            values = json.loads(read_text(path))
            known = {f.name for f in fields(cls)}
            values = {key: value for key, value in values.items() if key in known and value is not None}
            values["eos_token_id"] = as_ids(values.get("eos_token_id"))
            config = cls(**values)
            config.sampling()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: cannot be used: {error}") from None
        return config

    def sampling(self, defaults: SamplingParams | None = None) -> SamplingParams:
        """The checkpoint's sampling where it names a value, `defaults` elsewhere. `do_sample: false` is greedy."""
        given: dict[str, Any] = {
            "temperature": 0.0 if self.do_sample is False else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_new_tokens,
        }
        return replace(defaults or SamplingParams(), **{key: v for key, v in given.items() if v is not None})

    def save(self, folder: Path) -> None:
        """Write `folder/generation_config.json`."""
        (folder / "generation_config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}
        return values | ({"eos_token_id": list(self.eos_token_id)} if self.eos_token_id else {})


def as_ids(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """One id, several or none -> a tuple."""
    if value is None:
        return ()
    ids = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"token ids must be whole numbers, not {value!r}")
    return ids
