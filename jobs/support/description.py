"""What is in a store, in a cell of it and in one row, as JSON values and in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.support import words
from jobs.support.chip_pictures import chip_sheet, views
from jobs.support.dataset_facts import DatasetFacts
from pipeline.chip_places import centres, footprints, georeferences, place_columns
from pipeline.chip_table import FAILED, REJECTED, WRITTEN
from pipeline.grid import PIXEL_M, Cell, cell_at, is_owned
from pipeline.store import Store, StoreError
from pipeline.versions import Version, latest

_LONLAT: Final = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*")
_LISTED: Final = 40
"""Of what was tried over a cell, so much is listed in words; JSON has all."""

_OF_CHIP: Final = (
    "valid_fraction", "clear_fraction", "cloud_fraction", "shadow_fraction", "snow_fraction", "radar_valid_fraction",
    "border_noise_fraction",
)  # fmt: skip


def open_version(store: str, number: int | None) -> Version:
    """A version of a store by its number, or the newest, in whatever state.

    Raises:
        StoreError: There is no store, no version, or the version is not planned yet.
    """
    url = Store.open(store).url
    newest = latest(url)
    if newest is None:
        raise StoreError(f"{url} has no version yet: nothing was planned; run build_dataset to go on")
    version = newest if number is None else Version(url, number)
    if not 1 <= version.number <= newest.number:
        raise StoreError(f"{url} has no version {number}: its newest is {newest.number}")
    if version.state == "planning":
        known = "" if version.number == 1 else f"; version={version.number - 1} is the last that is complete"
        raise StoreError(f"{version.name} is not planned yet: run build_dataset again to complete it{known}")
    return version


def store_lines(facts: DatasetFacts) -> Iterator[str]:
    """A store in words, a line each."""
    c = facts.counts
    ledger, days, time = c["ledger"], c["days_between"], c["time"]
    yield f"{c['store']}, version {c['version']}, {c['state']}"
    yield _layout_line(c["layout"])
    for each in c["versions"]:
        if len(c["versions"]) > 1 or each["state"] != "sealed":
            planned = f"{each['requested']} candidates in {each['shards']} shards"
            yield f"version {each['version']}: {each['state']}, {planned}"
    done = "" if c["state"] == "sealed" else " known so far"
    yield (
        f"candidates{done}: {ledger['requested']}; written {ledger['written']}, rejected {ledger['rejected']}, "
        f"failed {ledger['failed']}"
    )
    what = "cells" if c["layout"]["grid"] else "places"
    yield f"{what}: {c['places']['with_chips']} of {c['places']['asked']} have a chip"
    if c["places"]["bbox"]:
        yield "centres from {1:.4f} to {3:.4f} north and {0:.4f} to {2:.4f} east".format(*c["places"]["bbox"])
    yield f"coordinate systems: {_counts(c['crs'])}"
    if time["first"]:
        yield f"optical looks from {time['first'][:10]} to {time['last'][:10]}"
        yield f"chips per month: {_counts(time['months'])}"
    if days:
        yield f"radar after optical, days: {', '.join(f'{name} {value:.2f}' for name, value in days.items())}"
        yield f"radar orbits: {_counts(c['orbits']['states'])}; {_counts(c['orbits']['relative_orbits'])}"
    for split, counts in c["splits"].items():
        yield f"split {split}: {counts['written']} written, {counts['rejected']} rejected, {counts['failed']} failed"
    yield from _reasons("looks not paired", c["pairs_not_taken"])
    yield from _reasons("chips rejected", ledger["reasons"])
    yield from _reasons("flagged", c["flags"])
    for kind in c["failures"]:
        yield f"could not be read: {kind['count']} x {kind['kind']}; first row {kind['first_row']}: {kind['example']}"
    for band in c["bands"]:
        percentiles = "".join(f", {name} % {value:g}" for name, value in band.get("percentiles", {}).items())
        yield f"band {band['band']}: mean {band['mean']:g}, deviation {band['std']:g}{percentiles}, {band['units']}"
    yield from _settings("request", c["request"])


def describe_cell(version: Version, name: str) -> dict[str, Any]:
    """What became of a cell: every look that was tried over it.

    Args:
        version: Planned; its own and all earlier versions are asked.
        name: Id of a cell, or longitude,latitude of a point in it.

    Raises:
        ValueError: The name is neither, or the store's chips lie on no grid.
        StoreError: No version knows the cell; says what the store knows around it.
    """
    layout = Store.open(version.url).layout
    if not layout.grid:
        raise ValueError(f"{version.url} holds chips that lie on no grid: ask for a row instead")
    cell = _cell(name, side_m=layout.side_px * PIXEL_M)
    tried: list[dict[str, Any]] = []
    rejections: list[dict[str, Any]] = []
    for each in version.versions():
        tried += _candidates_of(each, cell)
        for batch in each.rejection_batches():
            found = batch.filter(pc.equal(batch["cell"], cell.id)).to_pylist()
            rejections += [{"version": each.number, **row} for row in found]
    if not tried and not rejections:
        raise StoreError(_unknown(version, cell))
    lon, lat = cell.centre_lonlat
    statuses = [row["status"] for row in tried]
    return {
        "cell": cell.id,
        "store": version.url,
        "version": version.number,
        "centre": [round(lon, 5), round(lat, 5)],
        "side_m": cell.side_m,
        "rows": [row["row"] for row in tried if row["status"] == WRITTEN],
        "verdict": _verdict(statuses, rejections),
        "candidates": tried,
        "not_paired": rejections,
        "limits": {k: v for k, v in version.request.items() if k in ("pairing", "screening", "period", "per_cell")},
    }


def cell_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A cell in words, a line each."""
    lon, lat = found["centre"]
    yield f"cell {found['cell']}, {found['side_m']} m around {lat:.4f} north, {lon:.4f} east"
    yield found["verdict"]
    for row in found["candidates"][:_LISTED]:
        yield f"  {_fate(row)}"
    for row in found["not_paired"][:_LISTED]:
        look = row["optical"] or "no look"
        yield f"  {look}: {words.in_words(row['reason'])} ({row['reason']}: {row['detail']})"
    left = sum(max(0, len(found[name]) - _LISTED) for name in ("candidates", "not_paired"))
    if left:
        yield f"  and {left} more: format=json has them all"
    yield from _settings("limits", found["limits"])


def describe_row(version: Version, row: int) -> dict[str, Any]:
    """All that is known of one row.

    Raises:
        StoreError: No version has the row.
    """
    layout = Store.open(version.url).layout
    for each in reversed(version.versions()):
        plan = each.plan
        if plan is None or not plan["first_row"] <= row < plan["end_row"]:
            continue
        shard = row // layout.shard_chips
        planned = _only(each.manifest_of(shard), row)
        if planned is None:
            break
        ledger = _only(each.chips_of(shard), row)
        crs, transform = georeferences(pa.Table.from_pylist([planned]).select(place_columns(layout)), layout)
        centre = centres(footprints(crs, transform, side_px=layout.side_px))[0]
        return {
            "store": version.url,
            "version": each.number,
            "shard": shard,
            **_json(planned),
            "crs": crs[0] or None,
            "transform": transform[0].tolist() if crs[0] else None,
            "centre": [round(float(value), 5) for value in centre] if crs[0] else None,
            **_json(ledger or {"status": "not built yet"}),
        }
    ends = [each.plan["end_row"] for each in version.versions() if each.plan]
    if row < max(ends):
        raise StoreError(
            f"{version.name}: row {row} was left empty by the plan: what is read together stays in one shard, and "
            "every version begins a new one"
        )
    raise StoreError(f"{version.name} has no row {row}: its rows end at {max(ends) - 1}")


def row_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A row in words, a line each."""
    place = "" if not found["centre"] else f", {found['centre'][1]:.4f} north, {found['centre'][0]:.4f} east"
    yield f"row {found['row']}: {found['cell'] or found['pair']}{place}"
    yield f"  {_fate(found)}"
    yield f"  split {found['split']}, shard {found['shard']}, version {found['version']}, unit {found['unit']}"
    for sensor in ("optical", "radar"):
        yield f"  {sensor} items: {', '.join(found[f'{sensor}_items'] or ()) or 'none'}"
    if found["baseline"]:
        yield f"  processing baseline {found['baseline']}, offset taken off {found['offset_dn']}"
    if found.get("sha256"):
        yield f"  sha256 {found['sha256']}"
    for name in sorted(found):
        if name.startswith("label_"):
            yield f"  {name}: {found[name]}"


def row_picture(version: Version, found: Mapping[str, Any]) -> bytes:
    """The row's chip as PNG, with what is known of it.

    Raises:
        StoreError: The row holds no chip.
    """
    if found["status"] != WRITTEN:
        raise StoreError(f"row {found['row']} has no pixels to show: {_fate(found)}")
    store = Store.open(version.url)
    lines = [line for line in map(str.strip, row_lines(found)) if not line.startswith("sha256")][1:]
    pictures = views(store.layout, store.read_chip(found["row"]))
    title = f"row {found['row']}  {found['cell'] or found['pair']}"
    return chip_sheet(pictures, title=title, lines=lines)


def _cell(name: str, *, side_m: int) -> Cell:
    if point := _LONLAT.fullmatch(name):
        lon, lat = (float(number) for number in point.groups())
        if not (-180 <= lon <= 180 and -84 <= lat <= 84):
            raise ValueError(f"cell={name}: a point is longitude,latitude in degrees, -84 to 84 north")
        return cell_at(lon, lat, side_m=side_m)
    try:
        return Cell.from_id(name, side_m=side_m)
    except ValueError as error:
        raise ValueError(f"{error}; or give longitude,latitude of a point in it") from None


def _candidates_of(version: Version, cell: Cell) -> list[dict[str, Any]]:
    """Candidates of a cell with their fates; of the manifest only numbers are read for the others."""
    shards: set[int] = set()
    for batch in version.manifest_batches(columns=["row", "shard", "epsg", "column", "cell_row"]):
        wanted = {"epsg": cell.epsg, "column": cell.column, "cell_row": cell.row}
        keep = pc.equal(batch["epsg"], cell.epsg)
        for name, number in wanted.items():
            keep = pc.and_(keep, pc.equal(batch[name], number))
        shards.update(batch["shard"].filter(keep).to_pylist())
    found = []
    for shard in sorted(shards):
        manifest = version.manifest_of(shard)
        ledger = {row["row"]: row for row in version.chips_of(shard).to_pylist()}
        for row in manifest.filter(pc.equal(manifest["cell"], cell.id)).to_pylist():
            fate = ledger.get(row["row"], {"status": "not built yet"})
            found.append({"version": version.number, **_json(row), **_json(fate)})
    return found


def _unknown(version: Version, cell: Cell) -> str:
    """Why nothing is known of a cell, as far as that can be told."""
    near: list[str] = []
    zone: list[int] = [0, 0]
    for each in version.versions():
        for batch in each.manifest_batches(columns=["epsg", "column", "cell_row"]):
            here = batch.filter(pc.equal(batch["epsg"], cell.epsg))
            zone[0] += here.num_rows
            zone[1] += batch.num_rows
            close = pc.and_(
                pc.less_equal(pc.abs(pc.subtract(here["column"].cast(pa.int64()), cell.column)), 1),
                pc.less_equal(pc.abs(pc.subtract(here["cell_row"].cast(pa.int64()), cell.row)), 1),
            )
            near += [
                Cell(epsg=row["epsg"], column=row["column"], row=row["cell_row"], side_m=cell.side_m).id
                for row in here.filter(close).to_pylist()
            ]
    text = f"{version.name} knows nothing of cell {cell.id}: it was not asked for"
    if near:
        return f"{text}; it lies beside the region: {', '.join(sorted(set(near))[:8])} were asked for"
    if not is_owned(cell):
        owner = cell_at(*cell.centre_lonlat, side_m=cell.side_m)
        return f"{text}; its centre is owned by another zone: ask for {owner.id}"
    return f"{text}; of {zone[1]} candidates {zone[0]} are in its zone, none beside it"


def _verdict(statuses: Sequence[str], rejections: Sequence[Mapping[str, Any]]) -> str:
    number = statuses.count(WRITTEN)
    if number:
        return f"it has {number} chip{'s' if number > 1 else ''}"
    if not statuses:
        if all(row["reason"] == "excluded" for row in rejections):
            return "it has no chip: it was excluded"
        return f"it has no chip: none of {len(rejections)} looks made a pair"
    parts = [
        f"{statuses.count(status)} {what}"
        for status, what in (
            (REJECTED, "rejected by their pixels"),
            (FAILED, "could not be read"),
            ("not built yet", "not built yet"),
        )
        if status in statuses
    ]
    return f"it has no chip: of {len(statuses)} candidates {', '.join(parts)}"


def _fate(row: Mapping[str, Any]) -> str:
    """A candidate and what became of it, on one line."""
    look = f"row {row['row']}, {_moment(row['optical_datetime'])}"
    if row["dt_s"] is not None:
        later = "later" if row["dt_s"] >= 0 else "earlier"
        orbit = f", {row['orbit_state']} orbit {row['relative_orbit']}" if row["orbit_state"] else ""
        hours = abs(row["dt_s"]) / 3600
        apart = f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
        look += f", radar {apart} {later}{orbit}"
    seen = [
        f"{name.removesuffix('_fraction').replace('_', ' ')} {100 * row[name]:.1f} %"
        for name in _OF_CHIP
        if row.get(name) is not None
    ]
    said = {
        WRITTEN: "written",
        REJECTED: f"rejected: {words.in_words(row.get('reason') or '')}",
        FAILED: f"could not be read: {row.get('error')}",
    }.get(row["status"], row["status"])
    flags = "".join(f"; beware: {words.in_words(flag)}" for flag in (row.get("flags") or "").split())
    return f"{look}: {said}{' (' + ', '.join(seen) + ')' if seen else ''}{flags}"


def _moment(value: Any) -> str:
    return "no date" if value is None else str(value)[:16].replace("T", " ")


def _only(table: pa.Table, row: int) -> dict[str, Any] | None:
    found = table.filter(pc.equal(table["row"], row)).to_pylist()
    return dict(found[0]) if found else None


def _json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as JSON values: NaN is null."""
    return {name: _value(value) for name, value in row.items()}


def _value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, list):
        return [_value(each) for each in value]
    return value


def _layout_line(layout: Mapping[str, Any]) -> str:
    parts = [f"chips of {layout['side_px']} x {layout['side_px']} px"]
    if layout["optical_level"]:
        parts.append(f"optical {layout['optical_level']}")
    if layout["radar_product"]:
        parts.append(f"radar {layout['radar_product']}")
    parts += [f"labels {name}" for name in [*layout["labels"], *layout["chip_labels"]]]
    return f"{', '.join(parts)}; shards of {layout['shard_chips']}, codec {layout['codec']}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'unknown'} {number}" for name, number in counts.items()) or "none"


def _reasons(what: str, counts: Mapping[str, int]) -> Iterator[str]:
    for code, number in counts.items():
        yield f"{what}: {number} x {code} ({words.in_words(code)})"


def _settings(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    flat = {
        name if not inner else f"{name}.{inner}": value
        for name, group in values.items()
        for inner, value in (group.items() if isinstance(group, dict) else [("", group)])
    }
    if flat:
        yield f"{title}: {', '.join(f'{name}={value}' for name, value in flat.items())}"
