"""Libraries that find pictures which look alike: `python clean_peer.py NAME FOLDER`, in an environment of their own.

Nothing of this project is imported. The last line printed is JSON, as that of `clean_programs.py`; `versions` on top.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

HASH_SIDE, MAX_BITS = 16, 24  # as `clean` of `tiny`


def imagededup(folder):
    """Its `find_duplicates` with its hash of 64 bits, its own threshold of 10 bits and its default search."""
    from imagededup.methods import PHash

    def run():
        finder = PHash(verbose=False)
        encodings = finder.encode_images(folder, num_enc_workers=0)
        started = busy()
        similar = finder.find_duplicates(encoding_map=encodings, num_dist_workers=0)
        links = [(Path(a).stem, Path(b).stem) for a, others in similar.items() for b in others if a > b]
        return {"links": links, "search_seconds": busy() - started}

    return run


def faiss(folder):
    """The hash that we use (imagehash, 256 bits), and all pairs of hashes compared by faiss's binary index."""
    import imagehash
    import numpy
    from faiss import IndexBinaryFlat, omp_set_num_threads
    from PIL import Image

    omp_set_num_threads(1)

    def run():
        keys, hashes = [], []
        for path in sorted(folder.iterdir()):
            try:
                with Image.open(path) as image:
                    hashed = imagehash.phash(image, hash_size=HASH_SIDE)
            except OSError:
                continue
            keys.append(path.stem)
            hashes.append(numpy.packbits(hashed.hash))
        started = busy()
        index = IndexBinaryFlat(HASH_SIDE * HASH_SIDE)
        index.add(numpy.stack(hashes))
        starts, _, near = index.range_search(numpy.stack(hashes), MAX_BITS + 1)  # below, not up to, its radius
        rows = numpy.repeat(numpy.arange(len(keys)), numpy.diff(starts.astype(numpy.int64)))
        links = [(keys[a], keys[b]) for a, b in zip(rows.tolist(), near.tolist(), strict=True) if a > b]
        return {"links": links, "search_seconds": busy() - started}

    return run


PEERS = {"imagededup": (imagededup, ("imagededup",)), "faiss": (faiss, ("faiss-cpu", "ImageHash"))}


def busy():
    """Seconds of the processor, of this process and of those that it waited for."""
    return sum(os.times()[:4])


def held():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main():
    name, folder = sys.argv[1:]
    load, packages = PEERS[name]
    run = load(Path(folder))
    before, started = held(), busy()
    said = run()
    said["cpu_seconds"] = busy() - started
    said["before_bytes"] = before
    said["versions"] = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
