"""A dataset on one self-contained page: where, when, how near in time, what is missing and why, and some chips."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib.colors import to_hex

from jobs.support import words
from jobs.support.chip_pictures import SCL_CLASSES, SCL_COLOURS, jpeg, label_colour, png, views
from jobs.support.dataset_facts import DatasetFacts, Histogram, dataset_facts, even_rows
from jobs.support.pictures import coverage_map
from pipeline.layout import Layout
from pipeline.objects import Objects
from pipeline.store import Store
from pipeline.types import Watch, unwatched
from pipeline.versions import Version

_COLOURS: Final[Mapping[str, str]] = {
    "written": "#0b7a75", "rejected": "#edae49", "failed": "#d1495b", "chips": "#0b7a75", "pixels": "#0b7a75",
    "ascending": "#0b7a75", "descending": "#7a5ea8",
    "train": "#0b7a75", "val": "#edae49", "test": "#7a5ea8", "buffer": "#b5c1c6",
}  # fmt: skip
_OTHER: Final = "#5c6f78"
_PLOT: Final = (480, 120)
"""Width and height of a plot in its own units; it is stretched to what there is."""

_MOST_MONTHS: Final = 120
_LONGEST_KEY: Final = 24
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def write_dataset_report(
    version: Version,
    out: Objects,
    *,
    name: str = "report.html",
    gallery: int = 12,
    seed: int = 0,
    watch: Watch = unwatched,
) -> str:
    """Write a page about a store up to a version.

    Args:
        version: Planned at least; while it is building, the page says what is done so far.
        out: Where the page goes.
        name: Of the page.
        gallery: How many chips to show.
        seed: Decides which.
        watch: Shows how many candidates have been counted.

    Returns:
        Where the page is.
    """
    out.put(name, dataset_page(version, gallery=gallery, seed=seed, watch=watch).encode())
    return f"{out.url}/{name}"


def dataset_page(version: Version, *, gallery: int = 12, seed: int = 0, watch: Watch = unwatched) -> str:
    """The page itself, see `write_dataset_report`."""
    facts = dataset_facts(version, samples=gallery, seed=seed, watch=watch)
    counts = facts.counts
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.support"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        words=words.in_words,
        n=words.count,
        date=_date,
        percent=_percent,
        colour=lambda name: _COLOURS.get(name, _OTHER),
    )
    chips = _gallery(version, facts, gallery)
    days = "days_between" in facts.histograms
    fractions = {name: each for name, each in facts.histograms.items() if name != "days_between"}
    spread = {name: each for name, each in fractions.items() if np.count_nonzero(each.total) > 1}
    return environment.get_template("dataset.html.j2").render(
        **counts,
        map=_map(facts),
        days_plot=_plot(facts.histograms["days_between"], "radar after optical, days") if days else None,
        fraction_plots=[_plot(each, _AXES[name], squeezed=True) for name, each in spread.items()],
        constant=[(_AXES[name], counts["fractions"][name]) for name in fractions if name not in spread],
        months=_months(counts["time"]),
        shares=_shares(counts["ledger"]),
        band_plots=[
            _plot(Histogram.from_dict(band["histogram"]), band["units"], height=34) for band in counts["bands"]
        ],
        gallery=chips,
        keys=_keys(Store.open(version.url).layout, chips),
        request_text=json.dumps(counts["request"], indent=1, sort_keys=True, ensure_ascii=False),
    )


_AXES: Final[Mapping[str, str]] = {
    "valid_fraction": "pixels with data in both sensors",
    "clear_fraction": "clear ground among valid pixels",
    "cloud_fraction": "cloud among valid pixels",
    "shadow_fraction": "cloud shadow among valid pixels",
    "snow_fraction": "snow among valid pixels",
    "radar_valid_fraction": "pixels with radar data",
    "border_noise_fraction": "radar border noise",
}
"""Fraction -> what its axis says."""


def _map(facts: DatasetFacts) -> str | None:
    return _inline(coverage_map(facts.place_corners, facts.place_chips), "png") if len(facts.place_corners) else None


def _gallery(version: Version, facts: DatasetFacts, number: int) -> list[dict[str, Any]]:
    """Some chips with their pictures, evenly over the splits."""
    store = Store.open(version.url)
    chosen = even_rows(facts.samples, number)
    about = _about([row for _, row in chosen], version)
    shown = []
    for split, row in chosen:
        chip = store.read_chip(row)
        pictures = {
            title: _inline(jpeg(each), "jpeg") if title in ("true colour", "radar") else _inline(png(each), "png")
            for title, each in views(store.layout, chip).items()
        }
        shown.append({"row": row, "split": split, "pictures": pictures, **about[row]})
    return shown


def _about(rows: Sequence[int], version: Version) -> dict[int, dict[str, Any]]:
    """Cell, moment and time between the looks of some rows; reads little more than those."""
    names = ["row", "cell", "optical_datetime", "dt_s", "orbit_state"]
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        owner = next(each for each in reversed(version.versions()) if each.plan and row >= each.plan["first_row"])
        shard = row // Store.open(version.url).layout.shard_chips
        manifest = owner.manifest_of(shard, columns=names)
        found[row] = manifest.filter(pc.equal(manifest["row"], row)).to_pylist()[0]
    return found


def _keys(layout: Layout, chips: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """What the colours of classes mean: title of a view -> (class, colour)."""
    keys = {"scene classes": [(name, SCL_COLOURS[code]) for code, name in SCL_CLASSES.items()]}
    for name, classes in layout.labels.items():
        colours = label_colour(np.asarray([sorted(classes)], np.uint8))[0]
        keys[name] = [
            (classes[code], to_hex(colour / 255)) for code, colour in zip(sorted(classes), colours, strict=True)
        ]
    shown = {title for chip in chips for title in chip["pictures"]}
    return {title: key for title, key in keys.items() if title in shown and len(key) <= _LONGEST_KEY}


def _months(time: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Chips per month from first to last, or per month of the year where there are too many."""
    if not time["months"]:
        return []
    first, last = (np.datetime64(min(time["months"])), np.datetime64(max(time["months"])))
    span = [str(month) for month in np.arange(first, last + 1)]
    counted = [(month, time["months"].get(month, 0)) for month in span]
    if len(span) > _MOST_MONTHS:
        counted = list(zip(_MONTHS, time["months_of_year"], strict=True))
    most = max(number for _, number in counted)
    return [{"name": name, "count": number, "share": number / most} for name, number in counted]


def _shares(ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    total = max(1, ledger["requested"])
    return [
        {"name": name, "count": ledger[name], "share": ledger[name] / total}
        for name in ("written", "rejected", "failed")
    ]


def _plot(histogram: Histogram, axis: str, *, height: int = _PLOT[1], squeezed: bool = False) -> dict[str, Any]:
    """Stacked bars as SVG that stretches; its labels are text of the page, so they stay readable on a phone.

    Args:
        histogram: What to draw.
        axis: What the horizontal axis says.
        height: Of the drawing, in its own units.
        squeezed: Bars grow with the square root of their count, so that a bin of all chips does not hide the rest.
    """
    edges, width = histogram.edges, _PLOT[0]
    total = histogram.total
    most = max(1, int(total.max()))
    full = total / most
    tallest = height * (np.sqrt(full) if squeezed else full)
    scale = width / (edges[-1] - edges[0])
    below = np.zeros(len(total))
    parts = []
    for name, counts in histogram.series.items():
        colour = _COLOURS.get(name, _OTHER)
        for index in np.flatnonzero(counts):
            # A bin of few chips beside one of many is still seen.
            tall = max(tallest[index] * counts[index] / total[index], 1.2)
            left, wide = (edges[index] - edges[0]) * scale, (edges[index + 1] - edges[index]) * scale
            top = height - below[index] - tall
            says = f"{edges[index]:g} to {edges[index + 1]:g}: {words.count(counts[index])} {name}"
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(wide - 0.8, 0.5):.1f}" height="{tall:.1f}" '
                f'fill="{colour}"><title>{says}</title></rect>'
            )
            below[index] += tall
    svg = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{axis}">'
    return {
        "svg": Markup(f"{svg}{''.join(parts)}</svg>"),  # noqa: S704  # numbers and names of ours
        "axis": axis,
        "most": most,
        "ticks": [f"{edge:.4g}" for edge in (edges[0], (edges[0] + edges[-1]) / 2, edges[-1])],
        "series": [(name, _COLOURS.get(name, _OTHER), int(counts.sum())) for name, counts in histogram.series.items()],
    }


def _date(moment: str | datetime | None) -> str:
    return f"{moment}"[:10] if moment else "none"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.9995 else f"{100 * share:.0f} %"


def _inline(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
