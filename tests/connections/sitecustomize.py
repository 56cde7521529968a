"""Put on PYTHONPATH by a test: every attempt of any process below it to reach another machine is noted, and fails.

The file named by KIT_TEST_CONNECTIONS gets a line per attempt. This machine's own name and addresses are not others.
"""

import os
import socket
import sys

OWN = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname(), socket.getfqdn(), None}


def note(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args[0]
    else:
        return
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in OWN or host.startswith(("127.", "/", "\0")):
        return
    with open(os.environ["KIT_TEST_CONNECTIONS"], "a") as f:
        f.write(f"{event} {address!r} {' '.join(sys.argv[:3])}\n")
    raise ConnectionRefusedError(f"a test allows no connection to {host}")


if "KIT_TEST_CONNECTIONS" in os.environ:
    sys.addaudithook(note)
