"""Workers side by side: tasks in order of importance until all are done or the time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.experiment.jobs import Jobs
from bench.experiment.tasks import Task

PAUSE_S = 0.5
GRACE_S = 60.0
"""Seconds for a worker that gets a signal to write its checkpoint and end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROOT = Path(__file__).parents[2]


@dataclass
class _Worker:
    task: Task
    process: subprocess.Popen[bytes]
    started: float


class Pool:
    """At most `num_jobs` workers at a time, which share the machine's cores, until `deadline`.

    deadline: in seconds of time.monotonic. Workers that are running then get a signal to end, and
    are resumed in the next call.
    """

    def __init__(self, jobs: Jobs, num_jobs: int, deadline: float) -> None:
        self.jobs, self.num_jobs, self.deadline = jobs, num_jobs, deadline
        self._workers: list[_Worker] = []
        self._failed: set[Task] = set()

    def run(self, tasks: Iterable[Task]) -> int:
        """Do the tasks; return the number that failed. A signal ends the workers first."""
        tasks = list(tasks)
        left = [task for task in tasks if not self.jobs.is_settled(task, tasks)]
        print(f"{len(tasks)} tasks, {len(tasks) - len(left)} of them done", flush=True)
        handlers = {number: signal.signal(number, _stop) for number in SIGNALS}
        try:
            while time.monotonic() < self.deadline and self._move_on(left):
                time.sleep(PAUSE_S)
        finally:
            stopped = self._end_all()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for task in stopped:
                print(f"stopped, resumes in the next call: {task.title}", flush=True)
        if left and time.monotonic() < self.deadline:
            print(f"{len(left)} left, which wait for one that failed, or for a late start")
        return len(self._failed)

    def _move_on(self, left: list[Task]) -> bool:
        """Collect workers that ended, start those that can start; return True while any run."""
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._workers.remove(worker)
            self._take_in(worker, left)
        for task in list(left):
            if len(self._workers) >= self.num_jobs:
                break
            if task in self._failed or any(worker.task == task for worker in self._workers):
                continue
            if self.jobs.is_settled(task, left):  # a start was trained anew, to the same bits
                left.remove(task)
            elif self.jobs.is_ready(task):
                self._begin(task)
        return bool(self._workers)

    def _begin(self, task: Task) -> None:
        file = self.jobs.file(task)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.jobs.job(task).write(file)
        # all else waits for a start: it has the machine to itself
        share = 1 if task.kind == "start" else self.num_jobs
        threads = max(1, (os.cpu_count() or 1) // share)
        with file.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.experiment.worker", str(file.resolve())],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                cwd=ROOT,
            )
        self._workers.append(_Worker(task, process, time.monotonic()))

    def _take_in(self, worker: _Worker, left: list[Task]) -> None:
        task, seconds = worker.task, time.monotonic() - worker.started
        if worker.process.returncode == 0 and self.jobs.collect(task):
            left.remove(task)
            print(f"{len(left)} left; {seconds:.0f} s: {task.title}", flush=True)
            return
        self._failed.add(task)
        log = self.jobs.file(task).with_suffix(".log")
        lines = log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        print(f"failed, exit {worker.process.returncode}: {task.title}: {last}", flush=True)

    def _end_all(self) -> list[Task]:
        """End running workers, which write a checkpoint; return their tasks."""
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        last = time.monotonic() + GRACE_S
        for worker in self._workers:
            try:
                worker.process.wait(max(0.1, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        return [worker.task for worker in self._workers]


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)
