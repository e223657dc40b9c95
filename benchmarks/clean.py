"""Web pairs through `clean`, and pictures that look alike: ours beside imagededup and faiss.

    python -m venv build/peer && build/peer/bin/pip install imagededup faiss-cpu ImageHash
    python -m benchmarks.clean --write docs/benchmarks.md

All see the same pictures; which of them are copies of which is known. Programs take turns, a round each, every run in a
process of its own. Speed is pairs by seconds of the processor, imports left out, so a busy machine hardly changes it.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import clean_pairs
from benchmarks.clean_programs import ROOT
from benchmarks.stage1 import cpu_name
from benchmarks.table import write_table
from benchmarks.watch import watched
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError

OURS, DEDUP, FAISS, WHOLE = "ours, hash and search", "imagededup", "imagehash and faiss", "ours, all of clean"
QUADRATIC_LIMIT = 10_000
PEER_PYTHON = Path("build/peer/bin/python")
_PEER_NAMES = {DEDUP: "imagededup", FAISS: "faiss"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program at one size: medians of its rounds."""

    pairs: int
    name: str
    seconds: float  # of the processor
    search_seconds: float | None
    memory_bytes: int  # above what was held before the first pair
    found: int
    wrong: int

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds


def check_peer(python: Path) -> None:
    """Raises: InputError: it lacks the libraries, or is not there."""
    try:
        subprocess.run([python, "-c", "import imagededup, faiss, imagehash"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error).encode()).decode().strip().splitlines()[-1]
        raise InputError(
            f"{python} cannot run the peers ({said}); make it with: python -m venv build/peer && build/peer/bin/pip "
            "install imagededup faiss-cpu ImageHash, or name another with --peer-python"
        ) from None


def unpack(folder: Path) -> None:
    """The pictures of the tars as files, which is what the peers read."""
    (folder / "pictures").mkdir()
    for tar in sorted((folder / "data/raw/web").glob("*.tar")):
        for pair in read_pairs(tar):
            (folder / "pictures" / f"{pair.key}.jpg").write_bytes(pair.image_bytes or b"")


def score(links: Iterable[Sequence[str]]) -> tuple[int, int]:
    """How many planted copies are linked to a picture that shows the same, how many pictures to one that does not."""
    found, wrong = set(), set()
    for one, other in links:
        late, early = (clean_pairs.planted(int(key)) for key in (one, other))
        if late.motif != early.motif:
            wrong.add(one)
        elif late.reason == "duplicate":
            found.add(one)
    return len(found), len(wrong)


def run(name: str, folder: Path, peer_python: Path) -> dict[str, Any]:
    """One program in a process of its own, on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name in _PEER_NAMES:
        environment.pop("PYTHONPATH", None)  # its environment has its own libraries
        script = Path(__file__).with_name("clean_peer.py")
        return watched([str(peer_python), str(script), _PEER_NAMES[name], "pictures"], folder, environment)
    shutil.rmtree(folder / "work", ignore_errors=True)
    program = "clean" if name == WHOLE else "search"
    command = [sys.executable, "-P", "-m", "benchmarks.clean_programs", program]
    return watched(command, folder, {**environment, "PYTHONPATH": str(ROOT)})


def measure(count: int, names: Sequence[str], rounds: int, peer_python: Path) -> tuple[list[Measured], dict[str, str]]:
    """The programs at one size, and the versions of the peers."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clean_pairs.write(folder, count)
        unpack(folder)
        for _ in range(rounds):
            for name in names:
                said[name].append(run(name, folder, peer_python))
    versions = {package: version for runs in said.values() for package, version in runs[0].get("versions", {}).items()}
    return [_summary(count, name, runs) for name, runs in said.items()], versions


def _summary(count: int, name: str, runs: Sequence[Mapping[str, Any]]) -> Measured:
    searches = [one["search_seconds"] for one in runs if "search_seconds" in one]
    return Measured(
        count,
        name,
        statistics.median(one["cpu_seconds"] for one in runs),
        statistics.median(searches) if searches else None,
        round(statistics.median(one["pss_bytes"] - one["before_bytes"] for one in runs)),
        *score(runs[0]["links"]),
    )


def table(measured: Sequence[Measured], limit: int) -> str:
    """One row per program and size; `growth` compares the time of a pair with that of the size before."""
    rows = [
        "| pairs | program | pairs/s | ours is | growth | search, ms a pair | memory, MiB | copies found | wrong |",
        "| --: | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    known = {(one.pairs, one.name): one for one in measured}
    sizes = sorted({one.pairs for one in measured})
    for size, before in zip(sizes, [0, *sizes], strict=False):
        planted = sum(clean_pairs.planted(number).reason == "duplicate" for number in range(size))
        for name in (OURS, DEDUP, FAISS, WHOLE):
            if (size, name) in known:
                rows.append(_row(known[size, name], known.get((before, name)), known[size, OURS], planted))
        slow = max((one for one in measured if one.name == DEDUP), key=lambda one: one.pairs, default=None)
        if (size, DEDUP) not in known and slow is not None and slow.search_seconds is not None:
            hours = slow.search_seconds * (size / slow.pairs) ** 2 / 3600
            rows.append(f"| {size:,} | {DEDUP} | stopped at {limit:,}: by its growth about {hours:.1f} h |||||||")
    return "\n".join(rows)


def _row(one: Measured, before: Measured | None, ours: Measured, planted: int) -> str:
    ratio = f"{ours.rate / one.rate:.2f} ×" if one.name in _PEER_NAMES else ""
    growth = f"{before.rate / one.rate:.2f} ×" if before else ""
    search = "" if one.search_seconds is None else f"{1000 * one.search_seconds / one.pairs:.3f}"
    return (
        f"| {one.pairs:,} | {one.name} | {one.rate:.0f} | {ratio} | {growth} | {search} "
        f"| {one.memory_bytes / 2**20:.0f} | {one.found} of {planted} | {one.wrong} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of the environment that has the peers")
    parser.add_argument("--quadratic-limit", type=int, default=QUADRATIC_LIMIT, help="most pairs that imagededup gets")
    parser.add_argument("--write", type=Path, help="a document with the markers of clean")
    chosen = parser.parse_args()
    python = chosen.peer_python.absolute()  # not resolved: the link says which environment it is
    try:
        check_peer(python)
    except InputError as error:
        raise SystemExit(str(error)) from None
    measured: list[Measured] = []
    versions: dict[str, str] = {}
    for count in sorted(chosen.counts):
        names = [name for name in (OURS, DEDUP, FAISS, WHOLE) if name != DEDUP or count <= chosen.quadratic_limit]
        found, seen = measure(count, names, chosen.rounds, python)
        measured += found
        versions |= seen
    packages = {name: importlib.metadata.version(name) for name in ("pillow", "numpy")} | versions
    caption = (
        f"{cpu_name()}, one core; {', '.join(f'{name} {version}' for name, version in packages.items())}; medians of "
        f"{chosen.rounds} rounds."
    )
    text = f"{table(measured, chosen.quadratic_limit)}\n\n{caption}"
    print(text)
    if chosen.write:
        write_table(chosen.write, "clean", text)


if __name__ == "__main__":
    main()
