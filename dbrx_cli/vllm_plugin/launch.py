"""From a checkpoint to the command line of vLLM's server; vLLM itself runs in an environment of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_cli.options import KEY
from dbrx_cli.private import CACHE, cache_folder, private_folder
from model.errors import InputError, ModelError

if TYPE_CHECKING:
    from model.config import DbrxConfig

SERVER = ("-m", "vllm.entrypoints.openai.api_server")  # the command `vllm` of the CPU wheel dies
HEADLESS = ("-m", "vllm.entrypoints.cli.main", "serve")  # of nodes behind the first, which serve nobody: `--headless`
INSTALL = "pip install vllm, then pip install --no-deps dbrx-cli, there; docs/scale.md has both"
# What vLLM's environment has; nothing of it is imported.
LOOK = """
from importlib.metadata import entry_points
from importlib.util import find_spec
plugins = [point.value for point in entry_points(group="vllm.general_plugins")]
print(find_spec("vllm") is not None, any(value.startswith("dbrx_cli.") for value in plugins))
"""


@dataclass(frozen=True)
class Serving:
    """What `dbrx serve` was told."""

    name: str  # under which clients find the model
    host: str
    port: int
    dtype: str
    context: int | None
    tensor_parallel: int
    pipeline_parallel: int
    more: tuple[str, ...] = ()  # flags of vLLM's own

    @property
    def headless(self) -> bool:
        """Whether this is a node behind the first, which listens to nobody."""
        return "--headless" in self.more


def require_vllm(python: str) -> None:
    """`ModelError` unless an interpreter's environment holds vLLM and this plugin; `InputError` if it is none."""
    try:
        done = subprocess.run([python, "-P", "-c", LOOK], capture_output=True, check=True, stdin=subprocess.DEVNULL)
        *_, has_vllm, has_plugin = done.stdout.decode(errors="replace").split()
    except (OSError, ValueError, subprocess.CalledProcessError):  # ValueError: it says something else
        raise InputError(
            f"--python {python} is no Python interpreter that runs", "name the one of vLLM's environment"
        ) from None
    if has_vllm != "True":
        raise ModelError(f"{python} has no vLLM", f"name the interpreter of one that has with --python, or {INSTALL}")
    if has_plugin != "True":
        raise ModelError(f"the vLLM of {python} does not know this program's DBRX", INSTALL)


def require_fitting(config: DbrxConfig, serving: Serving) -> None:
    """`InputError` for sizes that a model does not have; vLLM would say so in a traceback, after minutes."""
    ranks, stages = serving.tensor_parallel, serving.pipeline_parallel
    kv_heads, width = config.attn_config.kv_n_heads, config.ffn_config.ffn_hidden_size
    # Of more ranks than key and value heads, several hold the same one.
    if config.n_heads % ranks or width % ranks or max(kv_heads, ranks) % min(kv_heads, ranks):
        raise InputError(
            f"--tensor-parallel-size {ranks} does not divide {config.n_heads} heads, {kv_heads} of keys and values, and"
            f" experts {width} wide",
            "give a number that does",
        )
    if stages > config.n_layers:
        raise InputError(f"--pipeline-parallel-size {stages}: the model has {config.n_layers} layers", "give fewer")
    if serving.context and serving.context > config.max_seq_len:
        raise InputError(
            f"--context {serving.context}: the model was made for {config.max_seq_len} tokens", "give no more than that"
        )


def require_readable(source: Path) -> None:
    """`ModelError` that says what to serve instead, for weights that vLLM does not read."""
    from model.formats import open_weights
    from model.formats.databricks import DatabricksWeights
    from model.formats.quantized import QuantizedWeights

    with open_weights(source) as weights:
        if isinstance(weights, DatabricksWeights):
            return
        few = weights.quantization if isinstance(weights, QuantizedWeights) else None
    what = f"{few} weights of dbrx" if few else "weights in a GGUF file" if source.is_file() else "experts apart"
    raise ModelError(
        f"{source}: holds {what}, which vLLM does not read",
        f"serve the checkpoint that it was made from, or make one: dbrx convert {source} FOLDER --to bfloat16",
    )


def companions(source: Path) -> Path:
    """A folder with the tokenizer, template and end ids of a checkpoint, as transformers reads them rightly.

    A checkpoint's own files are read otherwise by some releases (another pre_tokenizer, one end id), or are not there.
    The folder is named by its contents, and made once.
    """
    from model.config import DbrxConfig
    from model.generation_config import GenerationConfig
    from model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source)
    parent = private_folder(cache_folder() / "vllm", CACHE)
    made = Path(tempfile.mkdtemp(dir=parent))
    try:
        tokenizer.save_pretrained(made)
        DbrxConfig.from_json(source / "config.json").save_pretrained(made)  # vLLM asks which model the tokenizer is of
        replace(GenerationConfig.from_folder(source), eos_token_id=tokenizer.eos_token_ids).save(made)
        digest = hashlib.sha256()
        for path in sorted(made.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        folder = parent / digest.hexdigest()[:16]
        if not folder.exists():
            try:
                made.rename(folder)
            except OSError:  # another process was quicker
                if not folder.exists():
                    raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def command(python: str, source: Path, beside: Path, serving: Serving) -> list[str]:
    """The command line; of two flags with one name, the last one counts."""
    head = [python, *HEADLESS, str(source)] if serving.headless else [python, *SERVER, "--model", str(source)]
    flags: dict[str, object] = {
        "--served-model-name": serving.name,
        "--host": serving.host,
        "--port": serving.port,
        "--tokenizer": beside,
        "--generation-config": beside,
        "--dtype": serving.dtype,
        "--max-model-len": serving.context,
        "--tensor-parallel-size": serving.tensor_parallel,
        "--pipeline-parallel-size": serving.pipeline_parallel,
    }
    given = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    return [*head, *given, *serving.more]


def environment() -> dict[str, str]:
    """The variables of the server: the key (never on a command line, which others can read), no network, no reports."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if key := os.environ.get(KEY):
        own["VLLM_API_KEY"] = key
    return own | dict(os.environ)


def become(words: Sequence[str]) -> None:
    """Put vLLM's server in the place of this process, so that signals and its end are its own."""
    os.execve(words[0], list(words), environment())
