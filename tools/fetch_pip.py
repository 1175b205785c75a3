"""Give a virtual environment its pip where Python came without ensurepip.

Run by the environment's own Python. A pip wheel can be run as it is, so the newest one is fetched from the
package index, verified against the digest that the index lists, and made to install itself. Needs nothing but
the standard library, since nothing else is there yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
JSON = "application/vnd.pypi.simple.v1+json"
RELEASED = re.compile(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl")


def newest(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest released wheel among the files that the index lists."""
    wheels = [file for file in files if RELEASED.fullmatch(file["filename"]) and not file.get("yanked")]
    return max(wheels, key=lambda file: [int(part) for part in file["filename"].split("-")[1].split(".")])


def fetch(url: str, accept: str = "*/*") -> bytes:
    """The bytes behind a URL."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def main() -> None:
    """Fetch, verify, install."""
    page = f"{INDEX}/pip/"
    wheel = newest(json.loads(fetch(page, JSON))["files"])
    content = fetch(urllib.parse.urljoin(page, wheel["url"]))
    if hashlib.sha256(content).hexdigest() != wheel["hashes"]["sha256"]:
        sys.exit(f"fetch_pip: {wheel['filename']} is not what the index says it is")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, wheel["filename"])
        path.write_bytes(content)
        subprocess.run([sys.executable, str(path / "pip"), "install", "--quiet", str(path)], check=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        sys.exit(f"fetch_pip: cannot get pip from {INDEX}: {error}")
