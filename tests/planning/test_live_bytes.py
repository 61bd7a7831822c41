"""Bytes of tensors that exist at the same time, counted by hand."""

import torch

from lightning_sft.planning.live_bytes import LiveBytes


def test_a_storage_counts_from_its_first_use_until_it_is_freed():
    with LiveBytes() as counted:
        first = torch.zeros(10)
        view = first.view(2, 5)[0]  # of the same storage
        second = torch.zeros(100)
        assert counted.total == 40 + 400
        del second
        assert counted.total == 40
        del first
        assert counted.total == 40
        del view
    assert counted.total == 0
    assert counted.peak == 440


def test_what_is_kept_is_not_transient():
    weight = torch.zeros(25)
    counted = LiveBytes()
    counted.keep([weight])
    with counted:
        product = weight * 2
        assert (counted.total, counted.transient) == (200, 100)
        counted.keep([product])
        counted.keep([product])
        assert (counted.total, counted.transient) == (200, 0)
        del product
        assert (counted.total, counted.transient) == (100, 0)
    assert (counted.peak, counted.transient_peak) == (200, 100)


def test_of_a_single_kernel_the_result_alone_counts():
    def function(tensor):
        return (tensor * 2).sum(dim=0)

    start = torch.zeros(50, 2)
    for name, peak in (("function", 400 + 8), ("kernel", 8)):
        counted = LiveBytes()
        with counted:
            result = (function if name == "function" else counted.as_one_kernel(function))(start)
        assert result.shape == (2,)
        assert counted.peak == peak
