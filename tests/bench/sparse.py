"""Opening a huge sparse device in a fresh process and reading one block of it: time and memory."""

from __future__ import annotations

import subprocess
import sys

import cowstore
from tests.bench.ground import BLOCK, MIB, TIB
from tests.bench.measure import Bench, Sample

_CHILD = """
import sys, time
import cowstore, cowstore.engine, cowstore.clones, cowstore.devices, cowstore.moments

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024

before = resident()[1]
begun = time.perf_counter()
store = cowstore.open(sys.argv[1])
device = store.device("huge", readonly=sys.argv[3] == "moment")
block = device.pread(4096, int(sys.argv[2]))
seconds = time.perf_counter() - begun
after = resident()[0]
assert block == b"x" * 4096
device.close()
store.close()
print(seconds, after - before)
"""


def run(bench: Bench) -> None:
    path, place = bench.folder / "store", TIB - 12345 * BLOCK
    with cowstore.open(path, create=True) as store, store.create("huge", TIB) as clone:
        for gib in range(0, 1024, 8):
            clone.pwrite(gib.to_bytes(8, "big") * 512, gib << 30)
        clone.pwrite(b"x" * BLOCK, place)
    for what, mode in (("clone, to be written", "clone"), ("clone's last moment", "moment")):
        found = [child(str(path), str(place), mode) for _ in range(bench.pick(9, 3))]
        bench.within(f"open a 1 TiB {what}, read a block", Sample(tuple(one[0] for one in found)), 0.050)
        bench.within("memory beyond the imports", Sample(tuple(one[1] for one in found)), 50 * MIB, "B")


def child(*words: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory
