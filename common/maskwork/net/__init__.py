"""Everything about the wire that is not the protocol: identities, TLS, chunking, status codes."""
