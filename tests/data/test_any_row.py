"""Spoiled rows of all formats, from a file to tokens: a small instance of `soak.py --only data`."""

from __future__ import annotations

from soak import data


def test_any_row_is_encoded_or_counted_with_a_reason():
    found = data(1600, seed=0)
    counts = found["counts"]
    assert counts["lost"] == counts["crashed"] == 0, found["crashes"]
    assert counts["encoded"] > 400 and counts["refused"] > 400 and len(found["reasons"]) > 20
