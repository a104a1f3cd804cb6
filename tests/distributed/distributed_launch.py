"""Starts processes that must not outlive a test, whatever they wait for."""

import os
import signal
import subprocess
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_all(commands: list[list[str]], folder: Path, seconds: float) -> list[tuple[int | None, str]]:
    """Run the commands side by side; return exit code (None: killed when the time was up) and output of each."""
    started = []
    for number, command in enumerate(commands):
        log = folder / f"log-{number}.txt"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **ONE_THREAD}
            )
        started.append((process, log))
    results: list[tuple[int | None, str]] = []
    left = seconds
    try:
        for process, log in started:
            code: int | None = None
            try:
                code = process.wait(timeout=max(left, 0.1))
            except subprocess.TimeoutExpired:
                left = 0.0
            results.append((code, log.read_text(encoding="utf-8")))
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return results
