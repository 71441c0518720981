"""Settings: one mechanism, refused early, with the field's name and value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.build_dataset import BuildDataset
from jobs.support.settings import parse, to_yaml

NEEDED = ["region=11,48,12,49", "period=2023-06", "store=chips.zarr"]


def test_words_flags_and_files_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(
        yaml.safe_dump(
            {"region": "11,48,12,49", "period": "2023-06", "store": "chips.zarr", "pairing": {"max_dt_days": 2.0}}
        )
    )
    from_words = parse(BuildDataset, [*NEEDED, "pairing.max_dt_days=2"])
    from_flags = parse(BuildDataset, [*(f"--{word}" for word in NEEDED), "--pairing.max-dt-days", "2"])
    assert from_words == from_flags == parse(BuildDataset, [f"config={path}"])


def test_the_command_line_wins_over_the_file_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("pairing: {max_dt_days: 2.0, max_cloud_percent: 10}\nseed: 4\n")
    settings = parse(BuildDataset, ["--config", str(path), *NEEDED, "pairing.max_dt_days=1"])
    assert (settings.pairing.max_dt_days, settings.pairing.max_cloud_percent, settings.seed) == (1.0, 10.0, 4)


def test_printed_settings_can_be_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        parse(BuildDataset, [*NEEDED, "screening.max_cloud_fraction=0.5", "--print-config"])
    assert done.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    again = parse(BuildDataset, [f"config={path}"])
    assert again.screening.max_cloud_fraction == 0.5
    assert to_yaml(again) == path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["regin=1"], "unknown setting 'regin'; did you mean 'region'?"),
        ([*NEEDED, "pairing.max_dt_day=1"], "did you mean 'pairing.max_dt_days'?"),
        ([*NEEDED, "pairing.max_dt_days=-1"], "pairing.max_dt_days='-1': Input should be greater than 0"),
        ([*NEEDED, "seed=three"], "seed='three'"),
        ([*NEEDED, "codec=gzip"], "codec='gzip'"),
        (["region=1,2,3,4", "store=x"], "period is required"),
        ([*NEEDED, "shard_chips=16"], "block_cells=8: 64 chips do not fit shard_chips=16"),
        (["config=no-such.yaml"], "config=no-such.yaml: No such file"),
        (["region"], "'region' is not a setting: write key=value"),
    ],
)
def test_wrong_settings_are_refused_with_name_and_value(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(BuildDataset, words)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse(BuildDataset, ["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "Largest time between the two acquisitions, days. (default: 3.0)",
        "Side of a chip, pixels of 10 m. (default: 264)",
        "(required)",
    ):
        assert phrase in text
