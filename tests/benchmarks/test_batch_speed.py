"""The benchmark of folders of slices: every number that it reports is measured."""

import json

import batch_speed


def test_the_benchmark_reports_speed_memory_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_speed, "in_new_process", lambda function, *rest: function(*rest))
    monkeypatch.setattr(batch_speed.utils, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(batch_speed, "BATCH_SIZE", 2)
    threads = batch_speed.torch.get_num_threads()
    arguments = ["--counts", "2", "--threads", str(threads), "--out", str(tmp_path / "result")]
    assert batch_speed.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].startswith("python benchmarks/batch_speed.py --counts 2")
    assert "cores" in result["processor"]
    (batch,) = result["batches"]
    assert batch["files"] == 2
    assert min(batch["files_per_second"], batch["peak_memory_mb"], batch["cpu_ms_per_file"]) > 0
    assert result["cpu_ms_per_slice"].keys() >= {"read", "encode", "decode", "ssim_body", "gzip"}
