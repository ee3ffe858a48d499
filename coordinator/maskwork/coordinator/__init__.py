"""The coordinator: opens rounds, adds masked updates, keeps models. It never imports torch."""

import maskwork.net  # noqa: F401  # sets the TLS floor before anything imports grpc
