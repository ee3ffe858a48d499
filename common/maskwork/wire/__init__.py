"""The wire vocabulary: generated protobuf types (``v1``) and the modules that convert them."""

import maskwork.net  # noqa: F401  # sets the TLS floor before anything imports grpc
