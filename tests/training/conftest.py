"""The tasks of this folder on the import path, as a site would install its own."""

import sys
from pathlib import Path

# Test modules are imported by path (importlib mode), tasks by name as sites name them.
sys.path.insert(0, str(Path(__file__).parent))
