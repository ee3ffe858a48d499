"""The participant: dials out, trains on the site's own data, uploads only masked updates."""

import maskwork.net  # noqa: F401  # sets the TLS floor before anything imports grpc
