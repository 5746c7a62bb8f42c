"""Where the work on one linear is done: here, in processes of this machine, or on a Ray cluster.

    with pool(workers=2) as submit:           or pool(ray="auto")
        result = submit(function, *values)    starts; result() waits and gives what it returned

Functions are pure and values plain, so that results do not depend on where they were computed, and
a lost worker's task can simply run again.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from skimlm.errors import SkimError, first_line

Submit = Callable[..., Callable[[], Any]]
RETRIES = 3  # of a task whose worker died, on Ray


@contextmanager
def pool(workers: int | None = None, ray: str | None = None) -> Iterator[Submit]:
    """A function that starts tasks; SkimError if a worker dies or the cluster does not answer."""
    if ray is not None:
        with _ray(ray) as submit:
            yield submit
    elif workers is not None and workers > 1:
        with _processes(workers) as submit:
            yield submit
    else:
        yield here


def here(function: Callable[..., Any], *values: Any) -> Callable[[], Any]:
    """Do a task at once, in this process."""
    result = function(*values)
    return lambda: result


@contextmanager
def _processes(workers: int) -> Iterator[Submit]:
    threads = max(1, torch.get_num_threads() // workers)
    executor = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))

    def submit(function: Callable[..., Any], *values: Any) -> Callable[[], Any]:
        try:
            future = executor.submit(function, *values)
        except BrokenProcessPool as error:
            raise _lost() from error

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise _lost() from error

        return result

    try:
        yield submit
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _lost() -> SkimError:
    return SkimError(
        "a worker process died, which is what happens when memory runs out; what is done is kept: "
        "go on with --resume and fewer --workers"
    )


@contextmanager
def _ray(address: str) -> Iterator[Submit]:
    try:
        import ray
    except ImportError:
        raise SkimError("--ray needs Ray: run `pip install 'skimlm[ray]'`") from None
    started = not ray.is_initialized()
    if started:
        _answers(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SkimError(f"no Ray cluster at {address}: {first_line(error)}") from None
    remote: dict[Callable[..., Any], Any] = {}

    def submit(function: Callable[..., Any], *values: Any) -> Callable[[], Any]:
        if function not in remote:
            remote[function] = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        reference = remote[function].remote(*values)

        def result() -> Any:
            try:
                return ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, SkimError) else None
                raise cause or SkimError(f"a task failed on Ray: {first_line(error)}") from error
            except ray.exceptions.RayError as error:
                raise SkimError(
                    f"lost on Ray after {RETRIES} tries more: {first_line(error)}; what is done is "
                    "kept: go on with --resume"
                ) from error

        return result

    try:
        yield submit
    finally:
        if started:
            ray.shutdown()


def _answers(address: str) -> None:
    """Refuse an address nobody listens at: Ray itself would try for minutes."""
    import socket

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise SkimError(f"no Ray cluster at {address}: {os.strerror(error.errno or 0)}") from None
