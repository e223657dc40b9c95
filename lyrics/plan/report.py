"""`lyrics plan`: the tables. Every number says whether it is computed, measured here, or assumed."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lyrics import compose
from lyrics import config as schema
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.numerics import has_native_bf16
from lyrics.plan import measure, memory, parts, refining, storage
from lyrics.plan.hardware import GIB, Assumptions, Hardware, read_assumptions, read_hardware

_OWN = ("pairs", "hardware")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the tables show. `rehearsed` is empty unless steps were measured."""

    config: Config
    assumed: Assumptions
    hardware: Hardware
    hardware_name: str
    pairs: int
    annotated: int
    parts: parts.Parts
    stages: dict[str, memory.StageCost]
    rehearsed: dict[str, measure.Rehearsed]

    def seconds_per_step(self, verb: str) -> tuple[float, str]:
        """With its source."""
        if verb in self.rehearsed:
            return self.rehearsed[verb].seconds_per_step, "measured steps"
        how = "measured rates" if self.hardware.source.startswith("measured") else "assumed rates"
        return self.stages[verb].seconds(self.hardware), f"computed, {how}"

    def peak_bytes(self, verb: str) -> float:
        """Computed for the strategy of params/; what measured steps took where that is more.

        Measured steps are all of one shape, and a stage's are not: kernels for other shapes come on top of them.
        """
        computed = chosen(self, verb).total
        return max(computed, self.rehearsed[verb].peak_bytes) if verb in self.rehearsed else computed


def chosen(found: Plan, verb: str) -> memory.Use:
    """Computed memory of a stage under the strategy of params/."""
    return next(use for use in memory.strategies(found.stages[verb], found.hardware) if use.chosen)


def plan(settings: Sequence[str], *, measured: bool = False, run: Path = compose.RUN) -> Plan:
    """The plan of `preset=… pairs=… hardware=…` and dotted overrides; nothing is written.

    Raises:
        InputError: a name, key or value is unknown; it says what there is.
    """
    own, others = _split(settings)
    pairs = _pairs(own.get("pairs"))
    config = schema.parse(compose.preview(others, run))
    assumed = read_assumptions(config.preset, run.parent)
    name = own.get("hardware", assumed.hardware)
    hardware = read_hardware(name, run.parent)
    if measured:
        hardware, name = measure.this_machine(hardware), "this machine"
    web, annotated = storage.pictures_of(config, assumed, pairs)
    with _quiet():
        built = parts.build(config, assumed)
        stages = {verb: memory.meter(stage, config, assumed, hardware) for verb, stage in memory.STAGES.items()}
    rehearsed: dict[str, measure.Rehearsed] = {}
    if measured:
        for verb, cost in stages.items():
            found = measure.rehearse(memory.STAGES[verb], config, assumed, cost, hardware)
            rehearsed |= {verb: found} if found else {}
    return Plan(
        config=config,
        assumed=assumed,
        hardware=hardware,
        hardware_name=name,
        pairs=web,
        annotated=annotated,
        parts=built,
        stages=stages,
        rehearsed=rehearsed,
    )


def text(found: Plan) -> str:
    """All tables."""
    config, hardware = found.config, found.hardware
    pictures = f"{found.pairs:,} pairs"
    if found.annotated:
        pictures += f" and {found.annotated:,} annotated pictures of the embedded world"
    head = (
        f"preset {config.preset}, {pictures}, hardware {found.hardware_name}: {hardware.devices} x "
        f"{hardware.memory_gib:,.0f} GiB, {hardware.bf16_tflops:.3g} bf16 and {hardware.fp32_tflops:.3g} fp32 TFLOP/s, "
        f"{hardware.bandwidth_gb_s:,.0f} GB/s ({hardware.source})"
    )
    return "\n\n".join([head, _parameters(found), _storage(found), _memory(found), _time(found)])


def _parameters(found: Plan) -> str:
    rows = [
        [c.name, _millions(c.total), _millions(c.stage1), _millions(c.stage2), c.source]
        for c in parts.counts(found.parts, found.assumed)
    ]
    return _table("Parameters, millions", ["part", "all", "pretrain trains", "finetune trains", "source"], rows)


def _storage(found: Plan) -> str:
    rows = storage.rows(found.config, found.assumed, found.parts, found.stages, found.pairs, found.annotated)
    total = sum(row.size_bytes for row in rows)
    fits = "fits" if total <= found.hardware.disk_gib * GIB else f"more than {found.hardware.disk_gib:,.0f} GiB"
    lines = [[row.name, _gib(row.size_bytes), row.how, row.source] for row in rows]
    return _table("Storage, GiB", ["what", "GiB", "how", "source"], [*lines, ["together", _gib(total), fits, ""]])


def _memory(found: Plan) -> str:
    rows = []
    for verb, cost in found.stages.items():
        for use in memory.strategies(cost, found.hardware):
            sizes = (use.weights, use.gradients, use.optimizer, use.activations, use.runtime, use.total)
            name = use.strategy + (" (set)" if use.chosen else "")
            rows.append([verb, name, f"{use.batch} x {cost.accumulate}", *map(_gib, sizes), str(use.largest_batch)])
        if verb in found.rehearsed:
            peak = _gib(found.rehearsed[verb].peak_bytes)
            rows.append([verb, "measured steps", f"{cost.batch} x {cost.accumulate}", "", "", "", "", "", peak, ""])
    heads = ["stage", "strategy", "batch", "weights", "gradients", "optimizer", "activations", "runtime", "all", "fits"]
    most, factor = f"{found.hardware.memory_gib:,.0f} GiB", found.hardware.allocator_factor
    note = (
        f"batch: samples of a device at once x accumulate; fits: the most samples at once that {most} hold; (set): by\n"
        f"params. Tensors are computed; "
        f"runtime, and {factor:g} times activations for their allocation, are from params/hardware"
    )
    return _table("Memory of one device, GiB", heads, rows) + "\n" + note


def _time(found: Plan) -> str:
    rows = []
    flops, seconds = _refining(found)
    pictures = found.pairs + found.annotated
    rows.append(["refine", f"{pictures:,} pictures", _tflop(flops), f"{seconds:.3g}", _span(seconds * pictures)])
    rows[-1].append("computed; one device, networks alone")
    for verb, cost in found.stages.items():
        steps = getattr(found.config, memory.STAGES[verb]).steps
        each, source = found.seconds_per_step(verb)
        flops = cost.flops * cost.ranks
        rows.append([verb, f"{steps:,} steps", _tflop(flops), f"{each:.3g}", _span(steps * each), source])
    note = "TFLOP and seconds of a picture or a step; all devices compute, and what they exchange is not in it."
    return _table("Time", ["stage", "how many", "TFLOP", "seconds", "all", "source"], rows) + "\n" + note


def _refining(found: Plan) -> tuple[float, float]:
    with _quiet():
        built = parts.build(found.config, found.assumed)
        return refining.seconds_per_picture(found.config, found.assumed, built, found.hardware)


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """Aligned columns; those of numbers to the right."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(not cell or cell[0].isdigit() for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e7 else f"{count / 1e6:,.3f}" if count else "0"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}"


def _tflop(flops: float) -> str:
    return f"{flops / 1e12:,.3g}" if flops < 1e14 else f"{flops / 1e12:,.0f}"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _split(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own = {key: value for key, _, value in (s.partition("=") for s in settings) if key in _OWN}
    return own, [s for s in settings if s.partition("=")[0] not in _OWN]


def _pairs(given: str | None) -> int | None:
    if given is None:
        return None
    digits = given.replace(",", "").replace("_", "")
    if not digits.isdigit() or int(digits) < 1:
        raise InputError(f"pairs is {given!r}; expected a whole number above 0, e.g. pairs=1000000")
    return int(digits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Weights without data cannot be initialised, of which libraries would tell."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def precision_here() -> list[str]:
    """Settings that say what `auto` is on this machine, where the planned hardware has products in bf16."""
    bf16 = has_native_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return [] if bf16 else ["stage1.precision=fp32", "stage2.precision=fp32"]


def needed_gib(preset: str, run: Path = compose.RUN) -> tuple[float, float]:
    """Memory and disk (data aside) of this machine for a preset: what `lyrics doctor` asks for.

    On a GPU's machine the memory is that which weights pass through before they reach the devices, in each process.
    """
    found = plan([f"preset={preset}", *precision_here()], run=run)
    runtime = found.hardware.runtime_gib * GIB
    if found.hardware.kind == "cuda":
        most = max(cost.ranks * (cost.weights + runtime) for cost in found.stages.values())
    else:
        most = max(found.peak_bytes(verb) for verb in found.stages)
    rows = storage.rows(found.config, found.assumed, found.parts, found.stages, pairs=0, annotated=0)
    return most / GIB, sum(row.size_bytes for row in rows) / GIB
