"""``hf-hybrid generate``: answer one prompt, or a file of them."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_hybrid.cli.command import DEFAULT_MODEL, Model, Threads, UsageError, console, load, quiet
from hf_hybrid.cli.jobs import answer_file, answer_json
from hf_hybrid.cli.options import given_settings, setting_parameters
from hf_hybrid.cli.plan import plans_to_write, read_plan_file
from hf_hybrid.cli.prompts import encode, read_prompt
from hf_hybrid.cli.race import RIVAL, Race, run_race
from hf_hybrid.cli.view import CanvasView, watchable
from hf_hybrid.config import SETTINGS, settings_for

Strategy = Literal["host", *SETTINGS]  # type: ignore[valid-type]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Read the prompt from this file; with --output, JSON lines of prompts."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answer every line of --input and append the answers to this file."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at the same time, with --output.")] = 8,
    strategy: Annotated[
        Strategy,  # type: ignore[valid-type]
        typer.Option("--strategy", "-s", help="How to write; host: generate() of transformers."),
    ] = "planned_diffusion",
    model: Model = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the best token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling, above 0; needs --do-sample.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Carry out this plan (JSON of hf-hybrid plan) instead of writing one.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Write this part of --plan (3, or 2.3: of round 2) and what depends on it anew."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, plan and report as JSON.")] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch/--no-watch", help="In a terminal: show plan and parts while they grow, or text alone."),
    ] = True,
    race: Annotated[
        bool, typer.Option("--race", help="Also write the answer token by token, to compare: watched, or in numbers.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", help="With --strategy speculative: draw which tokens were drafted to this .svg file."
        ),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
    **options: Any,
) -> None:
    """Write an answer to PROMPT.

    In a terminal plan and parts are shown while they grow, then the answer; elsewhere the text appears as it is
    confirmed. What no option names comes from the checkpoint.

    With --output, --input holds JSON lines: {"prompt": "..."} or {"messages": [...]}; other fields are kept, but for
    hf_hybrid (the settings), text, plan, report and error, which are of the answer. Answers are appended in the same
    order, one by one; a run that was interrupted goes on where it stopped, with the same settings. Lines that are no
    prompts are named and left out; a prompt that cannot be answered, being too long for example, gets its error and no
    text; in both cases the exit code is 1.
    """
    if plan is not None and strategy != "planned_diffusion":
        raise UsageError(f"--plan needs --strategy planned_diffusion, not {strategy}")
    if only is not None and plan is None:
        raise UsageError("--only needs --plan")
    if race and (strategy in ("host", RIVAL) or target is not None):
        raise UsageError("--race is one answer of another strategy against autoregressive: leave it out")
    if picture is not None and (strategy != "speculative" or target is not None):
        raise UsageError("--picture is of one answer of --strategy speculative: leave out --output")
    if picture is not None and (picture.suffix != ".svg" or not picture.resolve().parent.is_dir()):
        raise UsageError(f"--picture {picture}: give an .svg file in a folder that exists")
    if target is not None:
        _check_job(prompt, source, strategy, as_json or plan is not None)
    text = "" if target is not None else read_prompt(prompt, source)
    if temperature is not None and not do_sample:
        raise UsageError("--temperature needs --do-sample")
    if temperature is not None and not temperature > 0:
        raise UsageError(f"--temperature {temperature}: must be above 0")
    given = read_plan_file(plan) if plan is not None else None
    settings = given_settings(options)
    if strategy != "host":
        settings_for(strategy, settings)  # a wrong one is an error before the model is loaded
    call: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    if temperature is not None:
        call["temperature"] = temperature
    machine: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "threads": threads}
    with quiet():
        if target is not None and source is not None:
            call |= {"strategy": strategy, **settings}
            answer_file(source, target, call, **machine, chat=chat, batch_size=batch_size)
            return
        network, tokenizer, _ = load(model, dtype, device, threads)
        call["tokenizer"] = tokenizer  # of stop strings that the checkpoint names
        goes_on = bool(settings.get("continue_final_message"))
        inputs = {name: ids.to(network.device) for name, ids in encode(tokenizer, text, chat, goes_on).items()}
        rival = run_race(network, inputs, strategy, call) if race else None
        call |= _how(strategy, settings)
        if given is not None:
            call["plan"] = _checked(plans_to_write(given, only, tokenizer), network, settings, plan)
        shown = "json" if as_json else "view" if watch else "text"
        output = _write(network, tokenizer, inputs, call, rival, shown)
        if picture is not None:
            from hf_hybrid.cli.acceptance import acceptance_svg

            new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            svg = acceptance_svg([tokenizer.decode([token]) for token in new], output.report[0])
            picture.write_text(svg, encoding="utf-8")
        if as_json:
            new = output.sequences[0, inputs["input_ids"].shape[1] :]  # (new,)
            written = tokenizer.decode(new, skip_special_tokens=True)
            content = answer_json(written, output.report[0] if strategy != "host" else None, tokenizer)
            if rival is not None:
                plain = tokenizer.decode(rival.tokens, skip_special_tokens=True)
                content["race"] = answer_json(plain, rival.report, tokenizer)
            typer.echo(json.dumps(content, ensure_ascii=False, indent=1))


def _checked(plans: list[Any], network: Any, settings: dict[str, Any], source: Path | None) -> list[Any]:
    """Check that this model can carry out ``plans``."""
    from hf_hybrid import PlanError, control_tokens, grammar_of

    control = control_tokens(network)
    if control is None or control.tags is None:
        return plans
    stored = getattr(network.generation_config, "hf_hybrid", None)
    limits = settings_for("planned_diffusion", settings, stored).limits  # type: ignore[attr-defined]
    try:
        return [grammar_of(control, limits=limits).check(plan) for plan in plans]
    except PlanError as error:
        raise UsageError(f"--plan {source}: {error}") from error


def _how(strategy: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate()`` that choose ``strategy``; for the host its seed is set and not passed."""
    if strategy != "host":
        return {"strategy": strategy, **settings}
    seed = settings.pop("seed", None)
    if settings:
        raise UsageError(f"--strategy host takes no settings, not {', '.join(sorted(settings))}")
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    return {"hf_hybrid": {}}  # the host, also where the checkpoint names a strategy


def _write(
    network: Any, tokenizer: Any, inputs: dict[str, Any], call: dict[str, Any], rival: Race | None, shown: str
) -> Any:
    """Call ``generate()`` and show its text.

    ``shown``: ``json``: nothing; ``text``: tokens as they are confirmed; ``view``: the canvas, or text where it cannot
    be drawn.
    """
    from transformers import TextStreamer

    from hf_hybrid import control_tokens

    out = console()
    strategy, call = call.get("strategy"), {**call, "return_dict_in_generate": True}
    if shown == "json":
        return network.generate(**inputs, **call)
    if shown == "view" and strategy not in (None, RIVAL) and watchable(out):
        view = CanvasView(out, tokenizer.decode, strategy, control_tokens(network), race=rival)
        with view:
            output = network.generate(**inputs, **call, streamer=view)
            view.finish_race()
        new = output.sequences[0, inputs["input_ids"].shape[1] :]  # (new,)
        typer.echo(tokenizer.decode(new, skip_special_tokens=True))
        typer.echo(_numbers(output.report[0], view.clock), err=True)
    else:
        begin = time.perf_counter()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = network.generate(**inputs, **call, streamer=streamer)
        if rival is not None:
            typer.echo(_numbers(output.report[0], time.perf_counter() - begin), err=True)
    if rival is not None:
        typer.echo(_numbers(rival.report, rival.seconds), err=True)
    return output


def _numbers(report: Any, seconds: float) -> str:
    """The numbers of an answer in one line."""
    parts = f"{len(report.spans)} parts, " if report.spans else ""
    return (
        f"{report.strategy}: {report.num_tokens} tokens, {parts}{report.num_forwards} passes, "
        f"{report.tokens_per_forward:.1f} tokens a pass, {seconds:.2f} s"
    )


generate.__signature__ = (
    lambda s: s.replace(  # type: ignore[attr-defined]
        parameters=[*(p for p in s.parameters.values() if p.kind is not p.VAR_KEYWORD), *setting_parameters()]
    )
)(inspect.signature(generate, eval_str=True))


def _check_job(prompt: str | None, source: Path | None, strategy: str, one: bool) -> None:
    """Raise for options that do not go with --output; ``one``: True: one of them is for a single answer."""
    if prompt is not None or source is None:
        raise UsageError("--output needs --input FILE with one prompt a line, and no PROMPT")
    if one:
        raise UsageError("--output writes JSON, and every prompt its own plan: leave --json and --plan out")
    if strategy == "host":
        raise UsageError("--output needs a strategy of this package; try --strategy autoregressive")
