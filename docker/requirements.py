"""Print what our distributions need from others, one requirement a line; an image installs these before our own code.

Read from the pyproject files themselves, so that no second list can disagree with them. Versions are constraints.txt's.

Usage: python requirements.py FOLDER[EXTRA,…] …
"""

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print each requirement once, in order of name."""
    found: set[str] = set()
    for argument in sys.argv[1:]:
        folder, _, extras = argument.rstrip("]").partition("[")
        project = tomllib.loads(Path(folder, "pyproject.toml").read_text(encoding="utf-8"))["project"]
        found.update(project["dependencies"])
        for extra in filter(None, extras.split(",")):
            found.update(project["optional-dependencies"][extra])
    for requirement in sorted(found, key=str.lower):
        if not re.match(r"maskwork\b", requirement):
            print(requirement)


if __name__ == "__main__":
    main()
