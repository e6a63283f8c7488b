"""Describe the machine and the software for result files."""

import torch

from training import environment


def test_versions_have_the_commit_or_say_that_it_is_unknown(monkeypatch):
    versions = environment.versions()
    assert versions["torch"] == str(torch.__version__)
    assert {"python", "numpy", "nibabel", "torchmetrics", "commit"} <= versions.keys()

    def run(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment.versions()["commit"] == "unknown"


def test_the_processor_has_a_name_that_results_record():
    name = environment.processor_name()
    assert name
    assert name in environment.describe_device(torch.device("cpu"))
