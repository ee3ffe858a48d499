"""What every benchmark's participants have in common."""

from typing import Final

EXAMPLES: Final = 100
"""Of every participant."""
TASK: Final = "constant"
"""The name that jobs use."""
