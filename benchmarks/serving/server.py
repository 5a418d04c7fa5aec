"""A vLLM server in a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

STOCK = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
OURS = [sys.executable, "-m", "heedful", "serve"]


class Server:
    """Started at once, ready after `wait`.

    Args:
        command: what serves, with the model's folder and all options but the port.
        port: where.
        log: file for what it says.
    """

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.port, self.log, self.began = port, log, time.perf_counter()
        environment = {
            **os.environ,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_SLEEP_WHEN_IDLE": "1",
        }
        environment["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")
        at = command.index("--") if "--" in command else len(command)
        whole = [*command[:at], "--port", str(port), *command[at:]]
        self.process = subprocess.Popen(
            whole, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self, most: float = 900.0) -> None:
        """Until it answers."""
        while time.perf_counter() - self.began < most:
            if self.process.poll() is not None:
                tail = self.log.read_text().splitlines()[-15:]
                raise RuntimeError("the server ended:\n" + "\n".join(tail))
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise RuntimeError(f"no answer after {most:.0f} s; see {self.log}")

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        out = subprocess.run(
            ["ps", "-o", "rss=", "-g", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return 1024 * sum(int(word) for word in out.stdout.split())

    def stop(self, seconds: float = 60.0) -> bool:
        """As Ctrl-C does; whether it ended by itself."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return False

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()
