"""adapter_config.json as peft writes it: which options are understood, and the scale that they give a matrix.

Many options keep the names of the tensors and change what these mean. So an option is followed, or known to change no
result, or must have a value under which the adapter is plain LoRA; all else is refused by name, unknown keys too.
Source: LoraConfig of peft 0.21.2 and of its earlier releases, and what PeftModel.from_pretrained computes with them.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from .errors import ModelError
from .safetensors_file import read_json, shown

CONFIG = "adapter_config.json"
MAX_RANK = 4096
MAX_ALPHA = 1e30
MATCHING_S = 10.0  # for all patterns of a file: a hostile expression can take for ever

MERGE = "merge it with peft (merge_and_unload), and give the result with -m"
CONVERT = (
    "save it as plain LoRA where it was trained: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


class Plain(NamedTuple):
    """The values of an option under which an adapter is plain LoRA, what others do, and what to do about them."""

    values: tuple[Any, ...]
    others: str
    way_out: str | Mapping[str, str]  # or by value; "" is any other

    def hint(self, value: object) -> str:
        """What to do about a value."""
        if isinstance(self.way_out, str):
            return self.way_out
        return self.way_out.get(str(value), self.way_out[""])


SELECTING = "which modules are changed; matrices of others are refused"
FOLLOWED: Mapping[str, str] = {
    "r": "the rank, which must be that of the matrices",
    "lora_alpha": "the scale is `lora_alpha / r`",
    "use_rslora": "the scale is `lora_alpha / sqrt(r)`",
    "rank_pattern": "the rank of some modules: the first pattern counts, in the file's order",
    "alpha_pattern": "`lora_alpha` of some modules: the first pattern counts, in the file's order",
    "target_modules": SELECTING,
    "exclude_modules": SELECTING,
    "layers_to_transform": SELECTING,
    "layers_pattern": SELECTING,
}
ABOUT, TRAINING, NEVER = "says where the adapter comes from", "acts in training only", "concerns nothing that DBRX has"
INITIAL = "belongs to a value of `init_lora_weights`"
WITHOUT_EFFECT: Mapping[str, str] = {
    "task_type": ABOUT, "auto_mapping": ABOUT, "peft_version": ABOUT, "base_model_name_or_path": ABOUT,
    "revision": ABOUT, "inference_mode": TRAINING, "lora_dropout": TRAINING, "velora_config": TRAINING,
    "monteclora_config": TRAINING, "eva_config": INITIAL, "corda_config": INITIAL, "lora_ga_config": INITIAL,
    "loftq_config": INITIAL, "fan_in_fan_out": NEVER, "megatron_config": NEVER, "megatron_core": NEVER,
    "ensure_weight_tying": NEVER, "runtime_config": "says where it is computed",
    "qalora_group_size": "belongs to `use_qalora`", "merge_weights": "says when peft 0.2 merged it",
}  # fmt: skip
CASELESS = ("gaussian", "mica", "olora")  # of init_lora_weights: peft compares the others letter by letter
PLAIN: Mapping[str, Plain] = {
    "peft_type": Plain(("LORA",), "is another kind of adapter", MERGE + ", where peft can merge that kind"),
    "init_lora_weights": Plain(
        (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
        "goes with a base that was changed, too",
        # peft changes the base again, in the same way, when it loads these; the others it cannot load, or loads wrong.
        {"pissa": MERGE, "olora": MERGE, "loftq": MERGE, "": CONVERT},
    ),
    "bias": Plain(("none", "all", "lora_only", None), "is no value that peft knows", MERGE),
    "use_dora": Plain((False, None), "is DoRA: directions and magnitudes", MERGE),
    "lora_bias": Plain((False, None), "adds biases, and DBRX has none", "train it without lora_bias"),
    "modules_to_save": Plain((None, []), "replaces whole modules", MERGE),
    "trainable_token_indices": Plain((None,), "changes rows of the embedding", MERGE),
    "target_parameters": Plain((None, []), "changes experts", MERGE),
    "layer_replication": Plain((None, []), "repeats layers", "train it without layer_replication"),
    "alora_invocation_tokens": Plain(
        (None, []), "is activated LoRA: it acts behind these tokens only", "run it in peft, or train plain LoRA"
    ),
    "use_qalora": Plain((False, None), "averages inputs in groups", "train it without use_qalora"),
    "kasa_config": Plain((None,), "is KaSA: it takes small singular values from the base", MERGE),
    "use_bdlora": Plain((None,), "is BD-LoRA: blocks of the matrices are stored", MERGE),
    "arrow_config": Plain((None,), "routes between several adapters", "give one of those with --adapter"),
    "enable_lora": Plain((None, []), "names parts of a fused matrix", "merge it with peft 0.2"),
}
# The part of Python's expressions that means the same to the `regex` package, which can be stopped: but not between the
# rounds of a group that is repeated by count, so only characters are.
READABLE = re.compile(
    r"(?:[\w.|)^$*+?,-]|\(\?(?::|<?[=!])|\((?!\?)|\[\^?[\w.\\-]+\]|\\[.dDwWsSbB]"
    r"|(?<=[\w.\]])(?<![bB])\{\d+(?:,\d*)?\}){0,4096}",
    re.ASCII,
)


class LoraConfig:
    """The options of an adapter that are followed; `ModelError` names the first that is not understood."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = read_json(path)
        self._deadline = monotonic() + MATCHING_S
        self._compiled: dict[str, Any] = {}
        self._check()
        ranks, numbers = f"a whole number from 1 to {MAX_RANK}", "a number"
        self._rank: int = self._value("r", 8, _is_rank, ranks)
        self._alpha: float = self._value("lora_alpha", 8, _is_number, numbers)
        self._rslora = self._value("use_rslora", False, lambda value: value in (True, False, None), "true or false")
        self._ranks: dict[str, int] = self._patterns("rank_pattern", _is_rank, ranks)
        self._alphas: dict[str, float] = self._patterns("alpha_pattern", _is_number, numbers)
        names = "a list of names, or an expression"
        self._targets, self._excluded, self._lists = (
            self._value(key, None, _is_names, names) for key in ("target_modules", "exclude_modules", "layers_pattern")
        )
        self._layers = self._value("layers_to_transform", None, _is_layers, "a list of whole numbers")

    def _check(self) -> None:
        """Nothing that makes it other than plain LoRA."""
        for key, plain in PLAIN.items():
            if key not in self._values and key != "peft_type":
                continue
            value = self._values.get(key)
            caseless = key == "init_lora_weights" and str(value).lower() in CASELESS
            meant = str(value).lower() if caseless else value
            if meant not in plain.values:
                raise self._fault(key, value, f"which {plain.others}", plain.hint(meant))
        for key in self._values.keys() - {*PLAIN, *FOLLOWED, *WITHOUT_EFFECT}:
            if self._values[key] not in (None, False, "", [], {}):
                raise self._fault(
                    key, self._values[key], "and no option that is known here",
                    "remove it from the file if it acts in training only; else merge the adapter where it was made",
                )  # fmt: skip

    def _fault(self, key: str, value: object, why: str, hint: str | None = None) -> ModelError:
        return ModelError(f"{self._path}: {shown(key)} is {shown(repr(value))}, {why}", hint)

    def _value(self, key: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value = self._values.get(key, default)
        if not fits(value):
            raise self._fault(key, value, f"not {kind}")
        return value

    def _patterns(self, key: str, fits: Callable[[Any], bool], kind: str) -> dict[str, Any]:
        found: dict[str, Any] = self._value(key, None, lambda v: v is None or isinstance(v, dict), "a table") or {}
        for pattern, value in found.items():
            if not fits(value):
                raise self._fault(f"{key}[{pattern!r}]", value, f"not {kind}")
        return found

    def scale(self, module: str, rank: int) -> float:
        """What lora_B @ lora_A of a module is multiplied with; `ModelError` if it should have another rank."""
        expected = self._of(module, "rank_pattern", self._ranks, self._rank)
        if rank != expected:
            raise self._fault(
                "rank_pattern" if self._ranks else "r", expected, f"but {module} has matrices of rank {rank}",
                f"{CONFIG} and the matrices must come from the same adapter",
            )  # fmt: skip
        alpha = self._of(module, "alpha_pattern", self._alphas, self._alpha)
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def selects(self, module: str) -> bool:
        """Whether peft would change a module, `transformer.blocks.N.` and so on."""
        if self._excluded and self._names("exclude_modules", self._excluded, module):
            return False
        targets = self._targets
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return True
        if isinstance(targets, str) or module in targets:
            return self._names("target_modules", targets, module)
        return self._names("target_modules", targets, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self._layers in (None, []):
            return True
        lists = [self._lists] if isinstance(self._lists, str) else self._lists
        if lists and not any(
            self._matches("layers_pattern", each, rf"(?:^|.*?\.){each}\.\d+\.", module) for each in lists
        ):
            return False
        layer = int(module.split(".")[2])
        return layer == self._layers if isinstance(self._layers, int) else layer in self._layers

    def _names(self, key: str, names: str | list[str], module: str) -> bool:
        if isinstance(names, str):
            return self._matches(key, names, f"(?:{names})$", module)
        return any(module == name or module.endswith("." + name) for name in names)

    def _of(self, module: str, key: str, patterns: Mapping[str, float], default: float) -> float:
        """peft's rule (get_pattern_key): the first pattern that matches the module's last parts."""
        for pattern, value in patterns.items():
            if self._matches(key, pattern, rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        return default

    def _matches(self, key: str, pattern: str, expression: str, module: str) -> bool:
        import regex  # type: ignore[import-untyped]  # a dependency of tiktoken

        try:
            if expression not in self._compiled:
                if not READABLE.fullmatch(pattern):
                    raise ValueError
                self._compiled[expression] = regex.compile(expression)
            left = max(self._deadline - monotonic(), 1e-3)
            return self._compiled[expression].match(module, timeout=left) is not None
        except TimeoutError:
            why = "takes too long to match"
        except (ValueError, RecursionError, regex.error):
            why = "is no expression that is read here"
        raise ModelError(
            f"{self._path}: {key} holds {shown(repr(pattern))}, which {why}",
            "write the full names of the modules in its place",
        )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_ALPHA < value < MAX_ALPHA


def _is_names(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(str, value)


def _is_layers(value: object) -> bool:
    return value is None or type(value) is int or _is_list_of(int, value)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def other_adapter(folder: Path) -> ModelError | None:
    """What a path holds instead of an adapter as peft saves it, and what to do with that; None if it may be one."""
    hint = "--adapter takes the folder of a LoRA adapter, as peft saves it"
    if os.path.isfile(folder):
        if folder.suffix != ".gguf":
            return ModelError(f"{folder}: is a file, not a folder with {CONFIG}", hint)
        from .formats.gguf_file import open_gguf

        adapter = open_gguf(folder).values.get("general.type") == "adapter"
        what = "a LoRA adapter of llama.cpp" if adapter else "a GGUF file, not an adapter"
        return ModelError(f"{folder}: is {what}", hint + (": the one that this was converted from" if adapter else ""))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    if is_mlx_adapter(names):
        return mlx_adapter(folder)
    if CONFIG in names:
        return None
    if "config.json" in names:
        return ModelError(f"{folder}: is a whole model, not an adapter", f"give it with -m; {hint}")
    for name in names:
        if (folder / name / CONFIG).is_file():
            hint = f"an adapter lies inside: --adapter {shlex.quote(str(folder / name))}"
            break
    return ModelError(f"{folder}: holds no {CONFIG}", hint)


def is_mlx_adapter(names: list[str]) -> bool:
    """Whether a folder with these files is an adapter that mlx_lm.lora saved."""
    return CONFIG in names and any(re.fullmatch(r"(?:\d+_)?adapters\.(?:safetensors|npz)", name) for name in names)


def mlx_adapter(folder: Path) -> ModelError:
    """That this is an adapter of mlx-lm, and its way into a model."""
    return ModelError(
        f"{folder}: is an adapter of mlx-lm, which is not read",
        "fuse it, and give the result with -m: "
        f"mlx_lm.fuse --model BASE --adapter-path {shlex.quote(str(folder))} --save-path NEW",
    )
