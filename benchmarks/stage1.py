"""Stage 1 beside the published recipe on transformers' Q-Former: speed, memory, and how near both come to the machine.

    python -m benchmarks.stage1 --widths tiny laptop paper --write docs/benchmarks.md

Both have the same weights, pairs, negatives, precision, threads and optimiser; their losses are compared before the
clock starts. Programs take turns, step by step, so that a busy machine slows all of them.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stage1_programs import OURS, PAIRS, PEERS, Program, build, patches
from benchmarks.table import write_table
from lyrics import numerics
from lyrics.process import keep_freed_memory

CPU = torch.device("cpu")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of a loss
MATMUL_SIDE = 2048
NAMES = (OURS, *PEERS)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program at one width."""

    width: str
    name: str
    seconds: list[float]
    flops: int
    memory_bytes: int


def step(program: Program, precision: numerics.Precision) -> None:
    """Forward, backward, AdamW."""
    if program.deterministic:
        numerics.use_deterministic_kernels()
    else:
        torch.use_deterministic_algorithms(False)
    with numerics.autocast(CPU, precision):
        loss = torch.stack(list(program.losses().values())).sum()
    loss.backward()
    for one in program.optimizers:
        one.step()
        one.zero_grad()


def check_losses(programs: Sequence[Program], precision: numerics.Precision) -> None:
    """Without dropout, every program that sees the same features has our losses."""
    found = {}
    for program in programs:
        program.module.eval()
        with torch.no_grad(), numerics.autocast(CPU, precision):
            found[program.name] = {name: float(loss) for name, loss in program.losses().items()}
        program.module.train()
    for name, values in found.items():
        if name in PEERS and PEERS[name].encoder:
            continue
        worst = max(abs(value - found[OURS][loss]) for loss, value in values.items())
        if worst > TOLERANCE[precision]:
            raise AssertionError(f"{name} is not the same computation: {values}, ours {found[OURS]}")


def alternate(
    programs: Sequence[Program], precision: numerics.Precision, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each step, and the FLOP/s of the best matrix product between them."""
    seconds: dict[str, list[float]] = {program.name: [] for program in programs}
    multiply = matmul(precision)
    best = math.inf
    for _ in range(repeats):
        for program in programs:
            seconds[program.name].append(timed(functools.partial(step, program, precision)))
            best = min(best, *(timed(multiply) for _ in range(3)))
    return seconds, 2 * MATMUL_SIDE**3 / best


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matmul(precision: numerics.Precision) -> Callable[[], object]:
    """The product of two large square matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE).to(dtype)
    return lambda: a @ b


def count_flops(program: Program, precision: numerics.Precision) -> int:
    """Matrix products and convolutions of one step, which is taken; it is also the one that warms up.

    The counter does not know the fused attention of the CPU; taken apart, its products are counted like all others.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        step(program, precision)
    return counter.get_total_flops()


def peak_memory(width: str, name: str, precision: numerics.Precision) -> int:
    """How far the resident set of a process of its own rises above the imports, in two steps."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rise, width, name, precision, torch.get_num_threads()).result()


def _rise(width: str, name: str, precision: numerics.Precision, threads: int) -> int:
    torch.set_num_threads(threads)
    before = high_water_mark()
    (program,) = build(width, [name])
    for _ in range(2):
        step(program, precision)
    return high_water_mark() - before


def high_water_mark() -> int:
    # Not getrusage: its maximum is inherited from the parent on Linux.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(width: str, precision: numerics.Precision, repeats: int) -> tuple[list[Measured], float]:
    """All programs at one width, and the FLOP/s of the best matrix product.

    Steps are timed as stages run, with freed memory kept; peak memory is taken in processes that give it back.
    """
    keep_freed_memory()
    memory = {name: peak_memory(width, name, precision) for name in NAMES}
    programs = build(width, NAMES)
    check_losses(programs, precision)
    flops = {p.name: count_flops(p, precision) for p in programs}
    seconds, peak = alternate(programs, precision, repeats)
    measured = [Measured(width, p.name, seconds[p.name], flops[p.name], memory[p.name]) for p in programs]
    return measured, peak


def table(measured: Sequence[Measured], peak: float) -> str:
    """One row per program; `ours is` compares steps of the same round."""
    rows = [
        "| width | program | samples/s | ours is | GFLOP a step | bound, samples/s | of the peak | peak memory, MiB |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    ours = {m.width: m for m in measured if m.name == OURS}
    for m in measured:
        pairs, seconds = PAIRS[m.width], statistics.median(m.seconds)
        ratio = statistics.median(t / o for t, o in zip(m.seconds, ours[m.width].seconds, strict=True))
        rows.append(
            f"| {m.width} | {m.name} | {pairs / seconds:.2f} | {'' if m.name == OURS else f'{ratio:.2f} ×'} "
            f"| {m.flops / 1e9:.1f} | {pairs * peak / m.flops:.2f} | {m.flops / seconds / peak:.0%} "
            f"| {m.memory_bytes / 2**20:.0f} |"
        )
    return "\n".join(rows)


def machine(peak: float, precision: numerics.Precision, repeats: int) -> str:
    threads = torch.get_num_threads()
    return (
        f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {precision}; best product of two {MATMUL_SIDE} × {MATMUL_SIDE} matrices: "
        f"{peak / 1e9:.0f} GFLOP/s; medians of {repeats} rounds."
    )


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def sizes(widths: Sequence[str]) -> str:
    return "A step: " + ", ".join(f"{PAIRS[w]} pairs of {patches(w)} image tokens ({w})" for w in widths) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, help="a document with the markers of stage1-fp32 or stage1-bf16")
    chosen = parser.parse_args()
    measured, peaks = [], []
    for width in chosen.widths:
        found, peak = measure(width, chosen.precision, chosen.repeats)
        measured += found
        peaks.append(peak)
    text = "\n\n".join(
        [
            table(measured, max(peaks)),
            machine(max(peaks), chosen.precision, chosen.repeats) + " " + sizes(chosen.widths),
        ]
    )
    print(text)
    if chosen.write:
        write_table(chosen.write, f"stage1-{chosen.precision}", text)


if __name__ == "__main__":
    main()
