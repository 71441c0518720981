"""The chip table: what became of every candidate, without contradictions."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline import chip_table


def candidate(row: int, status: str = "written", **columns: Any) -> dict[str, Any]:
    proof = {"written": {"sha256": "ab"}, "rejected": {"reason": "cloudy"}, "failed": {"error": "timed out"}}
    base = {"row": row, "cell": f"33N_0001_{row:04d}", "pair": "p", "unit": "u", "split": "train"}
    return {**base, "status": status, **proof.get(status, {}), **columns}


def test_rows_may_come_in_any_order_and_end_ascending() -> None:
    table = chip_table.chip_table([candidate(3), candidate(1, "rejected"), candidate(2, mean=[1.0, 2.0])])
    assert table["row"].to_pylist() == [1, 2, 3]
    assert table.schema.equals(chip_table.SCHEMA)
    assert table["mean"].to_pylist() == [[], [1.0, 2.0], []]


def test_the_ledger_adds_up() -> None:
    rows = [
        candidate(0),
        candidate(1, "rejected"),
        candidate(2, "rejected", reason="no radar"),
        candidate(3, "rejected"),
        candidate(4, "failed"),
    ]
    assert chip_table.ledger(chip_table.chip_table(rows)) == {
        "requested": 5,
        "written": 1,
        "rejected": 3,
        "failed": 1,
        "reasons": {"cloudy": 2, "no radar": 1},
    }
    assert chip_table.ledger(chip_table.chip_table([]))["requested"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (candidate(7, sha256=""), "row 7 is 'written' with sha256=''"),
        (candidate(7, reason="cloudy"), "row 7 is 'written' with reason='cloudy'"),
        (candidate(7, "rejected", reason=""), "row 7 is 'rejected' with reason=''"),
        (candidate(7, "failed", error=""), "row 7 is 'failed' with error=''"),
        (candidate(7, "lost"), r"status must be one of written, rejected, failed, got \['lost'\]"),
        (candidate(7, colour="red"), r"unknown columns \['colour'\]"),
        (candidate(6), "rows must ascend"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chip_table.chip_table([candidate(6), row])


def test_a_column_of_another_type_is_refused() -> None:
    table = chip_table.chip_table([candidate(0)])
    wrong = table.set_column(0, "row", table["row"].cast(pa.int32()))
    with pytest.raises(ValueError, match="column row must be there as int64"):
        chip_table.check(wrong)


def test_labels_of_a_chip_are_further_columns() -> None:
    labelled = chip_table.chip_table([candidate(4, label_landcover=3)])
    plain = chip_table.chip_table([candidate(2)])
    both = chip_table.concatenate([labelled, plain, chip_table.SCHEMA.empty_table()])
    assert both["label_landcover"].to_pylist() == [None, 3]
    assert chip_table.concatenate([]).schema.equals(chip_table.SCHEMA)


def test_written_rows_are_those_of_the_split_that_hold_a_chip() -> None:
    rows = [candidate(5), candidate(3, split="val"), candidate(2, "rejected"), candidate(1), candidate(0, "failed")]
    table = chip_table.chip_table(rows)
    assert chip_table.written_rows(table).tolist() == [1, 3, 5]
    assert chip_table.written_rows(table, split="train").tolist() == [1, 5]
    assert chip_table.written_rows(table, split="test").tolist() == []
