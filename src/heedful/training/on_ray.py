"""Several models at a time on the machines of a Ray cluster: `side_by_side`, elsewhere."""

import importlib
import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from heedful.errors import Interrupted
from heedful.forms import VARIABLE, load_forms, name_forms
from heedful.training.workers import Job

RETRIES = 3
"""How often a job whose process or machine is lost begins again."""
LOCAL = "local"


def on_ray(
    jobs: Sequence[Job], console: Console, done: Callable[[int, Any], None], address: str, cores: int = 1
) -> None:
    """Run the jobs on a cluster, as many at a time as it has room for.

    A job that is lost with its process or its machine is given to another one; folders that all machines see (a
    network file system) let it go on from its last checkpoint.

    Args:
        jobs: in the order in which they begin; what they hold and return can be pickled.
        console: where a line is said of those that end.
        done: called with the number of each job that has ended, and with what it returned.
        address: of the cluster, "auto" for the one this machine belongs to, or "local" for one that is started here
            and ends with the jobs.
        cores: of each job.

    Raises:
        ImportError: without Ray.
        ConnectionError: if there is no cluster.
        Interrupted: after Ctrl-C; the same call goes on from the last checkpoints.
    """
    ray = _ray()
    here = not ray.is_initialized()
    if here:
        _check_answers(address)
        try:
            ray.init(None if address == LOCAL else address, log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise _no_cluster(address) from error
    try:
        forms = os.environ.get(VARIABLE, "")
        task = ray.remote(num_cpus=cores, max_retries=RETRIES)(_work)
        numbers = {task.remote(job, cores, forms): number for number, job in enumerate(jobs)}
        while numbers:
            ended, _ = ray.wait(list(numbers))
            for reference in ended:
                done(numbers.pop(reference), ray.get(reference))
    except KeyboardInterrupt:
        for reference in numbers:
            ray.cancel(reference, force=True)
        raise Interrupted("stopped; what had a checkpoint goes on from there") from None
    finally:
        if here:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ConnectionError where nobody listens at host:port; Ray would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if place is None:
        return  # "auto", "local", and what only Ray knows
    try:
        socket.create_connection((place[1], int(place[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> ConnectionError:
    return ConnectionError(
        f"no Ray cluster answers at {address!r}; start one with `ray start --head`, give its address, or "
        f"--ray local"
    )


def _work(job: Job, cores: int, forms: str) -> Any:
    """On some machine: one job; files of forms are found there where they are here."""
    import torch

    torch.set_num_threads(cores)
    name_forms([name for name in forms.split(",") if name])
    load_forms()
    return job.run(Console(quiet=True), ())


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ImportError('--ray needs Ray: pip install "heedful[ray]"') from None
