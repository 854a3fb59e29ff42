"""A path that a user gave -> the folder or the file that holds the model, where other programs keep GGUF files."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ModelError
from ..safetensors_file import read_json, shown

PART = re.compile(r"(.+)-\d{5}-of-(\d{5})")
NO_MODEL = re.compile(r"mmproj.*|(.*[._-])?imatrix", re.IGNORECASE)  # what lies beside models in their repositories
OLLAMA = "application/vnd.ollama.image.model"
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


def missing_parts(models: Iterable[Path]) -> list[Path]:
    """Files of GGUF models, single or split, that are not whole here."""
    missing = []
    for path in models:
        part = PART.fullmatch(path.stem)
        total = int(part[2]) if part else 1
        names = [f"{part[1]}-{i:05}-of-{part[2]}.gguf" for i in range(1, min(total, 1000) + 1)] if part else [path.name]
        missing += [path.with_name(name) for name in names if not path.with_name(name).is_file()]
    return missing


def is_gguf_of_dbrx(path: Path) -> bool:
    """Whether a file begins as llama.cpp begins those of DBRX; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return ARCHITECTURE in stream.read(4096)
    except OSError:
        return False


def _of_store(store: Path) -> Iterator[tuple[str, Path]]:
    """The models in ollama's store, by the names that it gives them."""
    for manifest in sorted((store / "manifests").glob("*/*/*/*")):
        try:
            blob = _of_manifest(manifest)
        except ModelError:
            continue
        if blob is not None:
            yield f"{manifest.parent.name}:{manifest.name}", blob


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
