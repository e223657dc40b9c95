"""`python -m lyrics.plan.rehearsal STAGE BATCH`: steps of one stage on random numbers, in a process of its own.

Reads the configuration and the assumptions as JSON on standard input; prints what one line of JSON says.
"""

import json
import resource
import statistics
import sys
import time

_STEPS, _SECONDS = 8, 20.0


def rehearse(stage: str, batch: int, values: dict, assumed: dict) -> dict[str, float]:
    """Seconds a step, and the most memory in bytes."""
    from pydantic import TypeAdapter

    from lyrics import config as schema
    from lyrics import numerics
    from lyrics.plan import parts, steps
    from lyrics.plan.hardware import Assumptions
    from lyrics.process import keep_freed_memory

    config = schema.parse(values)
    keep_freed_memory()  # as a stage does
    numerics.use_deterministic_kernels()
    assumptions = TypeAdapter(Assumptions).validate_python(assumed)
    built = parts.build(config, assumptions, "cpu")
    trainee = steps.take(stage, config, assumptions, built, batch)
    if trainee.compile:
        for block in trainee.blocks:
            block.compile(dynamic=True)
    ready = time.perf_counter()
    kinds = range(len(trainee.shares))
    for kind in kinds:
        trainee.step(kind)
    times: list[list[float]] = [[] for _ in kinds]
    while len(times[0]) < _STEPS and (not times[0] or time.perf_counter() - ready < _SECONDS):
        for kind in kinds:
            begun = time.perf_counter()
            trainee.step(kind)
            times[kind].append(time.perf_counter() - begun)
    return {
        "seconds_per_step": sum(s * statistics.median(t) for s, t in zip(trainee.shares, times, strict=True)),
        "peak_bytes": _most_memory(),
    }


def _most_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(rehearse(sys.argv[1], int(sys.argv[2]), given["config"], given["assumed"])))
