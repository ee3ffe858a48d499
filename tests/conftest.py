"""What every test needs before anything else: our TLS settings, which must be in place before grpc is imported.

grpc's asyncio part looks for an event loop when it is first imported, and finds none after an asynchronous test has
closed its own; so it is imported here, whichever test comes first.
"""

import maskwork.net.tls  # noqa: F401
