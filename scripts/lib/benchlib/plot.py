# SPDX-License-Identifier: GPL-2.0
"""What was measured, as a picture."""

from pathlib import Path

import matplotlib

from . import table

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


def draw(results: dict, path: Path) -> None:
    """Draws instruction counts, scaling, and, if it was measured, fio, side by side."""
    parts = [_counts, _scaling] + ([_fio] if "fio" in results else [])
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6 * len(parts), 4.5))
    for part, axis in zip(parts, axes):
        part(results, axis)
    figure.suptitle(f"virtio_swiotlb {results['commit']}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _counts(results: dict, axis: pyplot.Axes) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in results["kernel"]:
        shown = entry["kind"] == "map" and entry["fill"] == "mixed" and entry["from_device"]
        # Net of copies from_device=clear is below nothing: it zeroes where those would copy.
        shown = shown and entry["way"] != "clear" and entry["burst"] == 1
        if shown and entry["pool"] == 64 << 20:
            name = f"{entry['way']}, {entry['occupancy']} % full"
            lines.setdefault(name, []).append((entry["len"], table.net(entry)))
    for name, points in lines.items():
        axis.plot(*zip(*points), marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="bytes", ylabel="instructions less copies")
    axis.set_title("a map and an unmap, 64 MiB, mixed sizes")
    axis.legend(fontsize=7, loc="upper left")
    axis.set_ylim(top=axis.get_ylim()[1] * 10)


def _scaling(results: dict, axis: pyplot.Axes) -> None:
    ratios = table.scaling(results["kernel"])
    names = [f"{way}\n{size or 'read'}" for way, size in ratios]
    axis.bar(names, ratios.values())
    axis.axhline(2, color="grey", linewidth=0.5)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title("two CPUs over one")


def _fio(results: dict, axis: pyplot.Axes) -> None:
    ratios = results["fio"]["ratios"]
    names = [f"{backend}\n{job}" for backend, jobs in ratios.items() for job in jobs]
    for offset, way in ((-0.27, "region"), (0, "clear"), (0.27, "swiotlb")):
        values = [r[f"{way}/direct"] for jobs in ratios.values() for r in jobs.values()]
        axis.bar([i + offset for i in range(len(values))], values, width=0.27, label=way)
    axis.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
    axis.set_title("fio over direct DMA")
    axis.legend()
