"""What the rounds come to: lines of benchmarks/line.py, a table for docs/benchmarks.md, pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.line import line
from benchmarks.peers.charts import Chart, Curve, svg
from benchmarks.peers.peers import OURS, PEERS

AT = 16  # callers, of what is said once of a server
INFER, PATHS = "network", ("small", "noop")
GOALS = {"vs_best": 1.0, "vs_bare": 0.95, "gRPC": 1.5, "HTTP": 1.0}
Result = dict[str, Any]


def report(folder: Path, pictures: Path | None) -> None:
    """folder: where the rounds are. pictures: where to draw, if at all; what was not measured is left out."""
    found = {model: results(folder / model) for model in (INFER, *PATHS)}
    ours_and_peers(found[INFER])
    for model in PATHS:
        path_bound(model, found[model])
    for model, measured in found.items():
        if measured:
            machine(model, [read["bare_rate"] for read in rounds(folder / model)])
    for model, measured in found.items():
        if measured:
            print(f"\n{model}\n\n{table(measured)}")
    if pictures is None:
        return
    for name, charts in drawn(found).items():
        if charts:
            pictures.mkdir(parents=True, exist_ok=True)
            (pictures / f"bench-peers-{name}.svg").write_text(svg(charts))


def results(folder: Path) -> list[Result]:
    """Medians over the rounds, for each server and setting."""
    by_server: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for start in rounds(folder):
        by_server[start["peer"], start["setting"]].append(start)
    return [medians(each) for each in by_server.values()]


def rounds(folder: Path) -> list[Result]:
    """What was found at each start of a server."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("round-*/*-*.json"))]


def medians(rounds: list[Any]) -> Any:
    """Of the numbers, wherever they are; what else there is, of the last round."""
    if all(isinstance(each, dict) for each in rounds):
        return {key: medians([each[key] for each in rounds if key in each]) for key in rounds[-1]}
    return median(rounds) if all(isinstance(each, (int, float)) for each in rounds) else rounds[-1]


def rate(n: int) -> Callable[[Result], float]:
    return lambda result: float(result["closed"].get(str(n), {}).get("rate", 0.0))


def fastest(measured: Iterable[Result], n: int) -> dict[str, Result]:
    """Of each server the setting that is fastest at so many callers."""
    best: dict[str, Result] = {}
    for result in measured:
        if rate(n)(result) and rate(n)(result) > rate(n)(best.get(result["peer"], {"closed": {}})):
            best[result["peer"]] = result
    return best


def machine(model: str, bare: list[float]) -> None:
    """How even the machine was: images/s of the loop without a server, beside each start."""
    print(f"bare loop, {model}: {median(bare):.3g} images/s, {min(bare):.3g} to {max(bare):.3g} at {len(bare)} starts")


def ours_and_peers(measured: list[Result]) -> None:
    for n in callers_of(measured):
        at = fastest(measured, n)
        rates = {name: rate(n)(result) for name, result in at.items() if PEERS[name].checked}
        if OURS.name not in rates:
            continue
        ours = rates.pop(OURS.name)
        for name, its in rates.items():
            line(f"serving.vs_peer.{name}.c{n}", ours, its, unit="images/s")
        if rates:
            line(f"serving.vs_best_peer.c{n}", ours, max(rates.values()), unit="images/s", goal=GOALS["vs_best"])
        loop = at[OURS.name]["bare_rate"]
        line(f"serving.vs_bare.c{n}", ours, loop, unit="images/s", goal=GOALS["vs_bare"] if n == AT else None)
    at = {name: result for name, result in fastest(measured, AT).items() if PEERS[name].checked}
    ours_at = at.pop(OURS.name, None)
    if ours_at is None or not at:
        return
    for name, (unit, cost, read) in ROWS.items():
        theirs = [value for result in at.values() if (value := read(result)) is not None]
        mine = read(ours_at)
        if mine is not None and theirs:
            best = min(theirs) if cost else max(theirs)
            line(f"serving.{name}_vs_best_peer", mine, best, unit=unit, cost=cost, goal=GOALS["vs_best"])


def path_bound(model: str, measured: list[Result]) -> None:
    at = {name: rate(AT)(result) for name, result in fastest(measured, AT).items()}
    for name, its in at.items():
        if not PEERS[name].checked:
            line(f"serving.callers.{model}.{name}", its, unit="calls/s")
    for api in ("gRPC", "HTTP"):
        its = [r for name, r in at.items() if name != OURS.name and PEERS[name].checked and PEERS[name].api == api]
        if OURS.name in at and its:
            name = f"serving.path_vs_best_peer.{model}.{api.lower()}"
            line(name, at[OURS.name], max(its), unit="images/s", goal=GOALS[api])


def _closed(key: str) -> Callable[[Result], float | None]:
    return lambda result: result["closed"].get(str(AT), {}).get(key)


def _goodput(times: int) -> Callable[[Result], float | None]:
    return lambda result: result["open"].get(str(times), {}).get("rate")


# name of a row: unit, whether less is better, where it is in a result
ROWS: Mapping[str, tuple[str, bool, Callable[[Result], float | None]]] = {
    "p99": ("s", True, _closed("p99_s")),
    "goodput_4x": ("images/s", False, _goodput(4)),
    "cpu": ("us", True, _closed("cpu_us")),
    "idle": ("MiB", True, lambda result: result["idle_mib"]),
    "start": ("s", True, lambda result: result["start_to_ready_s"]),
    "install": ("MiB", True, lambda result: result["install_mib"]),
}


def table(measured: list[Result]) -> str:
    """Markdown: rates with the setting that is fastest at that many callers, the rest with that of AT callers."""
    callers = callers_of(measured)
    by_callers = {n: fastest(measured, n) for n in callers}
    said = by_callers.get(AT, {})
    loads = sorted({times for result in measured for times in result["open"]}, key=int)
    head = ["server", "version", "API", "setting", *(f"{n}" for n in callers)]
    head += [f"of bare at {AT}", f"p50 at {AT}, ms", "p99, ms"]
    head += [f"goodput {times}x" for times in loads]
    head += ["failed", "CPU, us", "idle, MiB", "ready, s", "installed, MiB"]
    rows = [head, ["---"] * len(head)]
    for name, result in sorted(said.items(), key=lambda item: -rate(AT)(item[1])):
        at, opened = result["closed"][str(AT)], result["open"]
        version = result["versions"].get(PEERS[name].package, "")
        row = [name, version, result["api"], result["setting"]]
        row += [f"{rate(n)(by_callers[n][name]):.1f}" if name in by_callers[n] else "" for n in callers]
        row += [f"{rate(AT)(result) / result['bare_rate']:.2f}"]
        row += [f"{1000 * at['p50_s']:.0f}", f"{1000 * at['p99_s']:.0f}"]
        row += [f"{opened[times]['rate']:.1f}" if times in opened else "" for times in loads]
        row += [failed(result), f"{at['cpu_us']:.0f}", f"{result['idle_mib']:.0f}", f"{result['start_to_ready_s']:.1f}"]
        rows.append([*row, f"{result['install_mib']:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def failed(result: Result) -> str:
    """The share of calls in closed loops that were not answered, in percent; nothing where all were."""
    codes = [code for at in result["closed"].values() for code in at["codes"].items()]
    share = sum(n for code, n in codes if code != "OK") / max(1, sum(n for _, n in codes))
    return f"{100 * share:.2g} %" if share else ""


def callers_of(measured: Iterable[Result]) -> list[int]:
    return sorted({int(n) for result in measured for n in result["closed"]})


def drawn(found: Mapping[str, list[Result]]) -> dict[str, list[Chart]]:
    """What is drawn, a picture each; a chart for each model."""
    pictures: dict[str, list[Chart]] = {"throughput": [], "p99": [], "goodput": []}
    for model, measured in found.items():
        callers = callers_of(measured)
        by_callers = [fastest(measured, n) for n in callers]
        names = [name for name in PEERS if PEERS[name].checked and any(name in at for at in by_callers)]
        if not names:
            continue
        xs = [str(n) for n in callers]
        for picture, key, unit, log in (("throughput", "rate", "images/s", False), ("p99", "p99_s", "p99, s", True)):
            curves = [
                Curve(
                    name,
                    [
                        at[name]["closed"][x].get(key) if name in at else None
                        for x, at in zip(xs, by_callers, strict=True)
                    ],
                )
                for name in names
            ]
            pictures[picture].append(Chart(model, "callers", unit, xs, curves, log))
        at = fastest(measured, AT)
        loads = sorted({times for result in at.values() for times in result["open"]}, key=int)
        if loads:
            curves = [
                Curve(name, [at[name]["open"].get(times, {}).get("rate") for times in loads])
                for name in names
                if name in at
            ]
            xs = [f"{times}x" for times in loads]
            pictures["goodput"].append(Chart(model, "load, of each server's capacity", "images/s in time", xs, curves))
    return pictures
