"""The network on one patch: what it is given, and what a batch takes of memory and time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.networks.model_axes import ModelAxes
from zpatch.networks.network import Network
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.probe import network_cost, read_batch
from zpatch.sampling.patch_views import PatchView

MIB = 2**20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets Linux's peak")


class Greedy:
    """A network that holds 48 MiB for each patch while it runs, and notes in how many threads it ran."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        held = torch.ones(len(batch) * 48 * MIB, dtype=torch.uint8)
        time.sleep(0.05)
        return batch + held[0]


def options_of(**options: object) -> PredictOptions:
    return PredictOptions.of(image="t1", patch_size=16, device="cpu", **options)


@LINUX
@pytest.mark.parametrize("patches", [1, 3])
def test_the_cost_of_a_network_is_what_it_holds_for_a_whole_batch_while_it_runs(
    cohort: zp.Cohort, patches: int
) -> None:
    options = options_of(batch_size=patches)
    cost = network_cost(Network.of(Greedy(), options), ModelInputs.of(cohort[0], options), options)
    assert abs(cost.bytes - patches * 48 * MIB) < 4 * MIB  # the kernel counts in steps
    assert cost.seconds >= 0.05


def test_where_jobs_share_the_processors_the_cost_is_that_of_one_thread(cohort: zp.Cohort) -> None:
    before = torch.get_num_threads()
    for jobs, threads in ((1, before), (2, 1)):
        network, options = Greedy(), options_of(jobs=jobs)
        network_cost(Network.of(network, options), ModelInputs.of(cohort[0], options), options)
        assert network.threads == [threads]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("letters", ["xyz", "zyx", "yzx"])
def test_a_batch_stacks_images_as_channels_in_memory_in_the_order_of_the_network(
    cohort: zp.Cohort, letters: str
) -> None:
    images = [cohort[0].t1, cohort[0].t1]
    locations = [zp.PatchLocation((2, 3, 4), (5, 6, 7)), zp.PatchLocation((-1, 0, 2), (5, 6, 7))]
    batch = read_batch(
        [PatchView("", image, padding_mode="edge") for image in images], locations, ModelAxes(letters)
    )
    assert batch.shape == (2, 2, 5, 6, 7)
    assert batch.dtype == torch.float32
    assert ModelAxes(letters).fed(batch).data_ptr() == batch.data_ptr()
    for patch, location in zip(batch.numpy(), locations, strict=True):
        [[expected]] = zp.read_group(images[:1], [location], padding_mode="edge")[0]
        assert np.array_equal(patch[0], expected)
        assert np.array_equal(patch[1], expected)
