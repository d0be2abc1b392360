# SPDX-License-Identifier: GPL-2.0
"""scripts/bench: the command line.

    scripts/bench             all benchmarks: about 15 minutes on two CPUs
    scripts/bench --no-fio    without those from end to end: three minutes
    scripts/bench --accept    and keep the instruction counts as those to compare with
    scripts/bench --check     instruction counts alone, compared with those that were kept;
                              fails if one has grown by more than a tenth
"""

import argparse
import json
import subprocess
import sys

from guestlib import GuestError
from guestlib.paths import BUILD, TOP

from . import counts, fio, plot, table

#: Of each kernel.
KEPT = {
    "test": TOP / "selftests/bench/figures.json",
    "stock": TOP / "selftests/bench/figures-stock.json",
    "stock-arm64": TOP / "selftests/bench/figures-arm64.json",
}
RESULTS = BUILD / "bench/results"
TOLERANCE = 1.10
POOLS = ("1M", "64M", "1G")
#: The large one takes a minute, and shows nothing that the others do not.
POOLS_CHECKED = ("1M", "64M")


def main() -> int:
    arguments = _parse()
    try:
        return _check() if arguments.check else _measure(arguments)
    except GuestError as error:
        print(f"error: {error}", file=sys.stderr)
        if arguments.check:
            print("0 passed, 1 failed, 0 skipped")
        return 1


def _measure(arguments: argparse.Namespace) -> int:
    print("instruction counts", flush=True)
    measured = counts.counts("test", POOLS, peers=True)
    measured += counts.clear("64M")
    stock = counts.counts("stock", POOLS_CHECKED, peers=True)
    arm64 = counts.counts("stock-arm64", POOLS_CHECKED, peers=False)
    print("scaling", flush=True)
    measured += counts.scaling()
    print("the pool in a process", flush=True)
    results = {
        "commit": _commit(),
        "kernel": measured,
        "stock": stock,
        "arm64": arm64,
        "native": _native(),
    }
    if not arguments.no_fio:
        results["fio"] = fio.run(progress=lambda line: print(line, flush=True))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table.text(results)
    (RESULTS / "results.txt").write_text(text)
    print(text, end="")
    for suffix in ("svg", "png"):
        plot.draw(results, RESULTS / f"results.{suffix}")
    if arguments.accept:
        by_kernel = {"test": measured, "stock": stock, "stock-arm64": arm64}
        for kernel, entries in by_kernel.items():
            kept = table.figures(entries)
            KEPT[kernel].write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(f"figures and plots are in {RESULTS.relative_to(BUILD.parent)}")
    return 0


def _check() -> int:
    passed = failed = 0
    for kernel, file in KEPT.items():
        kept = json.loads(file.read_text())
        now = table.figures(counts.counts(kernel, POOLS_CHECKED, peers=False))
        worse = _worse(kept, now)
        for line in worse:
            print(f"{kernel}, {line}")
        passed += len(now) - len(worse)
        # No figures at all are a failure, too.
        failed += len(worse) if now else 1
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


def _worse(kept: dict[str, float], now: dict[str, float]) -> list[str]:
    """A line for each figure that has grown too much, or that nothing is known of."""
    lines = []
    for name, figure in now.items():
        if name not in kept:
            lines.append(
                f"{name}: {figure:.0f}, and nothing to compare with: scripts/bench --accept"
            )
        elif figure > kept[name] * TOLERANCE:
            lines.append(f"{name}: {figure:.0f} instructions, {kept[name]:.0f} before")
    return lines


def _native() -> list[dict]:
    """Times of the pool in a process: selftests/native says of what."""
    command = ["cargo", "run", "--quiet", "--locked", "--release", "-p", "virtio-swiotlb-native"]
    command += ["--manifest-path", str(TOP / "selftests/Cargo.toml")]
    command += ["--target-dir", str(BUILD / "target")]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise GuestError("the pool could not be measured in a process")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _commit() -> str:
    command = ["git", "-C", str(TOP), "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--no-fio", action="store_true", help="leave out what goes from end to end")
    add("--accept", action="store_true", help="keep the instruction counts")
    add("--check", action="store_true", help="compare with the counts that were kept")
    return parser.parse_args()


sys.exit(main())
