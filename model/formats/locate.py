"""A path that a user gave -> the folder or the file that holds the model, where other programs keep GGUF files."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ModelError
from ..safetensors_file import shown
from . import ollama

PART = re.compile(r"(.+)-\d{5}-of-(\d{5})")
NO_MODEL = re.compile(r"mmproj.*|(.*[._-])?imatrix", re.IGNORECASE)  # what lies beside models in their repositories
ARCHITECTURE = b"general.architecture" + struct.pack("<IQ", 8, 4) + b"dbrx"  # a key, then a text of 4 bytes


def locate(path: Path) -> Path:
    """What to open: a checkpoint's folder or a file as it is; in a folder without safetensors its GGUF model; of
    ollama's store, or a manifest in it, the file of the weights. `ModelError` names the models if there are several.
    """
    if path.is_file():
        manifest = ollama.Manifest.read(path)
        return path if manifest is None else manifest.weights
    models = {str(model.relative_to(path)): model for model in gguf_models(path)}
    if not models and ollama.is_store(path):
        manifests = {each.name.removeprefix(ollama.PREFIX): each for each in ollama.stored(path)}
        models = {name: each.path if len(manifests) > 1 else each.weights for name, each in manifests.items()}
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


def elsewhere() -> Iterator[tuple[str, Path]]:
    """The DBRX models that ollama, LM Studio and llama.cpp keep: what `-m` takes for each, and its first file."""
    of_ollama = ((manifest.name, manifest.weights) for manifest in ollama.stored(ollama.store()))
    yield from (each for each in of_ollama if is_gguf_of_dbrx(each[1]))
    lm_studio, caches = Path.home() / ".lmstudio" / "models", "Library/Caches" if sys.platform == "darwin" else ".cache"
    llama = Path(os.environ.get("LLAMA_CACHE") or Path.home() / caches / "llama.cpp")
    yield from ((str(each), each) for root in (lm_studio, llama) for each in gguf_models(root) if is_gguf_of_dbrx(each))
