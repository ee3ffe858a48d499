"""The one error of this package: something on the wire that no domain object corresponds to."""


class WireError(ValueError):
    """Bytes or a protobuf message that no domain object corresponds to; the text is for our own log."""
