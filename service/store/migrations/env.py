"""Alembic environment.

It migrates over the connection of the service, in the transaction of the caller.
"""

from alembic import context

from service.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
context.run_migrations()
