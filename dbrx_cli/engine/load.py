"""From the model options to a folder that is found and checked, and to a network in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.cores import configure_openmp, require_addresses
from dbrx_cli.engine.damage import damage_named
from dbrx_cli.engine.use import use_of
from dbrx_cli.options import DEFAULT_MODEL, DEMOS, ModelOptions
from dbrx_cli.report import Report
from model.errors import ModelError

if TYPE_CHECKING:
    from model.causal_lm import DbrxForCausalLM
    from model.config import DbrxConfig
    from model.model_files import ModelFiles
    from model.parallel import Ranks


def find_model(options: ModelOptions, report: Report) -> Path:
    """The model's folder on this machine; `ModelError` says what to type when there is none."""
    require_addresses()
    if options.model in DEMOS:
        from dbrx_cli.demo import ensure_demo

        with report.bar("Converting the demo model", unit="tensors", at_once=False) as advance:
            return ensure_demo(report.notice, advance, options.model)
    from model.hub import resolve

    try:
        return resolve(options.model, revision=options.revision, download=False)
    except ModelError as error:
        if options.model != DEFAULT_MODEL:
            raise
        raise ModelError(
            f"no model was named, and {DEFAULT_MODEL} (264 GB) is not on this machine",
            "name one with -m FOLDER or -m org/name, or try `-m demo`, a small model in the same architecture",
        ) from error


def load_network(
    source: Path | ModelFiles, options: ModelOptions, report: Report, ranks: Ranks | None = None
) -> DbrxForCausalLM:
    """Read the weights with a progress bar; with `ranks`, this rank's slices."""
    configure_openmp()
    if options.compile:
        report.notice("--compile has no effect any more: decoding goes through kernels that are built in")
    import torch

    from model.causal_lm import DbrxForCausalLM
    from model.model_files import ModelFiles

    files = ModelFiles.of(source)
    if options.threads:
        torch.set_num_threads(options.threads)
    with report.bar("Reading the weights") as advance, damage_named(files.path):
        network = DbrxForCausalLM.from_pretrained(
            files,
            attn_implementation=options.attn,
            ranks=ranks,
            adapter=options.adapter,
            graph=options.graph == "auto",
            use=use_of(files.path),
            progress=advance,
            **options.loading,
        )
    assert network.load_plan is not None
    for notice in network.load_plan.notices:
        report.notice(notice)
    if network.expert_store is not None:
        report.detail(network.expert_store.describe())
    return network


def check_source(files: ModelFiles) -> DbrxConfig:
    """`ModelError` if a folder or file is no DBRX model."""
    if files.path.is_dir():
        from model.checkpoint import Checkpoint

        if not (files.path / "config.json").exists():
            Checkpoint.open(files.path).close()  # says what the folder holds instead, such as a GGUF file or an adapter
        return files.config
    from model.formats import open_weights

    with open_weights(files) as weights:
        return weights.config
