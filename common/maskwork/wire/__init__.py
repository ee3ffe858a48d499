"""The wire vocabulary: generated protobuf types (``v1``) and the one module that converts them (``codec``)."""
