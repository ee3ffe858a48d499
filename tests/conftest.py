"""What every test needs before anything else: our TLS settings, which must be in place before grpc is imported."""

import maskwork.net  # noqa: F401
