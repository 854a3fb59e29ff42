"""`dbrx bench`: speed against what the machine allows, and quality against full precision."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_cli.cores import configure_openmp
from dbrx_cli.options import ModelOptions, OutputOptions, switch, takes
from dbrx_cli.output import say_json
from dbrx_cli.private import refuse_present, write_private
from dbrx_cli.quality import against_floats, in_words, read_ids
from dbrx_cli.report import Report
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.bench import Machine, Result
    from model.quality import Quality

PROMPT_TOKENS = 512


@takes(options=ModelOptions, output=OutputOptions)
def bench(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="As with -m.", show_default=False)] = None,
    *,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option("--prompt-tokens", min=1, help="Length of the prompt (default: 512); repeat for a curve."),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to make.")] = 64,
    quality: Annotated[
        Path | None,
        typer.Option("--quality", metavar="FILE", help="Compare with float32 on this text.", show_default=False),
    ] = None,
    quality_tokens: Annotated[int, typer.Option("--quality-tokens", min=2, help="Tokens of that text.")] = 1024,
    json_output: Annotated[bool, switch("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw speed and limit.", show_default=False)
    ] = None,
    options: ModelOptions,
    output: OutputOptions,
) -> None:
    """Measure reading and writing speed, how near they are to the limit of this memory, and what few bits cost.

    dbrx bench demo --quantize int8

    dbrx bench demo --quantize int4 --quality essay.txt
    """
    if plot is not None:
        refuse_present(plot)
    options = replace(options, model=name or options.model)
    lengths = sorted(set(prompt_tokens or [PROMPT_TOKENS]))
    report = Report(output)
    with report.status("measuring this machine"):
        configure_openmp()
        from dbrx_cli import bench as measuring
        from dbrx_cli.engine.damage import damage_named
        from dbrx_cli.engine.load import find_model, load_network

        folder = find_model(options, report)
        machine = measuring.measure_machine(options.threads)  # before the model's memory counts
    with damage_named(folder):
        ids = read_ids(quality, folder)[:quality_tokens] if quality is not None else None
        compared = against_floats(folder, folder, options, report, ids) if ids is not None else None
    start = time.perf_counter()
    network = load_network(folder, options, report)
    load_s = time.perf_counter() - start
    longest = lengths[-1] + new_tokens
    if longest > network.config.max_seq_len:
        raise InputError(f"{longest} tokens are more than the model's {network.config.max_seq_len}", "ask for fewer")
    with damage_named(folder):
        results = []
        for length in lengths:
            with report.status(f"measuring {length:,} + {new_tokens:,} tokens"):
                results.append(measuring.measure(network, length, new_tokens, machine, load_s))
    if plot is not None:
        write_private(plot, measuring.plot(results, machine), over=False)
    if json_output:
        found: dict[str, Any] = {"machine": asdict(machine), "results": [result.to_dict() for result in results]}
        say_json(found | ({"quality": asdict(compared)} if compared else {}))
        return
    _show(machine, results, compared)


def _show(machine: "Machine", results: "list[Result]", quality: "Quality | None") -> None:
    from dbrx_cli.render.console import PlainConsole, figures
    from dbrx_cli.repl.phrases import card_in_words

    console = PlainConsole()
    first = results[0]
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in machine.matrix_tflop_s.items())
    console.print(f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}")
    console.print(f"memory {machine.stream_gb_s:.1f} GB/s; matrices, 10^12 operations/s: {rates}")
    console.print(f"quantize {first.quantize}, {first.dtype}, attention {first.attn}, kernel {first.kernel}")
    console.print(f"loaded in {first.load_s:.1f} s, at most {results[-1].peak_rss_bytes / 1e9:.2f} GB of memory")
    if results[-1].card is not None:
        console.print(f"on the card: {card_in_words(results[-1].card)}")
    titles = ("prompt", "prefill/s", "decode/s", "ms p50", "ms p95", "GB/token", "GB/s", "of limit")
    rows = []
    for r in results:
        speeds = (f"{r.prefill_tokens_per_s:.0f}", f"{r.decode_tokens_per_s:.1f}")
        times = (f"{r.decode_ms_p50:.1f}", f"{r.decode_ms_p95:.1f}")
        memory = (f"{r.bytes_per_token / 1e9:.3f}", f"{r.bandwidth_gb_s:.1f}", f"{r.fraction_of_limit:.0%}")
        rows.append((str(r.prompt_tokens), *speeds, *times, *memory))
    console.print(figures(console, titles, rows))
    if quality is not None:
        console.print(in_words(quality))
