"""What the actors of a run print, in files of the run's directory: one for each process of a role, and the
same one after a restart.

The descriptors of the process are turned to the file, so that libraries and child processes write there too,
and what was printed before a SIGKILL is there. Ray's own file, on the node, keeps what came before the actor.
"""

import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path


def actor_log(directory: str, role: str, index: int) -> str:
    """The file of a role's process `index`, from 0; "" without a directory."""
    return str(Path(directory) / f"{role}-{index}.log") if directory else ""


def print_to(file: str) -> None:
    """Let all that this process prints go to the end of `file`, after a line that says when it began, and
    where; "" changes nothing. Raises OSError."""
    if not file:
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    print(f"--- {now} process {os.getpid()} on {socket.gethostname()}", flush=True)
