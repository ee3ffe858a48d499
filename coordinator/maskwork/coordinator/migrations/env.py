"""What alembic runs to migrate: our open connection, inside our transaction. NOT a command-line entry point."""

from alembic import context
from sqlalchemy import Connection

connection = context.config.attributes["connection"]
if not isinstance(connection, Connection):
    raise RuntimeError("env.py is run by maskwork.database alone, which passes its connection")
context.configure(connection=connection)
context.run_migrations()
