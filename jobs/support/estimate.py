"""What building would cost, before a pixel is read: from the plan's own numbers and rates that were measured.

Everything here is arithmetic on a `Workload`. What is a model rather than a count says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.support import words
from pipeline.layout import Layout
from pipeline.limits import HostLimits

Curve = Mapping[int, tuple[float, float, float]]
"""Side of a block in cells of 264 px -> requests, megabytes and core-milliseconds per chip of it."""

READING: Final[Mapping[str, Curve]] = {
    "window": {
        1: (45, 8.19, 438), 2: (12.8, 4.42, 112), 4: (4.0, 2.70, 60), 8: (1.33, 1.84, 48), 16: (0.97, 1.56, 66),
    },
    "stackstac": {
        1: (45, 8.44, 526), 2: (12.8, 4.55, 164), 4: (4.8, 3.25, 102), 8: (1.33, 1.84, 96), 16: (1.2, 1.66, 88),
    },
}  # fmt: skip
"""Measured on full-size scenes (10 980 px, 15 assets) over a loopback server with 40 ms per request, on two cores: time
is that of both, beside other work: a careful figure. At 8 cells, the default, requests and megabytes are those in
`infra/benchmarks.md`, which differ by some hundredths with the place of a block; the others (requests and megabytes of
`window` at 4 apart) were seen on scenes whose radar was incompressible noise, before rows of blocks came at once."""

CHIP_CORE_MS: Final = 12.0
"""Beside reading: decibel, screening, statistics, hash and lz4 of a 264 px chip; measured one by one, together 7.5, and
half as much again for what lies between."""

CODEC_RATIO: Final[Mapping[str, float]] = {"lz4": 0.68, "zstd": 0.64, "none": 1.0}
"""Stored over raw bytes, on real scenes."""

ITEMS_PER_PAGE: Final = 100
TOKEN_S: Final = 2700.0
"""Planetary Computer's signatures live about 45 minutes where they live shortest."""

CONTAINERS: Final = 2
"""One of each sensor; each has a signature of its own."""

EGRESS_USD_PER_GB: Final = 0.087
"""List price of the large clouds for what leaves them, first terabytes of a month; not measured."""

PLAN_CORE_US: Final = 0.4
"""Planning one candidate whose pair is known, microseconds of CPU."""

PLAN_BYTES: Final = 28.0
"""Of the driver's memory per candidate while it plans; 0.2 GB come on top."""

MANIFEST_BYTES: Final = 0.5
"""At rest, per candidate."""

SEAL_SHARD_MS: Final = 12.0
"""Of the driver's time per shard: its part of the chip table is read, compared with the plan and compacted."""

LEDGER_BYTES: Final = 250.0
"""Of the chip table at rest, per candidate: hash, 28 statistics, fractions."""

_CELLS_AT_ONCE: Final = 8_000_000
"""So many cells are collected before those that are the same are put together."""

NODE_MB_S: Final = 1250.0
"""Ten gigabits per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be built, counted from the plan."""

    cells: int
    """Asked for."""

    cells_with_pairs: int
    candidates: int
    units: int
    """Blocks of cells of one pair of acquisitions: what is read at once."""

    shards: int
    items: int
    """Of both sensors, found in the catalog."""

    expected_chips: float
    """Model: a chip of a scene with a share c of cloud is kept with probability 1 - c x (1 - limit)."""

    rejected_units: float
    """Model: units in which no chip is expected, since clouds are larger than blocks: as many as chips."""

    unit_areas: tuple[tuple[int, int], ...]
    """(cells that a unit's bounding box has, how many such units)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What it would cost; from the least to the most where cloud decides."""

    workload: Workload
    requests: tuple[int, int]
    download_bytes: tuple[int, int]
    store_bytes: tuple[int, int]
    """Expected, and if every candidate is kept."""

    manifest_bytes: int
    search_requests: int
    tokens: int
    tasks: int
    """One per shard."""

    hours: Mapping[int, float]
    """CPUs -> wall time."""

    bound_by: Mapping[int, str]
    """CPUs -> what decides the time: cpu, network, archive."""

    egress_usd: tuple[float, float]
    """To download from a public archive; to take the store out of its cloud once."""

    cpu_hours: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        content = asdict(self)
        for name in ("hours", "bound_by"):
            content[name] = {str(cpus): value for cpus, value in content[name].items()}
        return content


def workload_of(
    parts: Iterable[pa.Table],
    looks: pa.Table,
    cloud_percent: Mapping[str, float],
    *,
    block_cells: int,
    max_cloud_fraction: float,
    cells: int,
    items: int,
) -> Workload:
    """Count a plan that was made but not written.

    Args:
        parts: Rows of the plan with shard, epsg, column, cell_row and look, whole units in each part.
        looks: What `look` counts in, with pair and optical_items.
        cloud_percent: Of optical items by id, over their whole scene.
        block_cells: Side of the blocks that the plan was made in, cells.
        max_cloud_fraction: Most cloud that a chip is kept with.
        cells: How many were asked for.
        items: How many the catalog has, of both sensors.
    """
    kept_share = _kept_shares(looks, cloud_percent, max_cloud_fraction)
    pair_numbers = np.unique(looks["pair"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    look_places = np.argsort(looks["look"].to_numpy(), kind="stable") if looks.num_rows else np.empty(0, np.int64)
    seen: set[int] = set()
    cells_seen: list[NDArray[np.int64]] = []
    areas: dict[int, int] = {}
    candidates, expected, rejected = 0, 0.0, 0.0
    for part in parts:
        epsg, column, row, look = (part[n].to_numpy().astype(np.int64) for n in ("epsg", "column", "cell_row", "look"))
        place = look_places[look]
        candidates += len(look)
        expected += float(kept_share[place].sum())
        seen.update(np.unique(part["shard"].to_numpy()).tolist())
        cells_seen.append(np.unique((epsg << 48) | ((column + (1 << 23)) << 24) | (row + (1 << 23))))
        if sum(map(len, cells_seen)) > _CELLS_AT_ONCE:
            cells_seen = [np.unique(np.concatenate(cells_seen))]
        # A unit's rows follow each other.
        keys = np.column_stack([epsg, column // block_cells, row // block_cells, pair_numbers[place]])
        starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))[: len(look)]
        rejected += float((1 - kept_share[place[starts]]).sum())
        extent = _extent(column, starts) * _extent(row, starts)
        for area, number in zip(*np.unique(extent, return_counts=True), strict=True):
            areas[int(area)] = areas.get(int(area), 0) + int(number)
    return Workload(
        cells=cells,
        cells_with_pairs=len(np.unique(np.concatenate(cells_seen))) if cells_seen else 0,
        candidates=candidates,
        units=sum(areas.values()),
        shards=len(seen),
        items=items,
        expected_chips=expected,
        rejected_units=rejected,
        unit_areas=tuple(sorted(areas.items())),
    )


def estimate(
    workload: Workload,
    layout: Layout,
    *,
    reader: str = "window",
    limits: HostLimits | None = None,
    signed: bool = True,
    searched: bool = True,
    cpus: Iterable[int] = (16, 64, 256),
) -> Estimate:
    """What a workload costs.

    Args:
        workload: From `workload_of`.
        layout: Of the store to be built.
        reader: window or stackstac.
        limits: How often a host of the archive's files may be asked; None is as often as one can.
        signed: Whether each container needs a signature.
        searched: Whether the catalog is asked, which it is not about what is planned already.
        cpus: For how many to say the time; one node is taken to have 16 and ten gigabits per second.
    """
    scale = layout.side_px / 264
    requests = megabytes = core_s = 0.0
    for area, number in workload.unit_areas:
        # A unit is read as the box around its cells, whatever is missing in between.
        side = math.sqrt(area) * scale
        per_chip = _per_chip(READING[reader], side)
        requests, megabytes, core_s = (
            total + number * side**2 * rate
            for total, rate in zip(
                (requests, megabytes, core_s), (per_chip[0], per_chip[1], per_chip[2] / 1e3), strict=True
            )
        )
    # Of a unit without a clear chip only the scene classification is read, which is one of fifteen files.
    read_share = 1 - (workload.rejected_units / workload.units if workload.units else 0) * 14 / 15
    chip_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.arrays().values())
    stored = chip_bytes * CODEC_RATIO[layout.codec]
    cpu_s = core_s * read_share + workload.expected_chips * CHIP_CORE_MS / 1e3 * scale**2
    times = {n: _wall(n, cpu_s, megabytes * read_share, requests * read_share, limits) for n in cpus}
    hours = {n: wall / 3600 for n, (wall, _) in times.items()}
    longest = max(hours.values(), default=0.0)
    kept, most = workload.expected_chips * stored, workload.candidates * stored
    return Estimate(
        workload=workload,
        requests=(round(requests * read_share), round(requests)),
        download_bytes=(round(megabytes * read_share * 1e6), round(megabytes * 1e6)),
        store_bytes=(round(kept), round(most)),
        manifest_bytes=round(workload.candidates * (MANIFEST_BYTES + LEDGER_BYTES)),
        search_requests=2 + math.ceil(workload.items / ITEMS_PER_PAGE) if searched else 0,
        tokens=CONTAINERS * max(1, math.ceil(longest * 3600 / TOKEN_S)) if signed else 0,
        tasks=workload.shards,
        hours={n: round(value, 4) for n, value in hours.items()},
        bound_by={n: what for n, (_, what) in times.items()},
        egress_usd=(0.0, round(kept / 1e9 * EGRESS_USD_PER_GB, 2)),
        cpu_hours=round(cpu_s / 3600, 3),
    )


def estimate_lines(found: Estimate) -> Iterator[str]:
    """An estimate in words, a line each."""
    w = found.workload
    share = w.expected_chips / w.candidates if w.candidates else 0.0
    yield (
        f"{w.candidates} candidate chips of {w.cells_with_pairs} of {w.cells} cells, in {w.units} blocks of pairs from "
        f"{w.items} items"
    )
    yield (
        f"about {w.expected_chips:.0f} chips expected ({share:.0%}: a chip of a scene with c % of cloud is taken to be "
        "cloudy in c % of cases)"
    )
    yield f"{found.tasks} tasks, one per shard; {found.search_requests} requests to search, {found.tokens} signatures"
    yield (
        f"download {_span(found.download_bytes)} in {found.requests[0]} to {found.requests[1]} requests, less the "
        "more cloud the scene classification shows"
    )
    yield f"store about {words.size(found.store_bytes[0])}, at most {words.size(found.store_bytes[1])}"
    yield f"plan and ledger about {words.size(found.manifest_bytes)}"
    for cpus, hours in found.hours.items():
        by = {
            "cpu": "",
            "network": ", bound by the nodes' network",
            "archive": ", bound by the archive's request limit",
        }
        yield f"on {cpus} CPUs about {words.duration(hours * 3600)}{by[found.bound_by[cpus]]}"
    yield (
        f"{found.cpu_hours:.1f} CPU-hours; downloading from a public archive costs nothing, taking the store out of "
        f"its cloud once about {found.egress_usd[1]:.2f} USD"
    )


def paper_workload(candidates: int, *, block_cells: int = 8, shard_chips: int = 256, cloud: float = 0.4) -> Workload:
    """A workload of full blocks, to plan on paper.

    Args:
        candidates: How many chips to try.
        block_cells: Side of the blocks, cells.
        shard_chips: Rows of a shard, of which whole blocks are packed.
        cloud: Share of candidates that screening rejects.
    """
    per_unit = block_cells**2
    units = math.ceil(candidates / per_unit)
    return Workload(
        cells=math.ceil(candidates / _LOOKS_PER_CELL),
        cells_with_pairs=math.ceil(candidates / _LOOKS_PER_CELL),
        candidates=candidates,
        units=units,
        shards=math.ceil(units / max(1, shard_chips // per_unit)),
        items=math.ceil(candidates / _CELLS_PER_ITEM) * 2,
        expected_chips=candidates * (1 - cloud),
        rejected_units=units * cloud,
        unit_areas=((per_unit, units),),
    )


_LOOKS_PER_CELL: Final = 12
_CELLS_PER_ITEM: Final = 1700
"""A Sentinel-2 tile has 110 km, a cell 2.64 km."""


def paper_plan(
    chips: int,
    *,
    limits: HostLimits,
    nodes: Iterable[int] = (1, 4, 16, 64),
    cloud: float = 0.4,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """What so many chips in the store take, on paper, and what gives way first.

    Args:
        chips: Wanted in the store.
        limits: How often a host of the archive's files may be asked.
        nodes: Of 16 CPUs and ten gigabits per second each.
        cloud: Share of candidates that screening rejects.
        layout: Of the store.
    """
    layout = layout or Layout()
    nodes = list(nodes)
    candidates = round(chips / (1 - cloud))
    work = paper_workload(candidates, shard_chips=layout.shard_chips, cloud=cloud)
    found = estimate(work, layout, limits=limits, cpus=[16 * n for n in nodes])
    free = estimate(work, layout, limits=None, cpus=[16 * n for n in nodes])
    saturated = next((n for n in nodes if found.bound_by[16 * n] == "archive"), None)
    return {
        "chips": chips,
        "candidates": candidates,
        "tasks": found.tasks,
        "requests": found.requests[0],
        "download_tb": round(found.download_bytes[0] / 1e12, 2),
        "store_tb": round(found.store_bytes[0] / 1e12, 2),
        "objects": found.tasks * len(layout.arrays()),
        "search_requests": found.search_requests,
        "tokens": found.tokens,
        "hours": {n: found.hours[16 * n] for n in nodes},
        "hours_without_limit": {n: free.hours[16 * n] for n in nodes},
        "manifest_mb": round(candidates * MANIFEST_BYTES / 1e6, 1),
        "ledger_mb": round(candidates * LEDGER_BYTES / 1e6, 1),
        "driver_gb": round(0.2 + candidates * PLAN_BYTES / 1e9, 2),
        "planning_s": round(candidates * PLAN_CORE_US / 1e6, 1),
        "sealing_s": round(found.tasks * SEAL_SHARD_MS / 1e3, 1),
        "archive_is_the_limit_from_nodes": saturated,
    }


def paper_section(limits: HostLimits) -> str:
    """The plans for a million and a hundred million chips, as a section of a Markdown page."""
    plans = [paper_plan(number, limits=limits) for number in (10**6, 10**8)]
    rows: list[tuple[str, str]] = [
        ("candidates (4 of 10 are cloudy)", "candidates"),
        ("shards = tasks", "tasks"),
        ("objects (one per shard and array)", "objects"),
        ("requests for pixels", "requests"),
        ("requests to search", "search_requests"),
        ("signatures", "tokens"),
        ("download, TB", "download_tb"),
        ("store, TB", "store_tb"),
        ("manifest, MB", "manifest_mb"),
        ("ledger, MB", "ledger_mb"),
        ("driver's memory while planning, GB", "driver_gb"),
        ("planning without pairing, CPU s", "planning_s"),
        ("sealing, on the driver, s", "sealing_s"),
    ]
    lines = ["| chips in the store | 1 M | 100 M |", "|---|---|---|"]
    lines += [f"| {title} | {' | '.join(_number(plan[name]) for plan in plans)} |" for title, name in rows]
    for nodes in plans[0]["hours"]:
        spans = [[words.duration(plan[name][nodes] * 3600) for name in _TIMES] for plan in plans]
        cells = " | ".join(f"{with_limit} ({without})" for with_limit, without in spans)
        lines.append(f"| on {_nodes(nodes)} (without the archive's limit) | {cells} |")
    return "\n".join([*lines, "", *_first_to_break(plans, limits)]) + "\n"


_TIMES: Final = ("hours", "hours_without_limit")


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number > 1 else ''} of 16 CPUs"


def _first_to_break(plans: list[dict[str, Any]], limits: HostLimits) -> Iterator[str]:
    million, many = (min(plan["hours"].values()) * 3600 for plan in plans)
    plan = plans[1]
    saturated = plan["archive_is_the_limit_from_nodes"]
    if saturated:
        yield (
            f"What breaks first is at the archive: {limits.rate_per_s:g} requests per second and host, a limit that "
            f"we set ourselves, are reached with {_nodes(saturated)}. Beyond that more nodes do not help: 100 M chips "
            f"take {words.duration(many)}, 1 M {words.duration(million)}. Only a copy of the files nearby, or the "
            "operator's leave for more, changes that."
        )
    yield (
        f"{'Next is' if saturated else 'What breaks first is'} the driver: {plan['driver_gb']:g} GB for the plan of "
        f"100 M chips, {PLAN_BYTES:g} bytes per candidate, so that a billion candidates want {0.2 + PLAN_BYTES:.0f} "
        f"GB, or a version for each region. Then the ledger, {plan['ledger_mb'] / 1e3:.0f} GB, which readers go "
        f"through part by part, {_number(plan['objects'])} objects, and sealing, which takes the driver "
        f"{words.duration(plan['sealing_s'])}. Workers do not grow with the number of chips."
    )


def _kept_shares(looks: pa.Table, cloud_percent: Mapping[str, float], limit: float) -> NDArray[np.float64]:
    """(look,) probability that a chip is kept."""
    clouds = [
        max((cloud_percent.get(item, 0.0) for item in items), default=0.0)
        for items in looks["optical_items"].to_pylist()
    ]
    return 1 - np.asarray(clouds, np.float64).reshape(-1) / 100 * (1 - limit)


def _extent(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """From the least to the greatest value of each run, both included."""
    if not len(values):
        return values
    return np.asarray(np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts) + 1)


def _per_chip(curve: Curve, side: float) -> tuple[float, float, float]:
    """Between measured block sides, straight lines between logarithms; beyond them, the nearest."""
    sides = sorted(curve)
    at = math.log(min(max(side, sides[0]), sides[-1]))
    columns = (np.log([curve[each][index] for each in sides]) for index in range(3))
    requests, megabytes, core_ms = (float(np.exp(np.interp(at, np.log(sides), column))) for column in columns)
    return requests, megabytes, core_ms


def _wall(cpus: int, cpu_s: float, megabytes: float, requests: float, limits: HostLimits | None) -> tuple[float, str]:
    """Seconds on so many CPUs, and what decides them."""
    spans = {"cpu": cpu_s / cpus, "network": megabytes / NODE_MB_S / max(1, cpus / 16)}
    if limits is not None:
        # Thirteen of fifteen files are the optical sensor's, and lie on one host.
        spans["archive"] = requests * 13 / 15 / limits.rate_per_s
    what = max(spans, key=lambda name: spans[name])
    return spans[what], what


def _span(low_high: tuple[int, int]) -> str:
    low, high = (words.size(value) for value in low_high)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 1000 else f"{value:g}"


def with_share(workload: Workload, share: float) -> Workload:
    """The same work if another share of its candidates is kept; for who knows better than the model."""
    return replace(workload, expected_chips=workload.candidates * share, rejected_units=workload.units * (1 - share))
