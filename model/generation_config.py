"""generation_config.json: which ids end a reply, and how the checkpoint's makers sample."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .config_keys import listed
from .errors import ModelError
from .model_files import ModelFiles
from .safetensors_file import read_json, shown
from .sampling import MIN_TEMPERATURE, SamplingParams

# The names of the values that flags and arguments replace, where they differ.
REPLACED_BY = {"max_new_tokens": "max_tokens", "do_sample": "temperature"}
NOT_GREEDY = {"temperature", "top_p", "top_k", "min_p"}  # what a greedy choice does not look at
# What transformers 5.24.0 applies, this program does not, and the value at which it does nothing (null never does).
NOT_APPLIED: dict[str, Any] = {
    "bad_words_ids": [], "begin_suppress_tokens": [], "constraints": [], "diversity_penalty": 0, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "exponential_decay_length_penalty": None, "force_words_ids": [], "forced_bos_token_id": None,
    "forced_eos_token_id": None, "guidance_scale": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "num_beams": 1, "penalty_alpha": 0, "sequence_bias": {}, "stop_strings": [],
    "suppress_tokens": [], "token_healing": False, "top_h": 1, "typical_p": 1, "watermarking_config": None,
}  # fmt: skip


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
    frequency_penalty: float | None = None  # ollama's only, as the next, and seed
    presence_penalty: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    faults: Mapping[str, ModelError] = field(default_factory=dict)  # values of the file that cannot be used, by key

    @classmethod
    def from_source(cls, source: Path | ModelFiles) -> GenerationConfig:
        """Read what belongs to the weights in `source`: a checkpoint's folder, or a GGUF file."""
        files = ModelFiles.of(source)
        if files.path.is_dir():
            return cls.from_folder(files)
        from .formats.gguf_metadata import GgufTokenizer

        opened, manifest = GgufTokenizer.open(files), files.manifest
        values = opened.generation_config()
        ends = tuple(values.pop("eos_token_id"))
        if manifest is None:
            return cls(ends)
        readers = READ | OF_OLLAMA
        layers = manifest.ignored(opened.file.value("tokenizer.chat_template", str, "") or None)
        if ignored := [*(key for key in values if key not in readers), *(f"its {layer}" for layer in layers)]:
            warnings.warn(f"{manifest.name}: ignoring {listed(ignored)}", stacklevel=1)
        given, faults = _read(values, readers, manifest.name)
        return cls(ends, **given, faults=faults)

    @classmethod
    def from_folder(cls, folder: Path | ModelFiles) -> GenerationConfig:
        """Read `folder/generation_config.json`; ids that it does not name are those of config.json, if any.

        `ModelError` for ids that are none. Another value that cannot be used is a fault when it is needed.
        """
        files = ModelFiles.of(folder)
        path = files.path / "generation_config.json"
        values = read_json(path) if path.is_file() else {}
        ids = {key: _ids(path, key, values.get(key)) for key in ("eos_token_id", "pad_token_id")}
        if not all(ids.values()):
            config, named = files.path / "config.json", files.settings
            ids = {key: found or _ids(config, key, named.get(key)) for key, found in ids.items()}
        ignored = [key for key, off in NOT_APPLIED.items() if values.get(key) not in (None, off)]
        if ignored:
            plural = "s" * (len(ignored) > 1)
            # Of this line, so that it is told once though tokenizer and network both read the file.
            warnings.warn(f"{path}: ignoring unsupported key{plural} {listed(ignored)}", stacklevel=1)
        given, faults = _read(values, READ, str(path))
        return cls(ids["eos_token_id"], (*ids["pad_token_id"], None)[0], **given, faults=faults)

    def sampling(self, defaults: SamplingParams | None = None) -> SamplingParams:
        """The checkpoint's sampling where it names a value, `defaults` elsewhere. `do_sample: false` is greedy.

        `under` of it raises the `ModelError` of a value that is needed and cannot be used.
        """
        given = {
            "temperature": 0.0 if self.do_sample is False else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "max_tokens": self.max_new_tokens,
            "seed": self.seed,
        }
        values = vars(defaults or SamplingParams()) | {key: v for key, v in given.items() if v is not None}
        faults = {REPLACED_BY.get(key, key): fault for key, fault in self.faults.items()}
        return _Faulty(**values, faults=faults) if faults else SamplingParams(**values)

    def save(self, folder: Path) -> None:
        """Write `folder/generation_config.json`."""
        (folder / "generation_config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "faults"}
        if values["temperature"] == 0:  # transformers takes no such temperature
            values |= {"temperature": None, "do_sample": False}
        values = {key: value for key, value in values.items() if value not in (None, ())}
        return values | ({"eos_token_id": list(self.eos_token_id)} if self.eos_token_id else {})


@dataclass(frozen=True)
class _Faulty(SamplingParams):
    """Sampling of a checkpoint that names values which cannot be used: what is given in their place counts."""

    faults: Mapping[str, ModelError] = field(default_factory=dict)

    def under(self, **given: Any) -> SamplingParams:
        params = SamplingParams(**{key: value for key, value in vars(self).items() if key != "faults"} | given)
        for key, fault in self.faults.items():
            if key not in given and not (params.greedy and key in NOT_GREEDY):
                raise fault
        return params


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {shown(repr(value))}")
    return value


def _whole(value: Any) -> int:
    if not isinstance(_number(value), int) and not value.is_integer():
        raise ValueError(f"must be a whole number, not {shown(repr(value))}")
    return int(value)


def _id(value: Any) -> int:
    if (number := _whole(value)) >= 2**63:
        raise ValueError("no tensor holds it")
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {shown(repr(value))}")
    return value


def _bounded(key: str, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`read`, and the bounds of `SamplingParams`, whose message begins with its name of the key."""
    name = REPLACED_BY.get(key, key)

    def check(value: Any) -> Any:
        number = read(value)
        try:
            SamplingParams(**{name: number})
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{name} ")) from None
        return number

    return check


def _temperature(value: Any) -> float:
    """Greedy is often written as a tiny temperature, which leaves the likeliest token no other beside it."""
    return 0.0 if 0 <= _number(value) < MIN_TEMPERATURE else value


def _top_p(value: Any) -> float:
    """As transformers takes it: 0 leaves the likeliest token, and all above 1 switches it off."""
    return min(_number(value), 1.0) or sys.float_info.min


def _top_k(value: Any) -> int:
    """-1 switches it off, as in vLLM."""
    return 0 if _whole(value) == -1 else int(value)


READ: dict[str, Callable[[Any], Any]] = {
    "do_sample": _truth,
    "temperature": _bounded("temperature", _temperature),
    "top_p": _bounded("top_p", _top_p),
    "top_k": _bounded("top_k", _top_k),
    "min_p": _bounded("min_p", _number),
    "repetition_penalty": _bounded("repetition_penalty", _number),
    "max_new_tokens": _bounded("max_new_tokens", _whole),
}
OF_OLLAMA: dict[str, Callable[[Any], Any]] = {
    "frequency_penalty": _bounded("frequency_penalty", _number),
    "presence_penalty": _bounded("presence_penalty", _number),
    "seed": _bounded("seed", _whole),
}


def _read(
    values: Mapping[str, Any], readers: Mapping[str, Callable[[Any], Any]], where: str
) -> tuple[dict[str, Any], dict[str, ModelError]]:
    """The values that can be used, and the faults of the others; where: what a fault names."""
    given: dict[str, Any] = {}
    faults = {}
    for key, read in readers.items():
        if values.get(key) is not None:
            try:
                given[key] = read(values[key])
            except ValueError as error:
                flag = f"--{REPLACED_BY.get(key, key).replace('_', '-')}"
                faults[key] = ModelError(f"{where}: {key} {error}", f"mend the file, or give {flag}")
    return given, faults


def _ids(path: Path, key: str, value: Any) -> tuple[int, ...]:
    try:
        return as_ids(value)
    except ValueError as error:
        raise ModelError(f"{path}: {key} cannot be used: {error}", "mend the file") from None


def as_ids(value: Any) -> tuple[int, ...]:
    """One id, several or none -> a tuple. One below 0 is none: that is how some files write it."""
    each = value if isinstance(value, list | tuple) else [] if value is None else [value]
    try:
        return tuple(i for i in map(_id, each) if i >= 0)
    except ValueError:
        raise ValueError(f"token ids must be whole numbers below 2^63, not {shown(repr(value))}") from None
