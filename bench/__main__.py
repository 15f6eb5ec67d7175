"""``python -m bench`` runs all measurements, or the named ones, one after the other."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ALL = (
    *("prefill", "serving", "kv_stream", "kv_copy", "journal", "failover", "cancel", "overload"),
    *("idle", "simulation", "frontier"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="save NAME.json in this folder")
    options = parser.parse_args()
    unknown = set(options.names) - set(ALL)
    if unknown:
        parser.error(
            f"no such measurement: {', '.join(sorted(unknown))}; choose from {', '.join(ALL)}"
        )
    if options.json is not None:
        options.json.mkdir(parents=True, exist_ok=True)
    for name in options.names or ALL:
        command = [sys.executable, "-m", f"bench.{name}"]
        if options.json is not None:
            command += ["--json", str(options.json / f"{name}.json")]
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
