"""Work spread over processes, of which any may crash."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


def _serve(pipe: Connection, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Answers job numbers with their results until it is told None."""
    while (number := pipe.recv()) is not None:
        pipe.send(work(*jobs[number]))


def in_processes(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[Any]:
    """`work(*job)` of each job, in order; None where the process died, which costs no other job.

    Jobs reach the processes by fork, so that they may hold what cannot be pickled, such as
    kernels; results are pickled.
    """
    context = multiprocessing.get_context("fork")
    waiting, running, done = iter(range(len(jobs))), {}, {}

    def start() -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, work, jobs), daemon=True).start()
        theirs.close()  # else its death would not be seen
        return ours

    def give(pipe: Connection) -> None:
        number = next(waiting, None)
        if number is not None:
            running[pipe] = number
        pipe.send(number)

    for _ in range(min(max(processes, 1), len(jobs))):
        give(start())
    for number in range(len(jobs)):
        while number not in done:
            for pipe in wait(list(running)):
                at = running.pop(pipe)
                try:
                    done[at] = pipe.recv()
                except EOFError:
                    done[at] = None
                    pipe = start()
                give(pipe)
        yield done.pop(number)
