"""How far a model in few bits is from the one in floats, on a text: for `bench` and `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.files import read_file
from dbrx_cli.options import ModelOptions
from dbrx_cli.report import Report
from dbrx_cli.stdin import decode
from model.errors import InputError

if TYPE_CHECKING:
    from model.quality import Quality


def read_ids(text: Path, folder: Path) -> list[int]:
    """A text file as ids of a model; `InputError` if it has less than two tokens."""
    from model.tokenizer import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).encode(decode(read_file(str(text)), str(text)))
    if len(ids) < 2:
        raise InputError(f"{text} has less than two tokens", "give a longer text")
    return ids


def against_floats(floats: Path, folder: Path, options: ModelOptions, report: Report, ids: Sequence[int]) -> Quality:
    """Both networks on the ids, one after the other: they may not fit into memory together."""
    from dbrx_cli.engine.load import load_network
    from model.quality import compare, log_probabilities

    with report.status(f"comparing with float32 on {len(ids):,} tokens"):
        whole = load_network(floats, replace(options, quantize="none", dtype="float32"), report)
        reference = log_probabilities(whole, ids)
        del whole
        return compare(load_network(folder, options, report), reference, ids)


def in_words(quality: Quality) -> str:
    """One line."""
    return (
        f"on {quality.tokens} tokens, against float32: KL {quality.kl_nats:.4f} nats, same likeliest token "
        f"{quality.top1:.1%}, perplexity {quality.perplexity:.3f} (float32 {quality.reference_perplexity:.3f})"
    )
