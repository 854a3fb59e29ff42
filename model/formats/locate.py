"""A path that a user gave -> the folder or the file that holds the model, where other programs keep GGUF files."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ModelError
from ..safetensors_file import read_json, shown

PART = re.compile(r"(.+)-\d{5}-of-(\d{5})")
NO_MODEL = re.compile(r"mmproj.*|(.*[._-])?imatrix", re.IGNORECASE)  # what lies beside models in their repositories
OLLAMA = "application/vnd.ollama.image.model"
OF_OLLAMA = "ollama:"  # begins what a user calls one of its models
DEFAULTS = ("registry.ollama.ai", "library", "latest")  # host, namespace and tag that its names leave out
NAME = re.compile(r"\w[\w.:-]*")  # host, namespace, model or tag: never a way up
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_MANIFEST = 2**20
ARCHITECTURE = b"general.architecture" + struct.pack("<IQ", 8, 4) + b"dbrx"  # a key, then a text of 4 bytes


def locate(path: Path) -> Path:
    """What to open: a checkpoint's folder or a file as it is; in a folder without safetensors its GGUF model; of
    ollama's store, or a manifest in it, the file of the weights. `ModelError` names the models if there are several.
    """
    if path.is_file():
        return _of_manifest(path) or path
    models = {str(model.relative_to(path)): model for model in gguf_models(path)}
    if not models and (path / "manifests").is_dir() and (path / "blobs").is_dir():
        models = dict(_of_store(path))
    if len(models) > 1:
        named = ", ".join(shown(name) for name in list(models)[:6]) + (", ..." if len(models) > 6 else "")
        raise ModelError(
            f"{path}: holds {len(models)} models: {named}", f"choose one: -m {next(iter(models.values()))}"
        )
    return next(iter(models.values()), path)


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF models in a folder and below, of a split one the first part here; none where safetensors lie beside."""
    if any(folder.glob("*.safetensors*")):
        return []
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.gguf")):
        if not NO_MODEL.fullmatch(path.stem):
            found.setdefault(str(path.with_name(PART.sub(r"\1-\2", path.stem))), path)
    return list(found.values())


def parts_of(model: Path) -> list[Path]:
    """The files of a GGUF model, of which one is given; some may not be there."""
    part = PART.fullmatch(model.stem)
    if part is None:
        return [model]
    return [model.with_name(f"{part[1]}-{i:05}-of-{part[2]}.gguf") for i in range(1, min(int(part[2]), 1000) + 1)]


def missing_parts(models: Iterable[Path]) -> list[Path]:
    """Files of GGUF models, single or split, that are not whole here."""
    return [path for model in models for path in parts_of(model) if not path.is_file()]


def is_gguf_of_dbrx(path: Path) -> bool:
    """Whether a file begins as llama.cpp begins those of DBRX; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return ARCHITECTURE in stream.read(4096)
    except OSError:
        return False


def of_ollama(name: str) -> Path:
    """The file of the weights that ollama calls `[host/][namespace/]model[:tag]`."""
    has_tag = ":" in name.rpartition("/")[2]
    model, _, tag = name.rpartition(":") if has_tag else (name, "", DEFAULTS[2])
    parts = [*DEFAULTS[: 3 - len(model.split("/"))], *model.split("/"), tag]
    if len(parts) != 4 or not all(NAME.fullmatch(part) for part in parts):
        raise ModelError(
            f"{OF_OLLAMA}{shown(name)}: is no name of ollama's", "as `ollama list` has it: ollama:dbrx:latest"
        )
    manifest = _ollama_store() / "manifests" / Path(*parts)
    if not manifest.is_file():
        raise ModelError(
            f"{OF_OLLAMA}{shown(name)}: is not in ollama's store, {_ollama_store()}",
            f"`dbrx models` lists what is; or fetch it: ollama pull {name}",
        )
    found = _of_manifest(manifest)
    assert found is not None
    return found


def elsewhere() -> Iterator[tuple[str, Path]]:
    """The DBRX models that ollama, LM Studio and llama.cpp keep: what `-m` takes for each, and its first file."""
    if (_ollama_store() / "manifests").is_dir():
        found = ((f"{OF_OLLAMA}{name}", blob) for name, blob in _of_store(_ollama_store()))
        yield from (each for each in found if is_gguf_of_dbrx(each[1]))
    lm_studio, caches = Path.home() / ".lmstudio" / "models", "Library/Caches" if sys.platform == "darwin" else ".cache"
    flat = Path(os.environ.get("LLAMA_CACHE") or Path.home() / caches / "llama.cpp")
    models = [*gguf_models(lm_studio), *(model for model in gguf_models(flat) if model.parent == flat)]
    yield from ((str(model), model) for model in models if is_gguf_of_dbrx(model))


def _ollama_store() -> Path:
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def _of_store(store: Path) -> Iterator[tuple[str, Path]]:
    """The models in ollama's store, by the names that it gives them."""
    for manifest in sorted((store / "manifests").glob("*/*/*/*")):
        try:
            blob = _of_manifest(manifest)
        except ModelError:
            continue
        if blob is not None:
            *whole, tag = manifest.parts[-4:]
            whole = whole[1:] if whole[0] == DEFAULTS[0] else whole
            whole = whole[1:] if len(whole) == 2 and whole[0] == DEFAULTS[1] else whole
            yield f"{'/'.join(whole)}:{tag}", blob


def _of_manifest(path: Path) -> Path | None:
    """The file of weights that a manifest of ollama names; None if the file is no manifest."""
    store = next((parent.parent for parent in path.absolute().parents if parent.name == "manifests"), None)
    if store is None or path.suffix == ".gguf" or path.stat().st_size > MAX_MANIFEST:
        return None
    layers = read_json(path).get("layers")
    for layer in layers if isinstance(layers, list) else ():
        digest = layer.get("digest") if isinstance(layer, dict) and layer.get("mediaType") == OLLAMA else None
        if isinstance(digest, str) and DIGEST.fullmatch(digest):
            blob = store / "blobs" / digest.replace(":", "-")
            if not blob.is_file():
                raise ModelError(f"{blob}: is missing, {path.name} names it", "fetch it again: ollama pull")
            return blob
    raise ModelError(f"{path}: names no GGUF file", "give a GGUF file of DBRX")
