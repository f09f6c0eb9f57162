"""What two runs left behind, compared."""

import json

import pytest


def equal_lines(actual, expected, tolerance):
    """Every number of `metrics.jsonl` but rates and memory, of two runs by their folders."""
    pairs = [
        [json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (expected, actual)
    ]
    for a, b in zip(*pairs, strict=True):
        for key in a.keys() - {"peak_mib", "tokens_per_s", "images_per_s"}:
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=tolerance / 10), key
