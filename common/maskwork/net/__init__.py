"""Everything about the wire that is not the protocol: identities, TLS, chunking, status codes.

Importing this package fixes which TLS 1.2 cipher suites gRPC may use, to one that can never be agreed on,
so that only TLS 1.3 is left (`maskwork.net.tls` has the reasoning and refuses to work without it). gRPC
reads the variable while it is being imported, hence here and not there: a package's ``__init__`` runs before
any module in it, and packages of ours that import gRPC import this one first in theirs.
"""

import os
import sys
from typing import Final

CIPHER_SUITES_VARIABLE: Final = "GRPC_SSL_CIPHER_SUITES"
# An RSA suite: every certificate of ours holds an ECDSA key, so no TLS 1.2 handshake finds a shared cipher.
# TLS 1.3 suites are not governed by this list.
UNUSABLE_TLS12_SUITE: Final = "ECDHE-RSA-AES256-GCM-SHA384"

# True when gRPC had read another value before this package could set it: too late to change.
GRPC_CAME_FIRST: Final = (
    "grpc._cython.cygrpc" in sys.modules and os.environ.get(CIPHER_SUITES_VARIABLE) != UNUSABLE_TLS12_SUITE
)
os.environ[CIPHER_SUITES_VARIABLE] = UNUSABLE_TLS12_SUITE
# gRPC's own lines on standard error would stand between our JSON lines and say less; whoever wants them sets this.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
