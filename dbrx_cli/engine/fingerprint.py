"""What keys and values depend on. A file of them is taken over only where all of it is the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli import __version__
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.engine import Request
    from dbrx_cli.engine.local import LocalEngine
    from model.tokenizer import Tokenizer

FORMAT = 1  # of the files, and of what their numbers mean
WEIGHTS = {".safetensors", ".gguf"}
TEXTS = {".json", ".jinja", ".model", ".tiktoken"}
HEAD = 64 * 1024  # bytes of each file of weights that are looked at: its header, and where tensors lie;
SAMPLES, SAMPLE = 16, 4096  # and so many pieces of so many bytes, spread over the rest


def fingerprint(engine: LocalEngine) -> dict[str, str]:
    """Names, as a notice tells them, and values."""
    import torch

    network = engine.network
    return {
        "version of dbrx": f"{__version__} {FORMAT}",
        "version of PyTorch": torch.__version__,
        "revision": str(engine.revision),
        "configuration": _digest([repr(network.config).encode()]),
        "model": _weights(engine.source),
        "adapter": network.adapter,
        "chat template": _digest([engine.tokenizer.chat_template.text.encode()]),
        "tokenizer": _tokenizer(engine.tokenizer),
        "dtype": str(network.kv_dtype),
        "quantization": engine.quantize,
        "kernels": network.kernels.name if network.kernels is not None else "plain",
        "attention": network.transformer.attention,
        "device": str(network.device),
    }


def of_request(engine: LocalEngine, request: Request, prompt: Sequence[int]) -> dict[str, str]:
    """All that decides about the text of a reply. A seed that the user did not choose is not a part of it."""
    sampling = {f"--{name.replace('_', '-')}": repr(value) for name, value in asdict(request.params).items()}
    return {
        "prompt": _digest([repr(list(prompt)).encode()]),
        **sampling,
        "--stop": repr(request.stop),
        "--schema": repr(request.constraint),
        "--logprobs": repr(request.logprobs),
        "--context": repr(engine.context),
        **fingerprint(engine),
    }


def of_files(source: Path) -> str:
    """A checkpoint's or an adapter's files, before anything of them is loaded: weights, configuration, tokenizer.

    Answers that took hours hang on it: what a copy or a hard link changes about a file (ctime) is left out.
    """
    texts = (p for p in sorted(source.iterdir()) if p.suffix in TEXTS and p.is_file()) if source.is_dir() else ()
    small = [part for path in texts for part in (path.name.encode(), path.read_bytes())]
    return _digest([*small, *(part for path in _weight_files(source) for part in _content(path))])


def _weights(source: Path | None) -> str:
    """By name, size, times and samples of each file: reading hundreds of gigabytes would take longer than it saves.

    The time of the last change to the file (ctime) is set by the system alone: whoever writes into a file, or puts
    another in its place, changes it, also where size and time of modification are made the same again. The samples are
    for file systems that keep no such time.
    """
    if source is None:
        raise InputError("keys and values are saved only where one process has the whole model", "run without torchrun")
    parts = []
    for path in _weight_files(source):
        status = path.stat()
        parts += [f"{status.st_mtime_ns} {status.st_ctime_ns}".encode(), *_content(path)]
    return _digest(parts)


def _weight_files(source: Path) -> list[Path]:
    return sorted(p for p in source.iterdir() if p.suffix in WEIGHTS) if source.is_dir() else [source]


def _content(path: Path) -> list[bytes]:
    """Name, size, beginning and samples; and its time, but a file of the Hub's cache is stored under its checksum."""
    status, stored = path.stat(), Path(os.path.realpath(path))
    identity = stored.name if stored.parent.name == "blobs" else str(status.st_mtime_ns)
    with path.open("rb") as file:
        parts = [f"{path.name} {status.st_size} {identity}".encode(), file.read(HEAD)]
        for i in range(1, SAMPLES + 1):
            file.seek(max(HEAD, status.st_size * i // SAMPLES - SAMPLE))
            parts.append(file.read(SAMPLE))
    return parts


@lru_cache(maxsize=1)  # a process has one, and asks whenever it saves
def _tokenizer(tokenizer: Tokenizer) -> str:
    tokens = (tokenizer.decode_bytes(i) for i in range(tokenizer.vocab_size))
    return _digest([repr(sorted(tokenizer.special_tokens.items())).encode(), *tokens])


def _digest(parts: Iterable[bytes]) -> str:
    """One value for parts in their order; where one ends is part of it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
