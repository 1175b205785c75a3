"""`python -m cowstore_cli`, where the `cowstore` script is not on the path."""

from __future__ import annotations

from cowstore_cli.main import main

main()
