"""What a process asks of its surroundings; its death with its parent is tested with the stages and the flow."""

import os
import subprocess
import sys

import pytest

BLOCKS_OF_A_STEP = """
import resource, numpy
from lyrics.process import keep_freed_memory
keep = {keep}
if keep:
    keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        numpy.ones(8_000_000)  # 61 MiB: above what glibc keeps of itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
print(step())
"""


def faults(keep: bool) -> int:
    code = BLOCKS_OF_A_STEP.format(keep=keep)
    # numpy asks for pages of 2 MiB, of which the kernel has more or less: a few faults then stand for many.
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives freed blocks back at once")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    assert faults(keep=True) < 1000 < 40_000 < faults(keep=False)
