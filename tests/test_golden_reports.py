"""The numbers of the reports on a known study are those in ``golden_reports.json``, to the last digit that is shown."""

from __future__ import annotations

import json
from typing import Any

import golden
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> golden.Numbers:
    numbers = golden.reports(golden.Study(tmp_path_factory.mktemp("golden") / "study"))
    return json.loads(json.dumps(numbers, allow_nan=False))


@pytest.fixture(scope="module")
def expected() -> golden.Numbers:
    return json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("report", ["compare two", "compare three", "profile", "topology"])
def test_numbers_are_the_same(report: str, found: golden.Numbers, expected: golden.Numbers) -> None:
    assert found[report].keys() == expected[report].keys()
    for output, numbers in expected[report].items():
        check(found[report][output], numbers, output)


def check(found: Any, expected: Any, where: str) -> None:
    """Words and what people read are equal; numbers for machines agree to 11 digits, as sums differ between processors."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            check(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            check(found[i], value, f"{where}, {i}")
    elif isinstance(expected, str) and where.startswith("csv"):
        check([number(cell) for cell in found.split(",")], [number(cell) for cell in expected.split(",")], f"line of {where}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-14), where
    else:
        assert found == expected, where


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
