"""Checks that every top-level folder with Python code is in a layer. ``make lint`` runs it.

import-linter checks only the packages that pyproject.toml names, so it does not see a new package.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

NO_PACKAGES = {"tests", "tools"}  # never imported by the product


def folders_without_layer(root: Path) -> list[str]:
    """Return the top-level Python folders that are missing in root_packages or in the layers."""
    linter = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [each for each in linter["contracts"] if each["id"] == "layers"]
    layered = set(re.findall(r"\w+", " ".join(contract["layers"])))
    found = {path.parent.name for path in root.glob("[!.]*/*.py")} - NO_PACKAGES
    return sorted(found - (layered & set(linter["root_packages"])))


if __name__ == "__main__":
    if missing := folders_without_layer(Path.cwd()):
        sys.exit(
            f"{', '.join(missing)}: in no layer; add the folder to root_packages and to the "
            "contract 'layers' of [tool.importlinter] in pyproject.toml"
        )
