"""`python -m pagemill`: the same program as `pagemill`."""

from __future__ import annotations

from pagemill.cli.main import run

if __name__ == "__main__":
    run()
