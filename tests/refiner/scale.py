"""`refine` over many generated pictures: `scale.py write COUNT` makes them, `scale.py run` refines and prints figures.

Both in a folder that has models/foundation. Apart, because a process never forgets its peak of memory.
"""

import dataclasses
import itertools
import json
import resource
import sys
import time
from pathlib import Path

from lyrics.compose import compose
from lyrics.config import Config, Dirt, parse
from lyrics.data.webdataset import WebPair, write_tar

ROOT = Path(__file__).parents[2]
PAIRS_PER_TAR = 500


def configuration() -> Config:
    """`tiny`; one worker, whose memory is that of the process, and one thread, whose time is that of the work."""
    config = parse(compose(ROOT / "params" / "run.yaml"))
    engine = dataclasses.replace(config.engine, kind="local", workers=1, threads_per_worker=1)
    return dataclasses.replace(config, engine=engine)


def write(count: int) -> None:
    """Clean pairs of the embedded world, as `clean` would leave them."""
    from lyrics.world import datasets

    config = configuration()
    none = Dirt(**dict.fromkeys((field.name for field in dataclasses.fields(Dirt)), 0.0))
    scenes = dataclasses.replace(config.world.scenes, web=count)
    items = datasets.web_items(0, dataclasses.replace(config.world, dirt=none, scenes=scenes))
    pairs = (WebPair(key=i.key, image_bytes=i.image_bytes, caption=i.caption, meta={}) for i in items)
    for number in range(-(-count // PAIRS_PER_TAR)):
        write_tar(Path(f"data/clean/{number:05d}.tar"), itertools.islice(pairs, PAIRS_PER_TAR))


def run() -> dict[str, float]:
    """Seconds by the clock and of the processor, without imports; the peak of memory; and what was made."""
    from lyrics import io
    from lyrics.refiner import refine
    from lyrics.stage import NullTracker

    work = Path("work")
    started, busy = time.perf_counter(), time.process_time()
    refine.run(configuration(), work, NullTracker())
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    web = io.read_json(work / "out" / "summary.json")["splits"]["web"]
    return {
        **spent,
        "peak_mib": peak_mib,
        "images": web["images"],
        "objects": web["objects"],
        "samples": web["samples"],
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(int(sys.argv[2]))
    else:
        print(json.dumps(run()))
