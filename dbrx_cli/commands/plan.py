"""`dbrx plan`: what would lie where, and how fast it could be, before anything is downloaded or loaded."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_cli.options import ModelOptions, OutputOptions, option, switch, takes
from dbrx_cli.output import say_json
from dbrx_cli.report import Report

if TYPE_CHECKING:
    from dbrx_cli.planning import Question


@takes(options=ModelOptions)
def plan(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="As with -m.", show_default=False)] = None,
    *,
    devices: Annotated[
        str | None,
        option(
            "--devices",
            panel="Machine",
            metavar="LIST",
            help='Another machine, such as "4xH100" or "24GiB,cpu=64GiB@80GB/s,disk=7GB/s"; default: this one.',
        ),
    ] = None,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object.")] = False,
    options: ModelOptions,
) -> None:
    """Say what fits where, how fast it can be, and what to change. Needs no weights, only a configuration.

    Takes the model options of `generate`, so that the same command line can be planned.

    dbrx plan databricks/dbrx-instruct --devices 4xH100

    dbrx plan -m demo
    """
    name = name or options.model
    with Report(OutputOptions()).status(f"planning {name}"):
        from dbrx_cli.planning import Question, advice

        question = Question.of(name, options, devices)
        told = list(advice(question))
    if json_output:
        say_json(to_dict(question, told))
        return
    from dbrx_cli.render.console import PlainConsole
    from dbrx_cli.render.plan import show

    show(PlainConsole(), question, told)


def to_dict(question: "Question", advice: list[str]) -> dict[str, Any]:
    """The plan as JSON; bytes, seconds, tokens a second."""
    from model.speed import load_s, tiers, tokens_per_s

    plan = question.plan
    machine = plan.machine
    return {
        "model": question.name,
        "format": plan.format,
        "dtype": plan.dtype,
        "kv_dtype": plan.kv_dtype,
        "weights_kernel": plan.kernel.name if plan.kernel else None,
        "context": plan.context,
        "weights_bytes": plan.sizes.total,
        "runs": plan.runs,
        "devices": [
            asdict(device)
            | {
                "weights": plan.weights.get(device.name, 0),
                "kv_cache": plan.kv.get(device.name, 0),
                "expert_cache": plan.cache_on(device),
                "free": plan.free(device),
            }
            for device in (*machine.gpus, machine.cpu)
        ],
        "disk_bandwidth": machine.disk.bandwidth,
        "device_map": plan.device_map,
        "experts": [layer.experts for layer in plan.layers],
        "experts_on_cpu": [layer.on_cpu for layer in plan.layers],
        "token_reads": [asdict(tier) for tier in tiers(plan)],
        "tokens_per_s_ceiling": tokens_per_s(plan),
        "tokens_per_s_predicted": question.predicted,
        "kernels": asdict(question.rates) if question.rates else None,
        "load_s": load_s(plan) if plan.runs else None,
        "largest_context": question.largest_context,
        "advice": advice,
    }
