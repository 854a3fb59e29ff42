"""The options that several commands share: dataclasses whose fields are the flags (`takes` expands them).

A field's annotation holds flag, variable and help; its default is the flag's. So a flag is written once, every command
that takes the group has it, and what reaches the command is one typed object. Flags with a variable are settings too
(`settings.py`): a command that takes a group has --profile, and finds in its flags what the settings file says.
"""

import inspect
import os
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from model.errors import AccessError, InputError
from model.quantization import SCHEMES
from model.sampling import SamplingParams

from . import precedence, settings
from .complete import model_names, profile_names
from .output import PLAIN
from .stdin import check_argument

AUTO = "auto"  # --url: a server of this machine, if one computes the same
KEY = "DBRX_API_KEY"
DEFAULT_MODEL = "databricks/dbrx-instruct"
DEMOS = ("demo", "demo-moe")  # made by dbrx_cli/demo.py

AttnName = Literal["auto", "eager", "sdpa", "flash"]
OffloadName = Literal["auto", "none", "cpu", "disk"]
if TYPE_CHECKING:
    SchemeName = str
    QuantizeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
    QuantizeName = Literal[("auto", "none", *SCHEMES)]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Command = TypeVar("Command", bound=Callable[..., None])


def default_command(name: str) -> type[TyperGroup]:
    """A group of commands that is this one where none is named: `dbrx models --json` is `dbrx models list --json`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            asks_help = bool(args) and args[0] in ctx.help_option_names
            if (not args or args[0].startswith("-")) and not (asks_help or ctx.resilient_parsing):
                args = [name, *args]
            return super().parse_args(ctx, args)

    return Group


def takes(**groups: type) -> Callable[[Command], Command]:
    """Give a command the fields of each group as flags; it gets the built groups under the names given here."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            group = groups.get(parameter.name)
            own = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += _flags(group) if group else [own]
        for parameter in parameters:
            settings.register(parameter.annotation, parameter.default)
        parameters = [*_flags(_Profile), *parameters]  # first: other flags may be read early, too, and ask the file
        own_context = next((p.name for p in parameters if p.annotation is typer.Context), None)
        if own_context is None:
            parameters.append(inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

        @wraps(command)
        def run(**values: Any) -> None:
            context = values[own_context] if own_context else values.pop(CONTEXT)
            values.pop("profile")
            try:
                if values.get("url") == AUTO:
                    _take_running(values)
                elif values.get("url") is not None:
                    refuse_typed(context, UNHEARD, "has no effect with --url", "leave it out, or load the model here")
                for name, group in groups.items():
                    values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
                command(**values)
            except InputError as error:
                error.message = precedence.with_origin(context, error.message)
                raise

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run  # type: ignore[return-value]

    return decorate


@lru_cache  # many commands take the same groups, and reading annotations takes time
def _flags(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]


def option(
    *flags: str,
    panel: str,
    help: str,
    metavar: str | None = None,
    hidden: bool = False,
    complete: Callable[[str], list[str]] | None = None,
) -> Any:
    """A flag that is a setting as well: its variable is DBRX_ and the long flag's name."""
    return typer.Option(
        *flags,
        rich_help_panel=panel,
        help=help,
        envvar=_variable(flags),
        show_envvar=False,
        metavar=metavar,
        show_default=False,
        hidden=hidden,
        autocompletion=complete,
    )


def switch(
    *flags: str,
    help: str,
    panel: str | None = None,
    setting: bool = False,
    hidden: bool = False,
    callback: Any = None,
) -> Any:
    """A flag without a value; with `setting` it has a variable and a key in the settings file."""
    return typer.Option(
        *flags,
        help=help,
        rich_help_panel=panel,
        envvar=_variable(flags) if setting else None,
        show_envvar=False,
        show_default=False,
        metavar="",
        hidden=hidden,
        callback=callback,
        is_eager=callback is not None,
    )


def _variable(flags: tuple[str, ...]) -> str:
    long = next(flag for flag in flags if flag.startswith("--"))
    return settings.PREFIX + long.removeprefix("--").replace("-", "_").upper()


CONTEXT = "context_"  # the parameter by which Typer hands its context to `takes`
MODEL, SAMPLING, OUTPUT = "Model", "Sampling", "Output"


def given_key() -> str | None:
    """The key of a server, if the environment has one; `AccessError` for what no header can carry."""
    key = os.environ.get(KEY) or None
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise AccessError(f"{KEY} holds characters that no key has", f"set {KEY} again")
    return key


@dataclass(frozen=True)
class _Profile:
    """Which part of the settings file; `takes` adds the flag to every command."""

    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            envvar="DBRX_PROFILE",
            show_envvar=False,
            callback=precedence.apply,
            is_eager=True,
            metavar="NAME",
            help="Part of the settings file to use as well: profiles.NAME.",
            show_default=False,
            autocompletion=profile_names,
        ),
    ] = None


@dataclass(frozen=True)
class WhichModel:
    """Which model."""

    model: Annotated[
        str,
        option(
            "-m",
            "--model",
            panel=MODEL,
            metavar="MODEL",
            help="A folder, a GGUF file, a Hub id, `ollama:NAME`, `demo`, or `demo-moe`.",
            complete=model_names,
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[
        str | None, option("--revision", panel=MODEL, metavar="REV", help="Branch, tag or commit on the Hub.")
    ] = None


@dataclass(frozen=True)
class ModelOptions(WhichModel):
    """Which model, and how it is laid out on this machine."""

    attn: Annotated[
        AttnName, option("--attn", panel=MODEL, help="Attention backend; auto takes the best there is.")
    ] = "auto"
    dtype: Annotated[DtypeName, option("--dtype", panel=MODEL, help="Of weights and activations; auto: as stored.")] = (
        "auto"
    )
    quantize: Annotated[
        QuantizeName,
        option(
            "--quantize", panel=MODEL, help="Bits of the weights; auto: floats on a CPU become int8; none: as stored."
        ),
    ] = "auto"
    graph: Annotated[
        Literal["auto", "off"],
        option("--graph", panel=MODEL, help="CUDA graphs of decode steps on a GPU; auto: if one can."),
    ] = "auto"
    compile: Annotated[
        bool,
        switch("--compile", panel=MODEL, setting=True, hidden=True, help="Has no effect any more."),
    ] = False
    device_map: Annotated[
        str,
        option("--device-map", panel=MODEL, metavar="auto|balanced|sequential|cpu|...", help="Where the layers go."),
    ] = "auto"
    max_memory: Annotated[
        str | None,
        option("--max-memory", panel=MODEL, metavar="LIMITS", help='Such as "0=70GiB,cpu=200GiB".'),
    ] = None
    offload: Annotated[
        OffloadName,
        option(
            "--offload",
            panel=MODEL,
            help="Where experts go that do not fit; auto: to disk; beside a GPU in few bits to the CPU.",
        ),
    ] = "auto"
    expert_cache: Annotated[
        str | None,
        option("--expert-cache", panel=MODEL, metavar="SIZE", help="Memory for them, such as 8GiB (default: most)."),
    ] = None
    adapter: Annotated[
        str | None, option("--adapter", panel=MODEL, metavar="FOLDER", help="A LoRA adapter, as peft saves it.")
    ] = None
    threads: Annotated[int | None, option("--threads", panel=MODEL, help="CPU threads (default: one a core).")] = None
    context: Annotated[
        int | None, option("--context", panel=MODEL, help="Tokens of prompt and reply (default: the model's).")
    ] = None

    def __post_init__(self) -> None:
        for flag, value, limit in (("--threads", self.threads, 1024), ("--context", self.context, 2**31)):
            if value is not None and not 1 <= value <= limit:
                raise InputError(f"{flag} must be from 1 to {limit}, not {value}")

    @property
    def expert_cache_bytes(self) -> int | None:
        """--expert-cache in bytes."""
        if self.expert_cache is None:
            return None
        from model.machine import parse_size

        return parse_size(self.expert_cache, "--expert-cache")

    @property
    def memory_limits(self) -> dict[int | str, int | str] | None:
        """--max-memory as accelerate takes it: device number or "cpu" -> amount."""
        if self.max_memory is None:
            return None
        limits: dict[int | str, int | str] = {}
        for part in self.max_memory.split(","):
            device, equals, amount = (piece.strip() for piece in part.partition("="))
            number = device.isdecimal() and len(device) < 10
            if not equals or not (number or device in ("cpu", "mps")) or not amount:
                raise InputError(f"--max-memory: {part.strip()!r} is not like 0=70GiB or cpu=200GiB")
            limits[int(device) if number else device] = amount
        return limits

    @property
    def loading(self) -> dict[str, Any]:
        """All that decides a `LoadPlan`, by the names of `LoadOptions` and of `from_pretrained`."""
        return {
            "dtype": self.dtype,
            "quantize": self.quantize,
            "pack": True,
            "device_map": self.device_map,
            "max_memory": self.memory_limits,
            "offload": self.offload,
            "expert_cache": self.expert_cache_bytes,
            "context": self.context,
        }


def require_context(context: int | None, limit: int) -> None:
    """`InputError` for a context that the model does not have."""
    if context is not None and context > limit:
        raise InputError(f"--context {context} is more than the {limit} tokens that the model was made for")


@dataclass(frozen=True)
class EngineOptions(ModelOptions):
    """A model here, or a server that has one."""

    url: Annotated[
        str | None,
        option(
            "--url",
            panel=MODEL,
            metavar="URL",
            help="An OpenAI-compatible server, or auto: a `dbrx serve` of this model.",
        ),
    ] = None


# Of these no server hears. What environment and settings file say of them is for models here, and is passed over.
UNHEARD = {field.name for field in fields(ModelOptions)} - {"model", "context"} | {"lookup", "prompt_cache", "resume"}


def _take_running(values: dict[str, Any]) -> None:
    """Ask a server of this machine that computes the same, if there is one; else load the model here."""
    from .running import serving

    settings = {field.name: values[field.name] for field in fields(ModelOptions)}
    here = any(values.get(name) for name in UNHEARD - settings.keys())  # what no server does
    found = None if here else serving(settings, has_key=bool(os.environ.get(KEY)))
    values["url"] = found and found.url
    if found is not None:
        values["model"] = found.name


def refuse_typed(context: typer.Context, names: Collection[str], why: str, hint: str) -> None:
    """`InputError` for one of these that was typed; what environment and settings file say is passed over."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{max(parameter.opts, key=len)} {why}", hint)


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling flags that were given; None leaves a value to the checkpoint."""

    max_tokens: Annotated[int | None, option("-n", "--max-tokens", panel=SAMPLING, help="Longest reply in tokens.")] = (
        None
    )
    temperature: Annotated[
        float | None, option("-t", "--temperature", panel=SAMPLING, help="0 always takes the likeliest.")
    ] = None
    top_p: Annotated[float | None, option("--top-p", panel=SAMPLING, help="Likeliest tokens of this total mass.")] = (
        None
    )
    top_k: Annotated[int | None, option("--top-k", panel=SAMPLING, help="Likeliest tokens; 0 for all.")] = None
    min_p: Annotated[
        float | None, option("--min-p", panel=SAMPLING, help="Tokens at least this likely against the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, option("--repetition-penalty", panel=SAMPLING, help="1 switches it off.")
    ] = None
    frequency_penalty: Annotated[
        float | None, option("--frequency-penalty", panel=SAMPLING, help="By count in the reply.")
    ] = None
    presence_penalty: Annotated[
        float | None, option("--presence-penalty", panel=SAMPLING, help="Once for what has occurred.")
    ] = None
    lookup: Annotated[
        str | None,
        option("--lookup", panel=SAMPLING, metavar="auto|off|N", help="Draft up to N tokens from the text so far."),
    ] = None
    seed: Annotated[int | None, option("--seed", panel=SAMPLING, help="Same seed, same text.")] = None
    stop: Annotated[
        list[str] | None,
        option("--stop", panel=SAMPLING, metavar="TEXT", help="End the reply before it (repeatable)."),
    ] = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """--stop, checked."""
        if "" in (self.stop or ()):
            raise InputError("--stop must not be empty", "give the text that ends the reply")
        return tuple(check_argument(text, "--stop") for text in self.stop or ())

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These values where given, `defaults` elsewhere."""
        given = {name: value for name, value in vars(self).items() if value is not None and name != "stop"}
        try:
            if self.lookup is not None:
                given["lookup"] = lookup_length(self.lookup)
            return defaults.under(**given)
        except ValueError as error:
            raise InputError(str(error)) from None


def check_range(setting: settings.Setting, value: Any) -> None:
    """`InputError` if no command would take the value."""
    if setting.key in {field.name for field in fields(EngineOptions)}:
        options = EngineOptions(**{setting.key: value})
        _ = options.memory_limits
    elif setting.key in {field.name for field in fields(SamplingOptions)}:
        sampling = SamplingOptions(**{setting.key: value})
        _ = sampling.stop_strings, sampling.over(SamplingParams())


def lookup_length(text: str) -> int | Literal["auto"]:
    """--lookup: auto, off (0), or a number."""
    if text == "auto":
        return "auto"
    if text == "off":
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(f"--lookup must be auto, off or a number of tokens, not {text[:20]!r}")
    return int(text)


def leave_out_colour(wanted: bool) -> bool:
    """Tell rich and prompt-toolkit, wherever they are used, and what this process starts."""
    if wanted:
        os.environ["NO_COLOR"] = "1"
    return wanted


def keep_cursor(wanted: bool) -> bool:
    """Tell whoever would move the cursor (see `output.moves_cursor`)."""
    if wanted:
        os.environ[PLAIN] = "1"
    else:  # the variable may say no
        os.environ.pop(PLAIN, None)
    return wanted


@dataclass(frozen=True)
class OutputOptions:
    """What goes to stderr."""

    quiet: Annotated[bool, switch("-q", "--quiet", panel=OUTPUT, setting=True, help="Errors only on stderr.")] = False
    verbose: Annotated[bool, switch("-v", "--verbose", panel=OUTPUT, setting=True, help="Timings on stderr.")] = False
    no_color: Annotated[
        bool,
        switch("--no-color", panel=OUTPUT, setting=True, callback=leave_out_colour, help="No colours (NO_COLOR=1)."),
    ] = False
    plain: Annotated[
        bool,
        switch(
            "--plain",
            panel=OUTPUT,
            setting=True,
            callback=keep_cursor,
            help="Lines only: no Markdown, no movement.",
        ),
    ] = False


@dataclass(frozen=True)
class LogOptions:
    """What is kept of a conversation."""

    no_log: Annotated[
        bool, switch("--no-log", panel=OUTPUT, setting=True, help="Do not keep it (see dbrx sessions).")
    ] = False
