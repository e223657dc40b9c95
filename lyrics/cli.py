"""`python -m lyrics VERB` (or `lyrics VERB`): one verb per stage of dvc.yaml and per wish of a user.

Everything heavy is imported inside the verb that needs it, so that `--help` answers at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from lyrics.stage import one_sentence, run_stage

PARTS = ("tokenizer", "llm", "clip", "tagger", "detector", "segmenter")
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Lyrics: from raw image-text pairs to a registered model that answers questions about pictures.",
)
STAGES, USE = "Stages of dvc.yaml (run them with `dvc repro` or `make run`)", "Using it"


def _run_of(module: str) -> Callable[..., None]:
    """Its `run`, imported when that is called: the lock is held then, and inputs are there. It takes seconds."""
    return lambda *given: import_module(module).run(*given)


def _stage(name: str, run: Callable[..., None], *first: Any) -> None:
    """Run one stage with the composed configuration and a tracked run."""
    from lyrics import config
    from lyrics.track import runs

    def body(work: Path) -> None:
        settings = config.load()
        _check_device(settings.device)
        with runs.stage_run(name, settings) as tracker:
            run(*first, settings, work, tracker)
            tracker.published(work / "out")

    run_stage(name, body)


def _check_device(name: str) -> None:
    if name in ("auto", "cpu"):
        return
    import torch

    from lyrics.errors import InputError

    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(number or 0) >= count:
        raise InputError(
            f"device is {name}, but this machine has {count} devices of the kind {kind}; "
            "take what there is with: python -m lyrics configure device=auto"
        )


def _check_processes(key: str, processes: int, device: str) -> None:
    """Each process needs a GPU of its own, where they train on GPUs."""
    import torch

    from lyrics.errors import InputError

    if device.startswith("cuda:"):
        raise InputError(f"{key} is {processes} but device is {device}, one GPU; set device to auto or cuda")
    count = torch.cuda.device_count()
    if processes > count and (device == "cuda" or (device == "auto" and count)):
        raise InputError(
            f"{key} is {processes}, but this machine has {count} GPUs; set it to {count} at most, or train on the "
            "processor with: python -m lyrics configure device=cpu"
        )


@app.command(rich_help_panel=STAGES)
def compose() -> None:
    """Write build/config.yaml from params/."""
    from lyrics import compose as composing
    from lyrics.stage import leaving_token

    with leaving_token("compose"):
        composing.write(composing.compose())


@app.command(rich_help_panel=STAGES)
def ingest() -> None:
    """Write the embedded world, or read your folder, into data/raw."""
    _stage("ingest", _run_of("lyrics.data.ingest"))


@app.command(rich_help_panel=STAGES)
def foundation(part: Annotated[str, typer.Argument(help=f"One of: {', '.join(PARTS)}.")]) -> None:
    """Fit or fetch one frozen part into models/foundation/PART."""
    from lyrics.errors import InputError

    if part not in PARTS:
        raise InputError(f"foundation has no part {part!r}; choices: {', '.join(PARTS)}")
    _stage(f"foundation@{part}", _run_of("lyrics.foundation.fit"), part)


@app.command(rich_help_panel=STAGES)
def clean() -> None:
    """Drop unusable web pairs, each with its reason, into data/clean."""
    _stage("clean", _run_of("lyrics.data.clean"))


@app.command(rich_help_panel=STAGES)
def refine() -> None:
    """Find tags, boxes and masks in every picture and cache frozen features in data/refined."""
    _stage("refine", _run_of("lyrics.refiner.refine"))


@app.command(rich_help_panel=STAGES)
def pretrain() -> None:
    """Stage 1: train MQ-Former into models/stage1."""
    _stage("pretrain", _in_processes("pretrain"))


@app.command(rich_help_panel=STAGES)
def finetune() -> None:
    """Stage 2: instruction tuning with the language model into models/stage2."""
    _stage("finetune", _in_processes("finetune"))


def _in_processes(stage: str) -> Callable[..., None]:
    """A training stage, here or in as many processes as params/ says."""

    def run(settings: Any, work: Path, tracker: Any) -> None:
        name = _TRAINING[stage]
        chosen = getattr(settings, name)
        processes = chosen.processes
        if processes == 1:
            return _trainer(stage)(settings, work, tracker)
        _check_processes(f"{name}.processes", processes, settings.device)
        from lyrics.train.devices import Ranks
        from lyrics.train.launch import launch

        Ranks(0, processes).check(chosen.batch_size, chosen.accumulate, name)
        launch(processes, stage, work, tracker.run_id)

    return run


_TRAINING = {"pretrain": "stage1", "finetune": "stage2"}


def _trainer(stage: str) -> Callable[..., None]:
    return _run_of(f"lyrics.train.{_TRAINING[stage]}")


@app.command(hidden=True)
def worker(stage: str, work: Path, run_id: Annotated[str | None, typer.Option()] = None) -> None:
    """One of the processes that train a stage together; torchrun starts it and says which it is."""
    from lyrics import config
    from lyrics.process import die_with_parent, keep_freed_memory
    from lyrics.stage import NullTracker, verdict
    from lyrics.track import runs
    from lyrics.train.launch import report_failure

    die_with_parent()
    keep_freed_memory()
    rank = int(os.environ.get("RANK", 0))
    try:
        with runs.continued(run_id) if run_id and rank == 0 else contextlib.nullcontext(NullTracker()) as tracker:
            _trainer(stage)(config.load(), work, tracker)
    except Exception as error:
        report_failure(work, *verdict(error))
        raise


@app.command(rich_help_panel=STAGES)
def evaluate() -> None:
    """Score models/stage2 beside its baselines into reports/."""
    _stage("evaluate", _run_of("lyrics.evaluate.evaluate"))


@app.command(rich_help_panel=USE)
def configure(
    settings: Annotated[list[str], typer.Argument(help="preset=…, data=…, folder=…, dotted.key=value, ~dotted.key")],
) -> None:
    """Change params/run.yaml, if the result is a valid configuration."""
    from lyrics.compose import configure as change

    choices = change(settings)
    print(", ".join(f"{key} {value}" for key, value in choices.items()))


@app.command(rich_help_panel=USE)
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    questions: Annotated[list[str], typer.Argument(help="What you want to know about it; each is answered by itself.")],
    boxes: Annotated[Path | None, typer.Option(help="Also draw what the refiner saw into this PNG.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    beams: Annotated[int, typer.Option(help="Beams of beam search; 1 is greedy.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Answer questions about a picture by the champion, else the candidate, else the local model; one a line."""
    _check_picture(image)
    from lyrics.inference import ask as answer
    from lyrics.model.language import Decoding

    decoding = Decoding(num_beams=beams, temperature=temperature, top_p=top_p, seed=seed)
    said = answer(image, questions, boxes, max_new_tokens, decoding)
    print(*said.answers, sep="\n")
    print(f"({said.source})", file=sys.stderr)


@app.command(rich_help_panel=USE)
def attend(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What you want to know about it.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("attend.html"),
    answer: Annotated[str | None, typer.Option(help="Explain this answer in place of the model's own.")] = None,
) -> None:
    """Show where the queries look and which objects the answer leaned on, as one HTML page."""
    _check_picture(image)
    from lyrics.attend import attend as examine

    said = examine(image, question, out, answer)
    print(said.own_answer)
    print(f"({said.source}; {out})", file=sys.stderr)


@app.command(rich_help_panel=USE)
def inspect(
    refined: Annotated[Path, typer.Argument(help="Refined data.")] = Path("data/refined"),
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/inspect"),
    split: Annotated[list[str] | None, typer.Option(help="Only this split; may be given several times.")] = None,
) -> None:
    """Show what the refiner saw as a gallery: boxes, masks, tags and spatial text of every picture."""
    from lyrics.inspect import inspect as write

    gallery = write(refined, out, split or ())
    gone = f"; {gallery.missing} could not be opened, their cards say why" if gallery.missing else ""
    print(f"{gallery.images} pictures{gone}: {gallery.index}")


def _check_picture(image: Path) -> None:
    """Before the model is imported, which takes seconds."""
    from lyrics.errors import InputError

    if not image.is_file():
        found = "is a folder" if image.is_dir() else "does not exist"
        raise InputError(f"{image} {found}; give the path of a JPEG, PNG or WebP picture")


@app.command(name="evaluate-full", rich_help_panel=USE)
def evaluate_full() -> None:
    """Score on every sample of every split, into build/evaluate-full; no stage, and resumed if interrupted."""
    from lyrics import config
    from lyrics.stage import NullTracker, locked

    work, settings = Path("build/evaluate-full"), config.load()
    with locked("evaluate-full"):
        from lyrics.evaluate.evaluate import run_full

        run_full(settings, work, NullTracker())
    print(work / "out" / "index.html")


@app.command(rich_help_panel=USE)
def register() -> None:
    """Register models/stage2 in MLflow as `candidate`; the same content keeps its version."""
    from lyrics import config
    from lyrics.track.registry import register as enter

    print(enter(config.load()))


@app.command(rich_help_panel=USE)
def promote(
    version: Annotated[int | None, typer.Argument(help="A registered version; the candidate if left out.")] = None,
    rollback: Annotated[bool, typer.Option(help="Make the former champion champion again.")] = False,
    reason: Annotated[str, typer.Option(help="Kept in the audit trail.")] = "",
) -> None:
    """Make a version the champion if it passes the gates of params/promote."""
    from lyrics.evaluate.again import evaluate_again
    from lyrics.track import promotion

    if rollback:
        print(promotion.rollback(reason, version=version))
    else:
        print(promotion.promote(version, evaluate_again=evaluate_again, reason=reason))


@app.command(rich_help_panel=USE)
def plan(
    settings: Annotated[
        list[str] | None, typer.Argument(help="preset=…, pairs=…, hardware=…, dotted.key=value of params/")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure this machine, and steps where they fit.")] = False,
) -> None:
    """Say what a preset needs before it is run: parameters, storage, memory by strategy, time of its stages."""
    from lyrics.plan import report

    print(report.text(report.plan(settings or [], measured=measure)))


@app.command(rich_help_panel=USE)
def doctor() -> None:
    """Say what is missing on this machine and what to do about it."""
    from lyrics.doctor import examine

    raise typer.Exit(examine())


def main() -> None:
    debug = "--debug" in sys.argv
    with one_sentence(debug):
        app([argument for argument in sys.argv[1:] if argument != "--debug"], standalone_mode=True)
