"""Processes that decode keep the memory that they have freed."""

import resource
import sys

import pytest
import torch
from helpers.commands import forkserver
from torch.utils.data import DataLoader, Dataset

from everest_hf.data.workers import keep_freed_memory

# Bytes; less than half as much the C library learns to keep by itself.
BLOCK, ROUNDS = 40_000_000, 40


def page_faults() -> int:
    """How many pages the system has given to this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Faults(Dataset):
    """Its one item is the number of pages that rounds of writing a block and freeing it take, after the first few."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        for i in range(ROUNDS + 2):
            if i == 2:
                before = page_faults()
            torch.zeros(BLOCK, dtype=torch.uint8)
        return page_faults() - before


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_a_worker_asks_the_system_for_memory_once():
    # Not forks of this process, which may keep its memory since another test.
    options = {"num_workers": 1, "multiprocessing_context": forkserver()}
    usual, kept = (
        int(next(iter(DataLoader(Faults(), worker_init_fn=start, **options)))) for start in (None, keep_freed_memory)
    )
    # A system may give several pages at a time.
    assert usual > 100 * ROUNDS
    assert kept < 0.5 * usual
