"""Looks at everything that a reply needs, and says of each part whether it is well and what to type if it is not."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dbrx_cli.options import DEFAULT_MODEL, DEMOS, WhichModel
from model.errors import AccessError, ConnectionFault, DbrxError, ModelError, first_line

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "warning", "problem"]
ENOUGH_DISK = 5 * 10**9
# What other packages are known to get wrong with DBRX (docs/fidelity.md); this program uses none of them.
OTHERS = (
    (
        "transformers",
        (5, 0),
        "computes DBRX wrongly without a word (5.23, 5.24: RoPE theta 10,000 instead of 500,000; 5.0 to 5.14: experts)",
        "to compare with it: pip install transformers==4.57.6",
    ),
    (
        "vllm",
        (0, 24),
        "fails to load DBRX (KeyError w13_weight, seen in 0.24 to 0.32; 0.33 has the same code)",
        "serve it with another program",
    ),
)


@dataclass(frozen=True)
class Check:
    """One part: how it is, and what to type if it should be better. `exit_code` counts for a problem only."""

    name: str
    state: State
    text: str
    hint: str | None = None
    exit_code: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def problem(cls, name: str, error: DbrxError, **facts: Any) -> Check:
        return cls(name, "problem", error.message, error.hint, error.exit_code, facts)


def examine(model: WhichModel) -> Iterator[Check]:
    """All checks, the quick ones first; each is given as soon as it is known. One that breaks hides none behind it."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}, {sys.executable}")
    yield from _guarded("packages", versions)
    yield from folders()
    yield from _guarded("memory", memory)
    yield from _guarded("model", lambda: model_and_hub(model))
    yield from _guarded("plan", lambda: load_plan(model))
    yield from _guarded("native kernels", native_kernels)
    yield from network_checks()


def _guarded(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that itself breaks is a problem like any other."""
    try:
        yield from checks()
    except DbrxError as error:
        yield Check.problem(name, error)
    except Exception as error:
        if os.environ.get("DBRX_DEBUG"):
            raise
        broken = f"cannot be examined: {type(error).__name__}: {error}"
        yield Check(name, "problem", broken, "to see where: DBRX_DEBUG=1 dbrx doctor", exit_code=1)


def versions() -> Iterator[Check]:
    """The packages against the bounds that were tested, and others that are known to be wrong."""
    try:
        wanted = requires("dbrx-cli") or []
    except PackageNotFoundError:
        wanted = []
        yield Check("packages", "note", "dbrx is not installed as a package, so versions are not compared")
    outside = []
    for requirement in (line for line in wanted if "extra ==" not in line):
        package, bounds = re.split(r"[^\w.-]", requirement)[0], re.findall(r"(>=|<)([\d.]+)", requirement)
        if (found := installed(package)) and not within(found, bounds):
            outside.append(f"{package} {found} (tested: {','.join(map(''.join, bounds))})")
    if outside:
        hint = "pip install --upgrade --force-reinstall dbrx-cli"
        yield Check("packages", "warning", f"not tested with {', '.join(outside)}", hint)
    elif wanted:
        yield Check("packages", "ok", "all within the versions that were tested")
    for name, since, fault, hint in OTHERS:
        if (have := installed(name)) and numbers(have) >= since:
            text = f"{have} is installed, which {fault}; dbrx does not use it"
            yield Check(name, "note", text, hint, facts={"version": have})


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def within(have: str, bounds: list[tuple[str, str]]) -> bool:
    return all((numbers(have) >= numbers(b)) if sign == ">=" else (numbers(have) < numbers(b)) for sign, b in bounds)


def folders() -> Iterator[Check]:
    """Where models are kept."""

    def hub_cache() -> Iterator[Check]:
        from model.hub.layout import cache_folder

        yield room("hub cache", cache_folder(), "HF_HOME")

    def demo_cache() -> Iterator[Check]:
        from dbrx_cli.demo import demo_folder

        yield room("demo cache", demo_folder().parent, "DBRX_CACHE")

    yield from _guarded("hub cache", hub_cache)
    yield from _guarded("demo cache", demo_cache)
    yield from _guarded("old cache", old_cache)


def room(name: str, folder: Path, variable: str) -> Check:
    """Whether a folder can be written to, and how much it can take."""
    from model.hub.plan import readable

    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    facts = {"path": str(folder), "free_bytes": free}
    elsewhere = f"choose another folder: export {variable}=/path"
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return Check(name, "warning", f"{folder} cannot be written to", elsewhere, facts=facts)
    if free < ENOUGH_DISK:
        return Check(name, "warning", f"{folder}: only {readable(free)} free", elsewhere, facts=facts)
    return Check(name, "ok", f"{folder}, {readable(free)} free", facts=facts)


def old_cache() -> Iterator[Check]:
    """What earlier versions left."""
    from dbrx_cli.demo import demo_folder
    from model.hub.plan import readable

    compiled = demo_folder().parent / "compiled"
    if compiled.is_dir():
        size = readable(sum(path.lstat().st_size for path in compiled.rglob("*")))
        text = f"{compiled}: {size} of functions that earlier versions compiled; nothing uses them any more"
        yield Check("old cache", "note", text, f"rm -r {shlex.quote(str(compiled))}")


def native_kernels() -> Iterator[Check]:
    """Which library computes on the CPU, or what this machine misses without one."""
    from model import native

    found = native.status()
    facts = {"variant": found.variant, "faults": list(found.faults)}
    if found.variant is None:
        text = f"none ({found.why_not}): PyTorch's kernels compute, which are slower"
        yield Check("native kernels", "note", text, found.hint, facts=facts)
    elif found.faults:
        text = f"{found.variant}, after {'; '.join(found.faults)}"
        yield Check("native kernels", "warning", text, found.hint, facts=facts)
    else:
        text = f"{found.variant}; it computes the recorded answers"
        yield Check("native kernels", "ok", text, facts=facts)


def memory() -> Iterator[Check]:
    """What a model may take."""
    from model.hub.plan import readable
    from model.machine import available_memory

    free = available_memory()
    yield Check("memory", "ok", f"{readable(free)} available", facts={"available_bytes": free})


def model_and_hub(model: WhichModel) -> Iterator[Check]:
    """Whether the model can be had: from this machine, else from the Hub."""
    try:
        found = _local(model)
    except ModelError as error:
        found = None
        lacking = error
    if found is not None:
        yield Check("model", "ok", f"{model.model}: {found}", facts={"path": str(found)})
        if _is_hub_id(model.model, found):
            yield _less(hub_access(model))
        return
    if model.model in DEMOS:
        fetch = f"dbrx chat -m {model.model} fetches it (93 MB)"
        yield Check("model", "note", "the demo model is not here yet", fetch)
        return
    if not _is_hub_id(model.model, None):
        yield Check.problem("model", lacking)
        return
    access = hub_access(model)
    if model.model == DEFAULT_MODEL:  # nobody asked for it by name
        yield Check("model", "warning", f"{DEFAULT_MODEL} is not here", "name one with -m, or try: dbrx chat -m demo")
        yield _less(access)
    elif access.state == "ok":
        yield Check("model", "warning", lacking.message, f"to fetch it: dbrx download {model.model}")
        yield access
    else:
        yield Check("model", "problem", lacking.message, access.hint, access.exit_code or 3)
        yield access


def load_plan(model: WhichModel) -> Iterator[Check]:
    """How the model would be loaded on this machine as it is now; nothing where it is not here."""
    import torch

    from model.formats import open_weights
    from model.hub.plan import readable
    from model.load_plan import LoadOptions, Stored
    from model.load_planner import plan_load
    from model.machine import free_memory

    try:
        found = _local(model)
    except ModelError:
        return
    options = LoadOptions(quantize="auto", pack=True, device_map="auto", offload="auto")
    with open_weights(found) as weights:
        machine = free_memory(gpus=torch.cuda.is_available())
        plan = plan_load(weights.config, Stored.of(weights), machine, options)
    if plan.fault is not None:
        yield Check("plan", "warning", plan.fault.message, f"see: dbrx plan -m {shlex.quote(model.model)}")
        return
    devices = " and ".join(dict.fromkeys(layer.device for layer in plan.layers))
    where = f"{devices}, experts from the disk" if plan.on_disk else devices
    facts = {"format": plan.format, "kernel": plan.kernel.name if plan.kernel else None, "context": plan.context}
    size = readable(sum(plan.weights.values()))
    yield Check("plan", "ok", f"{plan.format} on {where}, {size} in memory, context {plan.context}", facts=facts)


def _local(model: WhichModel) -> Path:
    from dbrx_cli.commands.models import find_folder
    from model.config import DbrxConfig

    folder = find_folder(model.model, model.revision)
    if folder.is_dir():
        DbrxConfig.from_json(folder / "config.json")
    return folder


def _is_hub_id(name: str, found: Path | None) -> bool:
    named_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".gguf")
    return not named_path and (found is None or found != Path(os.path.expanduser(name)))


def _less(check: Check) -> Check:
    """The same as a warning, where the program works without."""
    if check.state != "problem":
        return check
    return Check(check.name, "warning", check.text, check.hint, facts=check.facts)


def hub_access(model: WhichModel) -> Check:
    """Whether the Hub can be reached and gives this model; `facts["access"]` names which of the reasons it is."""
    from model.hub.client import Hub, NoAccess
    from model.hub.plan import DEFAULT_REVISION, is_offline
    from model.hub.retry import RetryPolicy, run

    if is_offline():
        return Check(
            "hub", "problem", "HF_HUB_OFFLINE is set, so the Hub is not asked", "unset HF_HUB_OFFLINE", 3,
            {"access": "offline"},
        )  # fmt: skip
    answers: list[str] = []
    try:
        hub = Hub.connect(model.model, None)

        def ask(policy: RetryPolicy) -> None:
            answers.append(hub.commit(model.revision or DEFAULT_REVISION, policy))

        run([ask])
    except NoAccess as error:
        return _refused(hub, error)
    except ModelError as error:
        hint = error.hint or "choose another --revision, or leave it out"
        return Check("hub", "problem", error.message, hint, error.exit_code, {"access": "no revision"})
    except AccessError as error:
        return Check.problem("hub", error, access="bad token")
    except ConnectionFault as error:
        return Check.problem("hub", error, access="unreachable")
    return Check("hub", "ok", f"{hub.shown} gives {model.model} at {answers[0][:12]}", facts={"access": "ok"})


def _refused(hub: Any, error: Any) -> Check:
    """Why the Hub refuses: is it the token, the licence, or is there no such thing?"""
    if hub.token is None:
        access, hint = "no token", "if you were given access: export HF_TOKEN=hf_... (or: hf auth login)"
        if error.code == "GatedRepo":
            access = "gated, no token"
    elif not _token_is_valid(hub):
        access, hint = "bad token", "the token is not valid: export HF_TOKEN=hf_... with a new one, or: hf auth login"
    elif error.code == "GatedRepo":
        access, hint = "gated", error.hint
    elif error.code == "RepoNotFound":
        access = "not found"
        hint = f"the token is valid: either {hub.name} is misspelled, or its owner or the token's scope shuts you out"
    else:
        access, hint = "scope", "the token is valid: give it read access to this repository in the Hub's settings"
    return Check("hub", "problem", error.message, hint, error.exit_code, {"access": access})


def _token_is_valid(hub: Any) -> bool:
    """What the Hub says of the token itself; true where it does not say."""
    from model.hub.retry import RetryPolicy, run

    def ask(policy: RetryPolicy) -> None:
        with hub.get(f"{hub.endpoint}/api/whoami-v2", policy):
            pass

    try:
        run([ask])
    except AccessError:
        return False
    except DbrxError:
        return True
    return True


def network_checks() -> Iterator[Check]:
    """Torch, devices, attention, and the network against the reference's answers."""
    found: list[torch.device] = []

    def devices() -> Iterator[Check]:
        named = list(_devices())
        found.extend(device for device, _ in named)
        facts = {"devices": [str(device) for device in found]}
        yield Check("devices", "ok", ", ".join(text for _, text in named), facts=facts)

    yield from _guarded("torch", torch_build)
    yield from _guarded("devices", devices)
    for device in found:
        yield from attention(device)
    yield from _guarded("kernels", kernels)
    for device in (each for each in found if each.type == "cuda"):
        yield from _guarded(f"kernels on {device}", partial(card_kernels, device))


def torch_build() -> Iterator[Check]:
    """Which PyTorch this is."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    blas = "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or another BLAS"  # type: ignore[no-untyped-call]
    onednn = ", oneDNN" if torch.backends.mkldnn.is_available() else ""  # type: ignore[no-untyped-call]
    yield Check(
        "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {blas}{onednn}, {capability}",
        facts={"version": torch.__version__, "threads": torch.get_num_threads(), "cpu": capability},
    )  # fmt: skip


def _devices() -> Iterator[tuple[torch.device, str]]:
    import torch

    from model.hub.plan import readable

    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield torch.device("cuda", i), f"cuda:{i} {about.name} with {readable(about.total_memory)}"
    yield torch.device("cpu"), f"cpu with {os.cpu_count()} cores"


def attention(device: torch.device) -> Iterator[Check]:
    """Which backends run there, and whether the network computes what it should with each."""
    from model.attention import BACKENDS

    for name in BACKENDS:
        title = f"attention {name}" + (f" on {device}" if device.type != "cpu" else "")
        yield from _guarded(title, partial(_backend, title, name, device))


def _backend(title: str, name: str, device: torch.device) -> Iterator[Check]:
    import torch

    from dbrx_cli import golden
    from model.attention import BACKENDS

    backend = BACKENDS[name]
    reason = backend.unavailable(device, torch.bfloat16)
    if reason:
        yield Check(title, "note", reason)
        return
    if backend.unavailable(device, torch.float32):  # flash has no float32 to compare in
        yield Check(title, "ok", "usable")
        return
    difference = golden.largest_difference(device, name)
    facts = {"difference": difference}
    if difference <= golden.TOLERANCE:
        text = f"computes what the reference does (difference {difference:.0e}, at most {golden.TOLERANCE:.0e})"
        yield Check(title, "ok", text, facts=facts)
    else:
        yield Check(
            title, "problem", f"computes wrong numbers: off by {difference:.3g} from the reference",
            "install another build of torch: pip install --force-reinstall torch", 1, facts,
        )  # fmt: skip


def kernels() -> Iterator[Check]:
    """Which kernel multiplies each form of weights on this CPU."""
    from model.kernels import probe

    kinds = probe()
    named = (name if name.startswith(kind) else f"{kind} by {name}" for kind, name in kinds.items())
    yield Check("kernels", "ok", ", ".join(named), facts=dict(kinds))


def card_kernels(device: torch.device) -> Iterator[Check]:
    """Whether each kernel in Triton computes on a card what plain PyTorch does; the first time they are compiled."""
    from model.kernels import has_triton

    title = f"kernels on {device}"
    if not has_triton(device):
        text = "no --quantize there: its kernels need Triton and compute capability 8.0 (Ampere) or newer"
        yield Check(title, "note", text)
        return
    from model.kernels.cuda_check import compare

    try:
        found = list(compare(device))
    except Exception as error:  # of PyTorch, of Triton, or of the C compiler that Triton starts
        hint = "Triton needs a C compiler and Python's headers (apt-get install gcc python3-dev)"
        yield Check(title, "problem", f"cannot be compiled or run: {first_line(error)}", hint, 1)
        return
    facts = {each.kernels: each.error for each in found}
    if wrong := [each for each in found if not each.agrees]:
        off = ", ".join(f"{each.kernels} off by {each.error:.2g} of the largest number" for each in wrong)
        hint = "compute in floats (--quantize none), or with another build of torch and triton"
        yield Check(title, "problem", f"wrong numbers: {off}", hint, 1, facts)
    else:
        worst = max(each.error for each in found)
        text = f"each computes what plain PyTorch does (difference {worst:.0e} of the largest number)"
        yield Check(title, "ok", text, facts=facts)
