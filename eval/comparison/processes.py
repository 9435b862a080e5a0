"""Every cell runs in a process of its own: one that dies leaves the others alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Hashable, Iterable
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from eval.baselines import BASELINES
from eval.comparison.ablations import ablation_of
from eval.comparison.cell import Cell, Settings, run_cell

PRELOADED = ["eval.comparison.cell", "transformers.models.llama.modeling_llama"]


def compute(cells: Iterable[Cell], settings: Settings, num_at_once: int) -> dict[Cell, str]:
    """Computes the cells whose files are missing.

    Args:
        cells: of the table.
        settings: that they share.
        num_at_once: processes, each with its share of the processor's cores unless
            `OMP_NUM_THREADS` says how many it has.

    Returns:
        What went wrong, by cell.
    """
    if num_at_once > 1:
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_at_once)
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # every cell forks off a process that has them
    waiting = deque(chains(cell for cell in cells if not cell.file(settings).is_file()))
    running: list[tuple[BaseProcess, list[Cell]]] = []
    failures: dict[Cell, str] = {}
    while waiting or running:
        while waiting and len(running) < num_at_once:
            chain = waiting.popleft()
            print(chain[0].describe(), file=sys.stderr, flush=True)
            process: BaseProcess = context.Process(target=run_cell, args=(chain[0], settings))
            process.start()
            running.append((process, chain))
        connection.wait([process.sentinel for process, _ in running])
        ended = [entry for entry in running if entry[0].exitcode is not None]
        running = [entry for entry in running if entry not in ended]
        for process, (cell, *rest) in ended:
            if not cell.file(settings).is_file():
                failures[cell] = _cause(process.exitcode or 0)
            if rest:
                waiting.appendleft(rest)
    return failures


def chains(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that rest on the same result, in order, so that no two compute it at once.

    Those of methods that train come first: they take longest.
    """
    found: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        found.setdefault(_result(cell), []).append(cell)
    return sorted(found.values(), key=lambda chain: chain[0].method in BASELINES)


def _result(cell: Cell) -> Hashable:
    """What it rests on: recoveries share a pruned network, and most sizes of ours a training."""
    is_shared = cell.method not in BASELINES and ablation_of(cell.method).reuses_masks
    return cell.method, cell.layout, cell.seed, None if is_shared else cell.sparsity


def _cause(code: int) -> str:
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    return f"the process {cause}; a rerun tries again"
