"""Experts from measured logs: `python -m jaxroute calibrate LOG... --out configs/site/mine.yaml`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.config.choices import check_choice, usage_of_choice, write_choice
from jaxroute.config.words import command_line
from jaxroute.decisions import is_decision_log
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import write_file
from jaxroute.fitting import COEFFICIENTS, Calibration, Limits, ServingLog, calibrate, fit_profile, read_log
from jaxroute.plotting import png_bytes
from jaxroute.serving import build_site

if TYPE_CHECKING:
    from jaxroute.gateway.probe import Probed

matplotlib.use("Agg")


def main(argv: Sequence[str] | None = None) -> int:
    """Fit an expert to each log and write them as one site; returns the exit code."""
    return run_command(_parser(), argv, _calibrate)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("calibrate", "Fit experts to serving logs.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="a log of one expert, or a profile table")
    parser.add_argument(
        "--probe",
        metavar="URL",
        help="instead of a log: send a server a few dozen requests (its API, with /v1 at the end)",
    )
    parser.add_argument("--probe-batch", type=int, default=16, help="its large batch (default 16, or --max-num-seqs)")
    parser.add_argument("--probe-context", type=int, default=1024, help="its long prompts, tokens (default 1024)")
    parser.add_argument("--probe-tokens", type=int, default=64, help="tokens of each answer (default 64)")
    parser.add_argument("--probe-key-env", metavar="NAME", help="environment variable that holds the server's API key")
    parser.add_argument("--out", type=Path, required=True, help="the site, such as configs/site/mine.yaml")
    of_each = "of each log; one for all, or one per log"
    parser.add_argument("--model", action="append", help=f"name by which the bank knows the LLM, {of_each}")
    parser.add_argument("--accelerator", action="append", help=f"what it runs on, {of_each}")
    parser.add_argument("--profile", action="store_true", help="the logs are tables of batch, context, prompt, ms")
    parser.add_argument("--kv-capacity", type=int, help="tokens, as vLLM prints at its start; fitted if left out")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="vLLM's option (default 256)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="vLLM's option (default 2048)")
    parser.add_argument(
        "--iteration-overhead", type=float, default=0.0, help="s; a log cannot tell it from weight_load (default 0)"
    )
    parser.add_argument("--max-waiting", type=int, help="longest queue (default: no bound, as in vLLM)")
    parser.add_argument(
        "--network-delay",
        type=float,
        help="router to expert, one way, s (default: fitted to a gateway's log, else 0.005)",
    )
    parser.add_argument("--since", type=float, help="leave out requests that arrived before, s on the log's clock")
    parser.add_argument(
        "--share",
        type=float,
        default=1 / 3,
        help="share of the requests to fit to, the earliest; the others judge (default 1/3)",
    )
    return parser


def _calibrate(options: argparse.Namespace, console: Console) -> None:
    check_choice("site", options.out)
    if not 0 < options.share < 1:
        raise UserError(f"--share={options.share:g} must lie between 0 and 1")
    if bool(options.logs) == bool(options.probe) or (options.probe and options.profile):
        raise UserError("give logs, or --probe URL, and not both")
    if options.probe:
        # Named as if it were a log.
        options.logs = [Path("probe")]
    models = _of_each(options.model, options.logs, "--model", [path.name.partition(".")[0] for path in options.logs])
    accelerators = _of_each(options.accelerator, options.logs, "--accelerator", ["unknown"] * len(options.logs))
    if options.max_num_batched_tokens < options.max_num_seqs:
        raise UserError(
            f"--max-num-batched-tokens={options.max_num_batched_tokens} must be at least "
            f"--max-num-seqs={options.max_num_seqs}, as vLLM demands"
        )
    limits = Limits(
        options.max_num_seqs, options.max_num_batched_tokens, options.iteration_overhead, options.kv_capacity
    )
    delay = 0.005 if options.network_delay is None else options.network_delay
    use_compilation_cache()
    experts, figures = [], {}
    probed = _probed(options, console) if options.probe else None
    if probed is not None:
        limits = dataclasses.replace(limits, kv_capacity=options.kv_capacity or probed.kv_capacity)
        logs: list[tuple[Path, ServingLog | None]] = [(options.logs[0], probed.log)]
        models = options.model or [probed.model.rpartition("/")[2]]
    else:
        logs = [(path, None if options.profile else read_log(path, options.since)) for path in options.logs]
    for (path, log), model, accelerator in zip(logs, models, accelerators, strict=True):
        if log is None:
            coefficients, errors = fit_profile(path, limits)
            coefficients, errors = coefficients | {"network_delay": delay}, errors | {"network_delay": math.nan}
            notes = [f"fitted to the profile {path.name}"]
            _show(console, model, coefficients, errors, {})
        else:
            with console.status(f"fitting {path}"):
                # A client's and a gateway's log hold the way to the server and back, others are the server's own.
                from_afar = probed is not None or is_decision_log(str(path).rpartition("#")[0] or path)
                own = dataclasses.replace(limits, network_delay=options.network_delay if from_afar else 0.0)
                share = options.share if probed is None else (probed.num_fitted + 0.5) / len(log.ttft)
                fit = calibrate(log, own, share)
            coefficients, errors, undetermined = fit.coefficients, fit.standard_error, fit.undetermined()
            if not from_afar:
                coefficients = coefficients | {"network_delay": delay}
            _show(console, model, coefficients, errors, undetermined)
            for line in fit.trade_offs():
                console.print(f"  {line}", highlight=False)
            times = set(undetermined) - {"kv_capacity"}
            if probed is None and (times or fit.trade_offs()):
                probe_command = command_line("calibrate", "--probe", "URL", "--out", str(options.out))
                say(
                    console,
                    f"  {len(times) or 'some'} of them would be known from a probe of the server: {probe_command}",
                )
            some = "" if fit.num_compared == fit.num_fitted else f"{fit.num_compared} of "
            notes = [
                f"fitted to {some}the first {fit.num_fitted} of {len(log.ttft)} requests of {path.name}; of the others:"
            ]
            for name, (measured, simulated) in fit.means.items():
                notes.append(f"mean {name} {measured:.4g} s measured, {simulated:.4g} s simulated")
                console.print(f"  {notes[-1]} ({simulated / measured - 1:+.1%})", highlight=False)
            figures[f"{options.out.stem}_{path.name.partition('.')[0]}.png"] = (log, fit)
        experts.append(_expert_yaml(model, accelerator, coefficients, errors, notes, options))
    header = f"# Written by python -m jaxroute calibrate.\nname: {options.out.stem}\nexperts:\n"
    write_choice("site", options.out, "".join([header, *experts]), check=lambda config: build_site(config.site))
    for name, (log, fit) in figures.items():
        say(console, f"Figure: {write_file(options.out.parent / name, png_bytes(_figure(log, fit)))}")
    say(console, f"Site: {options.out}")
    say(console, f"Use it with: {usage_of_choice('site', options.out)}")


def _probed(options: argparse.Namespace, console: Console) -> Probed:
    """Probe the server."""
    # Imported here: who has a log does without.
    from jaxroute.gateway.probe import probe

    for name in ("probe_batch", "probe_context", "probe_tokens"):
        least = 16 if name == "probe_context" else 2
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least {least}")
    key = os.environ.get(options.probe_key_env) if options.probe_key_env else None
    if options.probe_key_env and not key:
        raise UserError(
            f"--probe-key-env: the environment variable {options.probe_key_env} is not set; set it to the key"
        )
    seats = min(options.probe_batch, options.max_num_seqs)
    with console.status(f"probing {options.probe}"):
        return asyncio.run(
            probe(
                options.probe.rstrip("/"), seats=seats, context=options.probe_context,
                output_tokens=options.probe_tokens, key=key,
            )
        )  # fmt: skip


def _of_each(given: list[str] | None, logs: list[Path], option: str, default: list[str]) -> list[str]:
    if given is None:
        return default
    if len(given) not in (1, len(logs)):
        raise UserError(f"{option} is given {len(given)} times for {len(logs)} logs; give it once, or once per log")
    return given * len(logs) if len(given) == 1 else given


def _show(
    console: Console,
    model: str,
    coefficients: dict[str, float],
    errors: dict[str, float],
    undetermined: dict[str, str],
) -> None:
    table = Table("coefficient", "value", "standard error", "", title=model)
    for name in (*COEFFICIENTS, "network_delay"):
        table.add_row(name, _number(coefficients[name]), _error(errors[name]), undetermined.get(name, ""))
    console.print(table)


def _number(value: float) -> str:
    return str(round(value)) if value >= 1 else f"{value:.4g}"


def _error(error: float) -> str:
    return "given" if math.isnan(error) else "not determined" if error > 1 else f"± {error:.1%}"


def _expert_yaml(
    model: str,
    accelerator: str,
    coefficients: dict[str, float],
    errors: dict[str, float],
    notes: list[str],
    options: argparse.Namespace,
) -> str:
    lines = [f"  # {note}" for note in notes]
    lines += [f"  - model: {_quoted(model)}", f"    accelerator: {_quoted(accelerator)}"]
    lines.append(f"    iteration_overhead: {coefficients['iteration_overhead']:.6g} # given")
    for name in COEFFICIENTS[:-1]:
        lines.append(f"    {name}: {coefficients[name]:.5g} # {_error(errors[name])}")
    lines += [
        f"    max_num_seqs: {options.max_num_seqs}",
        f"    max_num_batched_tokens: {options.max_num_batched_tokens}",
        f"    max_waiting: {'null' if options.max_waiting is None else options.max_waiting}",
        f"    kv_capacity: {_number(coefficients['kv_capacity'])} # {_error(errors['kv_capacity'])}",
        f"    network_delay: {coefficients['network_delay']:.4g} # {_error(errors['network_delay'])}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _figure(log: ServingLog, fit: Calibration) -> Figure:
    """Measured against simulated, request by request."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    pairs = {"time to first token, s": (log.ttft, fit.ttft), "end-to-end latency, s": (log.latency, fit.latency)}
    for axes, (name, (measured, simulated)) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
        for label, part, colour in (
            ("earliest, to fit to", slice(None, fit.num_fitted), "0.6"),
            ("held out", slice(fit.num_fitted, None), "tab:blue"),
        ):
            axes.plot(measured[part], simulated[part], ".", color=colour, label=label, markersize=4)
        ends = [0, max(measured.max(), simulated.max())]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="measured", ylabel="simulated")
        axes.legend(frameon=False)
    return figure
