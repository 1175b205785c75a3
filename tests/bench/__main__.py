"""`python -m tests.bench [NAME...] [--json FILE] [--quick]`: measures against the peers, as ratios."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from types import ModuleType

from tests.bench import ground, measure

TOPICS = (
    "startup",
    "reads",
    "clones",
    "sparse",
    "flush",
    "imports",
    "index_size",
    "index_peer",
    "collect",
    "serving",
    "machines",
)
"""Each topic is a module beside this one with `run(bench)`."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"topics: {', '.join(TOPICS)}; all if none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="small data, to see that it works")
    wanted = parser.parse_args()
    if unknown := set(wanted.names) - set(TOPICS):
        parser.error(f"no topic named {', '.join(sorted(unknown))}")
    names = [
        name for name in wanted.names or TOPICS if importlib.util.find_spec(f"tests.bench.{name}") is not None
    ]
    topics = {name: importlib.import_module(f"tests.bench.{name}") for name in names}
    begun, busy = time.monotonic(), os.getloadavg()[0]
    folder = ground.make_folder()
    bench = measure.Bench(folder, wanted.quick)
    try:
        for name, topic in topics.items():
            run_topic(bench, name, topic)
    finally:
        ground.remove_folder(folder)
        print(measure.report(bench.rows))
    print(f"{time.monotonic() - begun:.0f} s" + (", quick: the figures mean nothing" if bench.quick else ""))
    if busy > 0.5:
        print(f"The machine had other work: a load of {busy:.1f} before the first measurement.")
    if wanted.json:
        wanted.json.write_text(json.dumps(measure.plain(bench.rows), indent=2) + "\n")


def run_topic(bench: measure.Bench, name: str, topic: ModuleType) -> None:
    bench.topic = name
    place = bench.folder
    bench.folder = place / name
    bench.folder.mkdir()
    try:
        begun = time.monotonic()
        topic.run(bench)
        bench.say(f"{time.monotonic() - begun:.0f} s")
    finally:
        shutil.rmtree(bench.folder, ignore_errors=True)
        bench.folder = place


if __name__ == "__main__":
    main()
