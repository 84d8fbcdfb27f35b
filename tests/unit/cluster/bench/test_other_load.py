"""What counts as the CPU time of others."""

from __future__ import annotations

import os
from collections import namedtuple

import pytest

from cluster.bench.other_load import CpuReading, busy_share, cpu_of, others_cores


def test_what_neither_idled_nor_was_ours_went_to_others() -> None:
    before, after = CpuReading(10.0, 100.0, 50.0), CpuReading(12.0, 103.0, 52.0)
    assert others_cores(before, after) == pytest.approx(0.5)
    assert others_cores(before, CpuReading(12.0, 101.0, 52.0)) == 0.0


def test_the_cpu_of_a_process_that_is_gone_counts_nothing() -> None:
    assert cpu_of([os.getpid()]) > 0
    assert cpu_of([]) == cpu_of([2**22 + 1]) == 0.0


def test_waiting_for_disks_is_not_being_busy() -> None:
    times = namedtuple("times", "user nice system idle iowait irq softirq steal")
    before = times(10, 0, 5, 100, 10, 0, 0, 0)
    assert busy_share(before, times(12, 0, 6, 103, 14, 0, 0, 0)) == pytest.approx(0.3)
    assert busy_share(before, before) == 0.0
