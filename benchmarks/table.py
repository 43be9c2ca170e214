"""
The table of ratios: every measured thing beside its peer, in the same run and in turns, and what the machine itself can do beside them.

    python -m benchmarks.table               # measures, and renews benchmarks/ratios.json and the table in benchmarks/RESULTS.md
    python -m benchmarks.table --keep        # also makes what was measured the baseline, benchmarks/baseline.json
    python -m benchmarks.table --only start

``tests/unit/test_recorded_ratios.py`` compares the recorded ratios with the baseline: more than 15 % above it is a regression. It measures
nothing. Who renews the table on a machine with other work raises that; who then keeps it as the baseline has decided so.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks import bench_fetch, bench_start, stores

HERE = Path(__file__).parent
RECORDED, BASELINE, RESULTS = HERE / "ratios.json", HERE / "baseline.json", HERE / "RESULTS.md"
BEGIN, END = "<!-- ratios: made by `make bench-table` -->", "<!-- end of the ratios -->"
#: A recorded ratio may be so much above the baseline.
TOLERANCE = 1.15
PARTS = ("start", "large", "small")


class Row(Struct, frozen=True, kw_only=True):
    """One thing beside its peer: medians of seconds, and of the ratios of the turns."""

    what: str
    peer: str
    seconds: float
    peer_seconds: float
    #: What is aimed at; 0: nothing is.
    goal: float = 0.0

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


class Table(Struct, frozen=True, kw_only=True):
    """One run: the machine, what it can do, and the rows."""

    machine: str
    date: str
    #: The load of the machine when the run began, beside how many cores it has.
    load: float
    limits: dict[str, str] = {}
    rows: tuple[Row, ...] = ()


def regressions(recorded: Table, baseline: Table) -> list[str]:
    """Return the rows of *recorded* that are more than ``TOLERANCE`` above those of *baseline*, or are missing, for people."""
    found = {(row.what, row.peer): row for row in recorded.rows}
    wrong = []
    for before in baseline.rows:
        now = found.get((before.what, before.peer))
        if now is None:
            wrong.append(f"{before.what}, beside {before.peer}: it was not measured any more")
        elif now.ratio > TOLERANCE * before.ratio:
            wrong.append(f"{before.what}, beside {before.peer}: {now.ratio:.2f}, and it was {before.ratio:.2f}")
    return wrong


def render(table: Table) -> str:
    """Return *table* as Markdown."""
    lines = [BEGIN, "", f"{table.machine}; {table.date}, load {table.load:.1f} at the beginning. What the machine can do in the same run:"]
    lines[-1] += " " + "; ".join(f"{name} {value}" for name, value in table.limits.items()) + "."
    lines += ["", "| what | peer | seconds | the peer's | ratio | goal |", "|---|---|---:|---:|---:|---:|"]
    for row in table.rows:
        goal = f"{row.goal:.2f}" if row.goal else "–"
        lines.append(f"| {row.what} | {row.peer} | {row.seconds:.3f} | {row.peer_seconds:.3f} | {row.ratio:.2f} | {goal} |")
    return "\n".join([*lines, "", END])


def read(path: Path) -> Table:
    return msgspec.json.decode(path.read_bytes(), type=Table)


def write(path: Path, table: Table) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")


# -- what is measured --------------------------------------------------------------------------------


def starts(scratch: Path, turns: int) -> list[Row]:
    goals = {"--version": 1.2, "--help": 1.2, "sync without changes, 1,000 models": 1.8}
    goals |= {f"{name}, {models} models": goal for name in ("plan", "status") for models, goal in (("1,000", 1.5), ("10,000", 3.5))}
    small, large = scratch / "small", scratch / "large"
    stores.full(small, bench_start.SMALL)
    stores.full(large, bench_start.LARGE)
    found = bench_start.measure(bench_start.commands(small, large), turns, scratch / "bytecode")
    bare = found.pop("bare")["seconds"]
    peer = "a bare start"
    return [Row(what=name, peer=peer, seconds=row["ratio"] * bare, peer_seconds=bare, goal=goals[name]) for name, row in found.items()]


def large_files(scratch: Path, rounds: int) -> list[Row]:
    served, rows = scratch / "served", []
    served.mkdir()
    scratch.chmod(0o755)
    with bench_fetch.nginx(served) as base:
        for mib, goal in ((16, 1.05), (256, 1.05), (1024, 1.0)):
            file = bench_fetch.make(served / f"{mib}", mib << 20)
            contenders = bench_fetch.large_contenders(base + file.name, file, bench_fetch.sha256(file))
            peer = "aria2c alone, same options (not verified)"
            chosen = {name: contenders[name] for name in (bench_fetch.OURS, peer)}
            found = bench_fetch.measure(chosen, rounds, scratch / "scratch")
            row = Row(
                what=f"fetch and verify {mib:,} MiB", peer=peer, seconds=found[bench_fetch.OURS][0], peer_seconds=found[peer][0], goal=goal
            )
            rows.append(row)
            file.unlink()
    return rows


def small_files(scratch: Path, rounds: int) -> list[Row]:
    rows = []
    scratch.chmod(0o755)
    for count, size in ((500, 64 << 10), (5000, 16 << 10)):
        served = scratch / f"served-{count}"
        served.mkdir()
        with bench_fetch.nginx(served) as base:
            files = [bench_fetch.make(served / f"{index:04}", size) for index in range(count)]
            contenders = bench_fetch.small_contenders(base, files)
            peers = {"aria2c -j16 -i list (not verified)": 1.0, "curl --parallel 16 (not verified)": 2.0}
            found = bench_fetch.measure({name: contenders[name] for name in (bench_fetch.OURS, *peers)}, rounds, scratch / "scratch")
            what, seconds = f"fetch and verify {count:,} files of {size >> 10} KiB", found[bench_fetch.OURS][0]
            rows += [Row(what=what, peer=peer, seconds=seconds, peer_seconds=found[peer][0], goal=goal) for peer, goal in peers.items()]
    return rows


def limits(scratch: Path) -> dict[str, str]:
    """Return what the machine can do: hashing on one core, writing to the disk, and one copy over loopback."""
    hashing = subprocess.run(
        ["openssl", "speed", "-seconds", "2", "-bytes", "1048576", "-mr", "-evp", "sha256"], capture_output=True, text=True, check=True
    )
    rate = float(re.findall(r"^\+F:.*:([\d.]+)$", hashing.stdout, re.MULTILINE)[-1])
    began = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={scratch / 'zeros'}", "bs=1M", "count=512", "conv=fdatasync"], check=True, capture_output=True
    )
    disk = (512 << 20) / (time.perf_counter() - began)
    with bench_fetch.nginx(scratch) as base:
        began = time.perf_counter()
        subprocess.run(["curl", "-s", "-o", "/dev/null", f"{base}zeros"], check=True)
        loopback = (512 << 20) / (time.perf_counter() - began)
    (scratch / "zeros").unlink()
    return {
        name: f"{value / 1e6:,.0f} MB/s"
        for name, value in (("openssl sha256", rate), ("disk, with fdatasync", disk), ("loopback", loopback))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--keep", action="store_true", help="make it the baseline")
    given = parser.parse_args()
    machine = (
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, medians of {given.rounds}"
    )
    load, rows, measures = os.getloadavg()[0], list[Row](), {"start": starts, "large": large_files, "small": small_files}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        can = limits(Path(folder))
        for part in given.only or PARTS:
            place = Path(folder) / part
            place.mkdir()
            rows += measures[part](place, given.rounds)
    measured = {(row.what, row.peer) for row in rows}
    kept = [row for row in read(RECORDED).rows if (row.what, row.peer) not in measured] if given.only and RECORDED.exists() else []
    table = Table(machine=machine, date=time.strftime("%Y-%m-%d"), load=load, limits=can, rows=(*kept, *rows))
    write(RECORDED, table)
    if given.keep:
        write(BASELINE, table)
    text = RESULTS.read_text()
    before, _, after = text.partition(BEGIN)
    RESULTS.write_text(before + render(table) + after.partition(END)[2])
    print(render(table))
    for wrong in regressions(table, read(BASELINE)):
        print(f"slower: {wrong}")


if __name__ == "__main__":
    main()
