"""The program that Ray starts for each worker of a run with a fork server. It gets a worker and stands in for it.

Ray starts ``python -S -E worker_shim.py SOCKET default_worker.py ARGUMENTS…`` (see ``fork_server.py``). This program
sends the server what a process inherits: arguments, environment, directory, descriptors 0 to 2, signals, priority,
limits. The server forks the worker and answers with its pid. After that, this program passes signals on to the worker,
and ends in the same way as the worker. If this program is killed, the server kills the worker.

One such program runs beside each worker, so it imports next to nothing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import time

TYPE_CHECKING = False  # not from typing: its import would take longer than everything else here
if TYPE_CHECKING:
    from typing import Any

#: an answer of the server: a kind and a number
ANSWER = struct.Struct("!ci")
#: the kinds: the number is the worker's pid; the number is the worker's status, as from ``os.wait``; start an ordinary
#: Python instead; there is no worker
PID, ENDED, ORDINARY, REFUSED = b"P", b"E", b"O", b"R"
#: the length of a request, sent before the request
LENGTH = struct.Struct("!I")

#: the signals that Ray or a terminal may send to a worker
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = tuple(number for name, number in sorted(vars(resource).items()) if name.startswith("RLIMIT_"))


def describe_this_process(arguments: list[str]) -> dict[str, Any]:
    """What a child of this process would inherit, except the descriptors."""
    with open("/proc/self/oom_score_adj") as file:
        oom_score_adj = int(file.read())
    return {
        "arguments": arguments,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": os.umask(0o077),  # this process creates no file
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": oom_score_adj,
        "limits": [(number, *resource.getrlimit(number)) for number in LIMITS],
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "ignored": [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN],
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
    }


def ask(path: str, request: bytes) -> tuple[socket.socket, tuple[bytes, int] | None]:
    """Send a request with descriptors 0 to 2. Returns the connection and the first answer; None if none comes."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        socket.send_fds(connection, [LENGTH.pack(len(request))], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(ANSWER.size, socket.MSG_WAITALL)
    except (ConnectionError, FileNotFoundError):
        return connection, None
    if len(answer) < ANSWER.size:
        return connection, None
    kind, number = ANSWER.unpack(answer)
    return connection, (kind, number)


def is_running(pid: int) -> bool:
    """Whether the process has not ended yet. A zombie has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> None:
    """Stand in for one worker, from its start to its end."""
    path, arguments = sys.argv[1], sys.argv[2:]
    described = describe_this_process(arguments)
    request = json.dumps(described).encode()
    connection, answer = ask(path, request)
    if answer is None:  # The server died. The launcher answers now, and stops the run.
        connection, answer = ask(path, request)
    if answer is not None and answer[0] == ORDINARY:
        os.umask(described["umask"])
        os.execv(sys.executable, [sys.executable, *arguments])
    if answer is None or answer[0] == REFUSED:
        sys.exit("EntropyForkError: the fork server of this run has ended, so Ray cannot start another worker.")
    pid = answer[1]

    def pass_on(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # It has just ended.
            return

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        ended = connection.recv(ANSWER.size, socket.MSG_WAITALL)
    except ConnectionError:
        ended = b""
    if len(ended) < ANSWER.size:  # The server died. The worker goes on; nobody can say how it ends.
        while is_running(pid):
            time.sleep(0.5)
        os._exit(1)
    status = ANSWER.unpack(ended)[1]
    if os.WIFSIGNALED(status):
        killer = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # dumped already
        if killer != signal.SIGKILL:
            signal.signal(killer, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (killer,))
        os.kill(os.getpid(), killer)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
