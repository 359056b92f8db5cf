"""The process of the command line keeps the memory that a step frees, and no more than that."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator is set up"
)

COUNT_FAULTS = """
import json, os, resource, statistics, sys
from sdlora.allocator import keep_freed_memory
if sys.argv[1] == "tuned":
    keep_freed_memory()
import torch
from tools.bench.contest import build_ours, prepare
from tools.bench.results import SideResult
from tools.bench.rows import ROWS
torch.set_num_threads(1)
side = prepare(build_ours, ROWS["cpu-nano-b4-fp32"], torch.device("cpu"), SideResult())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    side.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([statistics.median(faults() for _ in range(9)), os.environ.get("THP_MEM_ALLOC_ENABLE")]))
"""


def count_faults(how, **environment):
    """Returns the page faults of a step of nano, and torch's setting for large pages."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    done = subprocess.run(command, env=clean | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@needs_glibc
def test_memory_that_a_step_frees_serves_the_next():
    (plain, _), (tuned, pages) = count_faults("plain"), count_faults("tuned")
    assert pages == "1"
    assert tuned < plain / 10


@needs_glibc
def test_what_the_user_has_set_stays():
    trimming = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    faults, pages = count_faults("tuned", THP_MEM_ALLOC_ENABLE="0", **trimming)
    assert pages == "0"
    assert faults > 1000
