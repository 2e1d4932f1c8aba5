"""Two processes of one script, as a launcher starts them, on this machine's processor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def two_processes(script: str, *arguments: str, seconds: int = 200) -> list[str]:
    """What each of the two printed. script: a file of this folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                           "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen([sys.executable, str(HERE / script), *arguments], text=True,
                                  env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    answers = [process.communicate(timeout=seconds) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    return [out for out, _ in answers]
