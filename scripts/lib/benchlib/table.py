# SPDX-License-Identifier: GPL-2.0
"""What was measured, as names with figures and as tables to read."""

import statistics
from collections.abc import Iterator, Sequence

#: Those that have a pool.
_WAYS = ("region", "swiotlb")


def net(entry: dict) -> float:
    """Instructions of one step, less the bare copies in it. Its part of the loop is in it."""
    return (entry["instructions"] - entry["copies"]) / entry["steps"]


def figures(measured: Sequence[dict]) -> dict[str, float]:
    """The instruction counts of our own pool, by a name that says what was counted."""
    named = {}
    for entry in measured:
        if entry.get("way") != "region":
            continue
        if entry["kind"] == "map":
            way = "from" if entry["from_device"] else "to"
            named[f"{_state(entry)}, {entry['len']} bytes {way} device"] = round(net(entry), 1)
        elif entry["kind"] == "read":
            named[f"{_state(entry)}, block read"] = round(net(entry), 1)
        elif entry["kind"] in ("churn", "refusal"):
            size = f"{entry['len']} bytes" if entry["len"] else "all sizes"
            named[f"{_state(entry)}, {entry['kind']}, {size}"] = round(net(entry), 1)
    return named


def _state(entry: dict) -> str:
    state = f"{_size(entry['pool'])}, {entry['fill']} {entry['occupancy']} %"
    burst = entry.get("burst", 1)
    return state if burst == 1 else f"{state}, bursts of {burst}"


def _size(count: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def text(results: dict) -> str:
    lines = []
    measured = results["kernel"]
    for section in (_maps, _from_device, _others, _scaling):
        lines += [*section(measured), ""]
    for architecture, key in (("amd64", "stock"), ("arm64", "arm64")):
        lines += [f"Debian's kernel for {architecture}:", ""]
        for section in (_maps, _others):
            lines += [*section(results[key]), ""]
    lines += [*_native(results["native"]), ""]
    if "fio" in results:
        lines += [*_fio(results["fio"]), ""]
    return "\n".join(lines)


def _maps(measured: Sequence[dict]) -> Iterator[str]:
    yield "instructions of a map and an unmap, less the bare copies (to / from the device)"
    rows: dict[tuple, dict] = {}
    sizes: list[int] = []
    for entry in measured:
        if entry["kind"] != "map" or entry["way"] not in _WAYS:
            continue
        row = rows.setdefault((entry["way"], _state(entry)), {})
        row.setdefault(entry["len"], {})[entry["from_device"]] = net(entry)
        if entry["len"] not in sizes:
            sizes.append(entry["len"])
    yield f"{'':46}" + "".join(f"{_size(size):>13}" for size in sizes)
    for (way, state), row in rows.items():
        cells = (
            f"{row[size][False]:.0f} / {row[size][True]:.0f}" if size in row else ""
            for size in sizes
        )
        yield f"{way:8} {state:37}" + "".join(f"{cell:>13}" for cell in cells)


def _from_device(measured: Sequence[dict]) -> Iterator[str]:
    yield "what the device is to write, 64 MiB, empty: instructions with all that is copied"
    for entry in measured:
        shown = entry["kind"] == "map" and entry["from_device"] and entry["fill"] == "empty"
        if shown and entry["pool"] == 64 << 20 and entry["burst"] == 1:
            way = {"region": "preserve"}.get(entry["way"], entry["way"])
            total = entry["instructions"] / entry["steps"]
            yield f"{way:8} {_size(entry['len']):8} {total:8.0f}"


def _others(measured: Sequence[dict]) -> Iterator[str]:
    yield "the loop around them: " + ", ".join(
        f"{net(entry) + entry['copies'] / entry['steps']:.0f} for a {entry['kind']}"
        for entry in measured
        if entry.get("way") == "none"
    )
    yield ""
    yield "a block read of 4 KiB (4 maps, 4 unmaps), less the bare copies"
    for entry in measured:
        if entry["kind"] == "read" and entry["way"] in _WAYS:
            yield f"{entry['way']:8} {_state(entry):37} {net(entry):8.0f}"
    yield ""
    yield "one is ended and one made at random (churn), and what a refusal takes"
    for entry in measured:
        if entry["kind"] in ("churn", "refusal") and entry["way"] in _WAYS:
            size = _size(entry["len"]) if entry["len"] else "all sizes"
            name = f"{_state(entry)}, {entry['kind']}, {size}"
            yield f"{entry['way']:8} {name:37} {net(entry):8.0f}"
    yield ""
    yield "the longest single call, less the bare copies"
    for entry in measured:
        if entry["kind"] == "longest":
            yield (
                f"{entry['way']:8} {_size(entry['pool']):8} map {entry['map']}"
                f" ({entry['map_len']} bytes), unmap {entry['unmap']} ({entry['unmap_len']} bytes),"
                f" the first refusal, with its message, {entry['first_refusal']}"
            )
    yield ""
    yield "what fits at once, for each MiB of pool"
    for entry in measured:
        if entry["kind"] == "capacity":
            mib = entry["pool"] / (1 << 20)
            yield (
                f"{entry['way']:8} {_size(entry['pool']):8} {entry['reads'] / mib:.0f} block reads,"
                f" {entry['packets'] / mib:.0f} packets of 60 bytes"
            )


def scaling(measured: Sequence[dict]) -> dict[tuple[str, int], float]:
    """Operations on two CPUs over those on one: the median of the rounds."""
    rates: dict[tuple[str, int, int], list[float]] = {}
    for entry in measured:
        if entry["kind"] == "scaling":
            key = (entry["way"], entry["len"], entry["cpus"])
            rates.setdefault(key, []).append(entry["ops"] / entry["ns"])
    median = {key: statistics.median(values) for key, values in rates.items()}
    return {
        (way, size): rate / median[way, size, 1]
        for (way, size, cpus), rate in median.items()
        if cpus == 2
    }


def _scaling(measured: Sequence[dict]) -> Iterator[str]:
    yield "operations in a second on two CPUs over those on one"
    for (way, size), ratio in scaling(measured).items():
        yield f"{way:8} {_size(size) if size else 'block read':12} {ratio:.2f}"


def _native(measured: Sequence[dict]) -> Iterator[str]:
    yield "the pool in a process, ns for a map and an unmap: one CPU, by the length of bursts"
    bursts = sorted({entry["burst"] for entry in measured if entry["kind"] == "pair"})
    yield f"{'':8}" + "".join(f"{burst:>8}" for burst in bursts)
    lengths: dict[int, dict[str, dict]] = {}
    for entry in measured:
        kind = f"pair {entry['burst']}" if entry["kind"] == "pair" else entry["kind"]
        lengths.setdefault(entry["len"], {})[kind] = entry
    for length, kinds in lengths.items():
        cells = (f"{kinds[f'pair {burst}']['ns']:8.1f}" for burst in bursts)
        yield f"{_size(length):8}" + "".join(cells)
    for length, kinds in lengths.items():
        call = kinds["call"]
        line = f"{_size(length):8} a call {call['median']}, 99.9 % {call['p999']}, {call['max']}"
        if "handoff" in kinds:
            handoff, two = kinds["handoff"], kinds["two"]
            line += (
                f"; from one CPU to another {handoff['ns']:.0f}, bare {handoff['bare_ns']:.0f};"
                f" two CPUs over one, over an empty loop {two['gain']:.2f}"
            )
        yield line


def _fio(measured: dict) -> Iterator[str]:
    yield "fio from end to end, requests in a second (medians), and over direct DMA"
    for backend, jobs in measured["medians"].items():
        for job, ways in jobs.items():
            direct = ways["direct"]["iops"]
            cells = (
                f"{way} {figures['iops']:8.0f} ({figures['iops'] / direct:.2f})"
                for way, figures in ways.items()
            )
            yield f"{backend:5} {job:18} " + "  ".join(cells)
