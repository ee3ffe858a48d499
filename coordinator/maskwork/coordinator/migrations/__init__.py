"""The coordinator's schema, from its first version to now: `tables` is the newest, `versions` leads there.

Opening a database and running these is `maskwork.database`'s; what the rows mean is `store.py`'s.
"""

from pathlib import Path
from typing import Final

from maskwork.database import Migrations

MIGRATIONS: Final = Migrations(Path(__file__).parent, head="coordinator_0002", owner="coordinator")
