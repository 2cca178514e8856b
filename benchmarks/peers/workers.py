"""The solvers by name, each in a process of its own.

highspy and OR-Tools both bring a library named libhighs.so.1, of different versions: in one process
the second to be imported fails on missing symbols. So whoever needs several solvers asks for them
here.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Self

from benchmarks.peers.decide import Answer, Solve
from benchmarks.peers.encoding import Formula, Unsupported

PACKAGES = {"smt": "bitwuzla", "milp": "highspy", "cpsat": "ortools"}


def missing() -> list[str]:
    """The packages of solvers that are not installed."""
    return [package for package in PACKAGES.values() if importlib.util.find_spec(package) is None]


def solve_here(name: str, formula: Formula, seconds: float) -> Answer:
    """The answer of the solver `name`, in this process."""
    try:
        answer: Answer = importlib.import_module(f"benchmarks.peers.{name}").solve(formula, seconds)
    except Unsupported as error:
        return Answer("unsupported", str(error))
    return answer


class Workers:
    """A process for each solver, started when first asked; a context manager, which ends them."""

    def __init__(self) -> None:
        self._pools: dict[str, ProcessPoolExecutor] = {}

    def solver(self, name: str) -> Solve:
        """The solver `name` as a function that asks its process and waits."""
        if name not in self._pools:
            self._pools[name] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool = self._pools[name]
        return lambda formula, seconds: pool.submit(solve_here, name, formula, seconds).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in self._pools.values():
            pool.shutdown()
