"""The options that several commands share: their flags, variables and help, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from model.errors import InputError
from model.sampling import SamplingParams

DEFAULT_MODEL = "databricks/dbrx-instruct"

AttnName = Literal["auto", "eager", "sdpa", "flash"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]

_MODEL = "Model"
_SAMPLING = "Sampling"
_OUTPUT = "Output"


def _option(*flags: str, panel: str, help: str, env: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(
        *flags, rich_help_panel=panel, help=help, envvar=env, show_envvar=False, metavar=metavar, show_default=False
    )


Model = Annotated[
    str,
    _option("-m", "--model", panel=_MODEL, env="DBRX_MODEL", help="A folder, a Hub id (org/name), or `demo`."),
]
Revision = Annotated[
    str | None, _option("--revision", panel=_MODEL, env="DBRX_REVISION", help="Branch, tag or commit on the Hub.")
]
Attn = Annotated[
    AttnName, _option("--attn", panel=_MODEL, env="DBRX_ATTN", help="Attention backend; auto takes the best there is.")
]
Dtype = Annotated[
    DtypeName, _option("--dtype", panel=_MODEL, env="DBRX_DTYPE", help="Of weights and activations; auto: as stored.")
]
DeviceMap = Annotated[
    str,
    _option(
        "--device-map",
        panel=_MODEL,
        env="DBRX_DEVICE_MAP",
        metavar="auto|balanced|sequential|cpu|DEVICE",
        help="Where the layers go.",
    ),
]
MaxMemory = Annotated[
    str | None,
    _option(
        "--max-memory",
        panel=_MODEL,
        env="DBRX_MAX_MEMORY",
        help='Limits for the device map, such as "0=70GiB,cpu=200GiB".',
    ),
]
Threads = Annotated[
    int | None, _option("--threads", panel=_MODEL, env="DBRX_THREADS", help="CPU threads (default: one a core).")
]
Context = Annotated[
    int | None,
    _option("--context", panel=_MODEL, env="DBRX_CONTEXT", help="Tokens of prompt and reply (default: the model's)."),
]

MaxTokens = Annotated[
    int | None,
    _option("-n", "--max-tokens", panel=_SAMPLING, env="DBRX_MAX_TOKENS", help="Longest reply in tokens."),
]
Temperature = Annotated[
    float | None,
    _option("-t", "--temperature", panel=_SAMPLING, env="DBRX_TEMPERATURE", help="0 always takes the likeliest."),
]
TopP = Annotated[
    float | None, _option("--top-p", panel=_SAMPLING, env="DBRX_TOP_P", help="Likeliest tokens of this total mass.")
]
TopK = Annotated[int | None, _option("--top-k", panel=_SAMPLING, env="DBRX_TOP_K", help="Likeliest tokens; 0 for all.")]
MinP = Annotated[
    float | None,
    _option("--min-p", panel=_SAMPLING, env="DBRX_MIN_P", help="Tokens at least this likely against the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", panel=_SAMPLING, env="DBRX_REPETITION_PENALTY", help="1 switches it off."),
]
FrequencyPenalty = Annotated[
    float | None,
    _option("--frequency-penalty", panel=_SAMPLING, env="DBRX_FREQUENCY_PENALTY", help="By count in the reply."),
]
PresencePenalty = Annotated[
    float | None,
    _option("--presence-penalty", panel=_SAMPLING, env="DBRX_PRESENCE_PENALTY", help="Once for what has occurred."),
]
Seed = Annotated[int | None, _option("--seed", panel=_SAMPLING, env="DBRX_SEED", help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None,
    _option("--stop", panel=_SAMPLING, metavar="TEXT", help="End the reply before this text (repeatable)."),
]

Quiet = Annotated[bool, _option("-q", "--quiet", panel=_OUTPUT, help="Errors only on stderr.")]
Verbose = Annotated[bool, _option("-v", "--verbose", panel=_OUTPUT, help="Timings on stderr.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is laid out on this machine."""

    model: str = DEFAULT_MODEL
    revision: str | None = None
    attn: AttnName = "auto"
    dtype: DtypeName = "auto"
    device_map: str = "auto"
    max_memory: str | None = None
    threads: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        for flag, value, limit in (("--threads", self.threads, 1024), ("--context", self.context, 2**31)):
            if value is not None and not 1 <= value <= limit:
                raise InputError(f"{flag} must be from 1 to {limit}, not {value}")

    @property
    def memory_limits(self) -> dict[int | str, int | str] | None:
        """--max-memory as accelerate takes it: device number or "cpu" -> amount."""
        if self.max_memory is None:
            return None
        limits: dict[int | str, int | str] = {}
        for part in self.max_memory.split(","):
            device, equals, amount = (piece.strip() for piece in part.partition("="))
            if not equals or not (device.isdigit() or device in ("cpu", "mps")) or not amount:
                raise InputError(f"--max-memory: {part.strip()!r} is not like 0=70GiB or cpu=200GiB")
            limits[int(device) if device.isdigit() else device] = amount
        return limits


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling flags that were given; None leaves a value to the checkpoint."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These values where given, `defaults` elsewhere."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        try:
            return replace(defaults, **given)
        except ValueError as error:
            raise InputError(str(error)) from None


def as_path(name: str) -> Path:
    """A folder that a person typed, with ~ expanded."""
    return Path(name).expanduser()
