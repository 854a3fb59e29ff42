"""ollama's store: a manifest under each model's name, which lists blobs: the weights, and what else belongs to them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ModelError
from ..safetensors_file import read_json, read_text, shown

PREFIX = "ollama:"  # begins what a user calls one of its models
DEFAULTS = ("registry.ollama.ai", "library", "latest")  # host, namespace and tag that its names leave out
NAME = re.compile(r"\w[\w.:-]*")  # host, namespace, model or tag: never a way up
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_MANIFEST = 2**20
MEDIA = "application/vnd.ollama.image."  # before the kind of a layer
FOLLOWED = ("model", "params", "system", "license", "template")
# Its parameters under the keys of generation_config.json, and values that do nothing.
PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
    "repeat_penalty": "repetition_penalty", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "num_predict": "max_new_tokens",
}  # fmt: skip
NEUTRAL = {"seed": -1, "mirostat": 0, "tfs_z": 1, "typical_p": 1}
UNLIMITED = (-1, -2)  # of num_predict
MARK = "<|im_start|>"
CHATML = re.compile(r"(<\|im_start\|>(system|user|assistant)?|<\|im_end\|>|\s)*")
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """A model in a store: what a user calls it, its file, and its layers' digests by kind, the first of each."""

    name: str
    path: Path
    store: Path
    layers: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """None if the file is no manifest."""
        path = path.absolute()
        store = next((parent.parent for parent in path.parents if parent.name == "manifests"), None)
        if store is None or path.suffix == ".gguf" or path.stat().st_size > MAX_MANIFEST:
            return None
        found = cls(_name(path), path, store, {})
        try:
            layers = read_json(path).get("layers")
        except ModelError as error:
            raise found.fault(error.message) from None
        for layer in layers if isinstance(layers, list) else ():
            kind, digest = (layer.get(key) if isinstance(layer, dict) else None for key in ("mediaType", "digest"))
            if not isinstance(kind, str) or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise found.fault(f"{path}: holds a layer without a type or a digest")
            found.layers.setdefault(kind.removeprefix(MEDIA), digest)
        return found

    def fault(self, why: str) -> ModelError:
        """What must be fetched again."""
        return ModelError(why, f"fetch it again: ollama pull {self.name.removeprefix(PREFIX)}")

    @property
    def weights(self) -> Path:
        """The GGUF file; `ModelError` if there is none, or it is not the whole model."""
        found = self._read("model", lambda path: path)
        if found is None:
            raise ModelError(f"{self.name}: names no GGUF file", "give a GGUF file of DBRX")
        if "adapter" in self.layers:
            raise ModelError(f"{self.name}: has an adapter, which is not applied here", f"without it: -m {found}")
        return found

    @property
    def parameters(self) -> dict[str, Any]:
        """What its maker set, where they have one under the keys of generation_config.json; `stop` is a list."""
        given = self._read("params", read_json) or {}
        said = {key: value for key, value in given.items() if value is not None and value != NEUTRAL.get(key)}
        stop = said.get("stop", [])
        said["stop"] = [stop] if isinstance(stop, str) else stop
        if not isinstance(said["stop"], list) or not all(isinstance(text, str) for text in said["stop"]):
            raise self.fault(f"{self.name}: its stop is no list of texts")
        return {key if value in UNLIMITED else PARAMETERS.get(key, key): value for key, value in said.items()}

    @property
    def system(self) -> str | None:
        """The system message of conversations that have none."""
        return self._read("system", read_text)

    def ignored(self, template: str | None) -> list[str]:
        """The kinds of layers that nothing here follows; template: what the weights' file has, None for ChatML.

        The file's own template is rendered, so one of Go that has other marks between its actions counts as ignored.
        """
        go = self._read("template", read_text)
        same = go is None or (is_chatml(go) and (template is None or MARK in template))
        return sorted(kind for kind in self.layers if kind not in FOLLOWED or (kind == "template" and not same))

    def _read(self, kind: str, read: Callable[[Path], T]) -> T | None:
        """A layer; None if there is none."""
        if kind not in self.layers:
            return None
        blob = self.store / "blobs" / self.layers[kind].replace(":", "-")
        if not blob.is_file():
            raise self.fault(f"{blob}: is missing, the {kind} of {self.name}")
        try:
            return read(blob)
        except ModelError as error:
            raise self.fault(f"{error.message} (the {kind} of {self.name})") from None


def is_chatml(template: str) -> bool:
    """Whether a template of Go writes ChatML's marks and no other text, whatever its actions do."""
    first, *others = template.split("{{")
    text = first + "".join(part.partition("}}")[2] for part in others)
    return MARK in text and CHATML.fullmatch(text) is not None


def manifest_of(name: str | Path) -> Manifest | None:
    """The manifest that a user means, by ollama's name, its path, or that of a store with one model; None if none."""
    if str(name).startswith(PREFIX):
        return _named(str(name).removeprefix(PREFIX))
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return Manifest.read(path)
    found = list(stored(path)) if is_store(path) else []
    return found[0] if len(found) == 1 else None


def store() -> Path:
    """Where ollama keeps its models."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def is_store(path: Path) -> bool:
    """Whether a folder is such a store."""
    return os.path.isdir(path / "manifests") and os.path.isdir(path / "blobs")


def stored(path: Path) -> Iterator[Manifest]:
    """The models in a store whose weights are there."""
    for file in sorted((path / "manifests").glob("*/*/*/*")):
        try:
            manifest = Manifest.read(file) if file.is_file() else None
            if manifest is not None and manifest.weights:
                yield manifest
        except (ModelError, OSError):
            continue


def _name(path: Path) -> str:
    """HOST/NAMESPACE/MODEL/TAG -> as `ollama list` has it, which leaves out the usual host and namespace."""
    *whole, tag = path.parts[-4:]
    for usual in DEFAULTS[:2]:
        whole = whole[1:] if whole[0] == usual else whole
    return f"{PREFIX}{'/'.join(whole)}:{tag}"


def _named(name: str) -> Manifest:
    """By `[host/][namespace/]model[:tag]`."""
    has_tag = ":" in name.rpartition("/")[2]
    model, _, tag = name.rpartition(":") if has_tag else (name, "", DEFAULTS[2])
    parts = [*DEFAULTS[: 3 - len(model.split("/"))], *model.split("/"), tag]
    if len(parts) != 4 or not all(NAME.fullmatch(part) for part in parts):
        raise ModelError(
            f"{PREFIX}{shown(name)}: is no name of ollama's", "as `ollama list` has it: ollama:dbrx:latest"
        )
    path = store() / "manifests" / Path(*parts)
    manifest = Manifest.read(path) if os.path.isfile(path) else None  # False for a name that is too long
    if manifest is None:
        raise ModelError(
            f"{PREFIX}{shown(name)}: is not in ollama's store, {store()}",
            f"`dbrx models` lists what is; or fetch it: ollama pull {name}",
        )
    return manifest
