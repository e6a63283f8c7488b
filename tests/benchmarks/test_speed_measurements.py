"""benchmarks/speed_measurements.py: each measurement runs, and its counts are right."""

import pytest
import speed_measurements
import torch
from other_implementations import OTHER_IMPLEMENTATIONS
from speed_measurements import OWN_OPTIONS

CPU = torch.device("cpu")
METHODS = [name for name in (*OTHER_IMPLEMENTATIONS, *OWN_OPTIONS) if "compiled" not in name]


@pytest.fixture
def data(write_slices, tmp_path):
    return write_slices(tmp_path / "data", train=3, validate=1)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(data, monkeypatch, method):
    monkeypatch.setattr(speed_measurements.utils, "keep_freed_memory", lambda: None)
    result = speed_measurements.measure_training(CPU, data, method, epochs=1, batch_size=2)
    assert result["slices_per_second"] > 0
    assert result["first_epoch"] > 0
    assert result["memory"] > 0


def test_evaluation_is_measured(data, monkeypatch):
    monkeypatch.setattr(speed_measurements.utils, "keep_freed_memory", lambda: None)
    result = speed_measurements.measure_evaluation(CPU, data, names=["ssim"])
    assert result["slices_per_second"] > 0


def test_the_time_to_a_new_cache_is_relative_to_inflation(data):
    result = speed_measurements.measure_cache(CPU, data, rounds=1)
    assert result["over_inflate"] == result["seconds"] / result["inflate"] > 0


def test_processes_of_train_py_are_measured(data):
    result = speed_measurements.measure_processes(CPU, data, count=1, epochs=1)
    assert result["slices_per_second"] > 0


def test_the_bound_is_the_slower_of_operations_and_bytes(data, monkeypatch):
    monkeypatch.setattr(speed_measurements, "BATCH_SIZE", 1)
    monkeypatch.setattr(speed_measurements, "measure_matrix_rate", lambda *_: 1e12)
    monkeypatch.setattr(speed_measurements, "measure_bandwidth", lambda *_: 1e20)
    result = speed_measurements.measure_bound(CPU, data, "float32")
    # Forward pass with 0.74 GMAC of convolutions and 0.07 of the nearest-code search, which has no
    # backward pass; the backward pass of a convolution takes twice its forward pass.
    assert result["flops"] == pytest.approx(2e9 * (3 * 0.74 + 0.07), rel=0.03)
    assert result["slices_per_second"] == pytest.approx(1e12 / result["flops"])
    monkeypatch.setattr(speed_measurements, "measure_bandwidth", lambda *_: 1e6)
    result = speed_measurements.measure_bound(CPU, data, "float32")
    assert result["slices_per_second"] == pytest.approx(1e6 / result["bytes"])


def test_all_convolutions_of_the_model_are_measured(data, monkeypatch):
    monkeypatch.setattr(speed_measurements, "BATCH_SIZE", 1)
    monkeypatch.setattr(speed_measurements, "seconds_of", lambda call, device: call() is None or 2)
    rows = speed_measurements.measure_convolutions(CPU, data)
    assert sum(row["number"] for row in rows) == 12  # 2 x (2 + 2 layers of 2)
    assert sum(row["number"] * row["gflop"] for row in rows) == pytest.approx(2 * 0.74, rel=0.03)
    for row in rows:
        for name in ("forward", "input gradient", "weight gradient"):
            assert row[name] > 0


def test_rates_of_the_hardware_are_positive(monkeypatch):
    monkeypatch.setattr(speed_measurements, "seconds_of", lambda call, device: call() is None or 2)
    assert speed_measurements.measure_bandwidth(CPU) == (1 << 27)
    assert speed_measurements.measure_matrix_rate(CPU, "float32") > 2 * 2048**3 / 2 - 1


def test_the_median_of_the_calls_after_the_warm_up_is_taken():
    calls = []
    assert speed_measurements.seconds_of(lambda: calls.append(1), CPU, rounds=3) >= 0
    assert len(calls) == 5


def test_traffic_counts_bytes_that_are_read_and_written():
    x, y = torch.zeros(1000), torch.zeros(1000)
    with speed_measurements.Traffic() as traffic:
        _ = x.view(10, 100)[2:].T  # views move nothing
        assert traffic.bytes == 0
        z = x + y
        z.copy_(torch.empty_like(x))
        z.add_(y)
    assert traffic.bytes == (3 + 2 + 3) * 4000
