"""The one error of this package, and the name of a process for its message."""

from __future__ import annotations

import os
import socket
import sys


class EntropyForkError(ValueError):
    """Something that was asked of Entropy Fork cannot be done; the message says what to write instead."""


def process_name() -> str:
    """Host, process id and program of this process, to find it in a cluster's logs."""
    return f"{socket.gethostname()} pid {os.getpid()} ({os.path.basename(sys.argv[0]) or 'python'})"
