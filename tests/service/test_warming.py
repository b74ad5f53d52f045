"""What is run before an encoder is served: enough to know its pace, and no more, since nobody is answered meanwhile."""

from __future__ import annotations

import pytest
import torch

from ironclip.encoder import Encoder
from service import probe_rows, warming
from service.dtype import choose_dtype
from service.pace import Pace
from service.probe_rows import measured_rows
from service.warming import warm


class Machine:
    """Takes so long for each item by its own clock, and notes what it was asked for."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.now, self.ran = seconds, 0.0, list[int]()
        monkeypatch.setattr(warming, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def run(self, size: int) -> None:
        self.ran.append(size)
        self.now += size * self.seconds


def test_a_quick_cpu_runs_few_sizes_and_knows_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, machine = Pace(), Machine(0.004, monkeypatch)
    warm(pace, 32, machine.run, on_cpu=True)
    assert machine.ran == [1, 1, 8, 8, 32, 32]
    assert pace.seconds(4) == pytest.approx(0.016)


def test_a_slow_cpu_runs_one_picture_and_no_batch_that_holds_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, machine = Pace(), Machine(0.26, monkeypatch)
    warm(pace, 32, machine.run, on_cpu=True)
    assert machine.ran == [1]
    assert pace.seconds(32) == pytest.approx(32 * 0.26)


def test_a_gpu_runs_every_size_that_it_will_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.0, monkeypatch)
    warm(Pace(), 6, machine.run, on_cpu=False)
    assert machine.ran == [1, 1, 2, 2, 4, 4, 6, 6]


def test_no_batch_is_larger_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.0, monkeypatch)
    warm(Pace(), 4, machine.run, on_cpu=True)
    assert machine.ran == [1, 1, 4, 4]


def test_pieces_of_a_probe_that_cannot_fit_are_not_run(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    took = {4: 0.5, 2: 0.2, 1: 0.1}

    def timed(encoder: Encoder, size: int) -> float:
        ran.append(size)
        return took[size]

    monkeypatch.setattr(probe_rows, "_timed", timed)
    rows, seconds = measured_rows(tiny_encoder, 1.0, lambda size: 0.05 * size)
    assert (ran, rows.views, seconds) == ([4], 4, 0.5)
    ran.clear()
    rows, seconds = measured_rows(tiny_encoder, 0.4, lambda size: 0.05 * size)
    assert (ran, rows.views, seconds) == ([2], 2, 0.2)
    ran.clear()
    rows, seconds = measured_rows(tiny_encoder, 0.01, lambda size: 0.05 * size)
    assert (set(ran), rows.views, seconds) == ({1}, 1, 0.1)


def test_a_dtype_that_nothing_is_compared_with_costs_no_forward(
    tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    encode = Encoder.encode_image

    def counted(self: Encoder, pixels: torch.Tensor) -> torch.Tensor:
        forwards.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_image", counted)
    own, report = choose_dtype(tiny_encoder, "float32")
    assert own is tiny_encoder
    assert not forwards
    assert report.trials[0].min_cosine == 1.0
    forwards.clear()
    _, report = choose_dtype(tiny_encoder, "bfloat16")
    assert sum(forwards) <= 18  # both once on the pictures, and one picture each where layers are exchanged
    assert report.trials[0].images_per_second == {}
