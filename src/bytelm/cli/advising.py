"""The command that chooses what to train: advise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, paths_of, print_json, print_table
from bytelm.cli.comparing import sources_to_learn
from bytelm.errors import ResourceError
from bytelm.units import show_bytes, show_count, show_seconds

HEAD = ["model", "bits/byte", "95 % interval", "difference", "parameters", "+ tables", "patch", "to train on", "time"]


def advise(
    *paths: str,
    hours: float,
    fit: Annotated[
        Path | None, Parameter(help="Run directory of `bytelm compare --fit`, or its fit.json (default: bytelm's own).")
    ] = None,
    memory: float | None = None,
    write: Annotated[Path | None, Parameter(help="Write the configuration to this TOML file.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Choose what to train on files in so many hours on this machine, from fitted scaling laws and measured speed.

    Reports the model and its size, training bytes, and expected bits per byte with their interval; then all others.

    Example: bytelm advise ~/notes --hours 2 --fit runs/compare-notes

    Parameters
    ----------
    paths
        Folders, files, glob patterns or a packed corpus, as for train.
    hours
        Training time; preparing the data is not counted.
    memory
        Gigabytes that a training step may take (default: what is free).
    """
    from bytelm.compare import advise as engine
    from bytelm.config import dump_toml, to_mapping
    from bytelm.data.files import write_whole

    sources = sources_to_learn(paths, "advise")
    if write is not None and (write.is_dir() or not write.parent.is_dir()):  # not after all the work
        raise ResourceError(
            f"cannot write {write} (a folder, or in none that is there): name another file with --write"
        )
    most = None if memory is None else memory * 1e9
    found = engine.advise(paths_of(sources), hours, engine.fit_of(fit), device, most)
    best = found["choices"][0]
    if write is not None:
        write_whole(write, dump_toml(to_mapping(engine.run_of(best))).encode())
    command = engine.command(sources, best, device, write)
    preset, settings = engine.settings(engine.run_of(best))
    if json:
        print_json({**found, "preset": preset, "settings": settings, "command": command})
        return 0
    show(found, preset, command)
    return 0


def show(found: Mapping[str, Any], preset: str, command: str) -> None:
    """Print the best choice, all of them, and what limits the figures."""
    best = found["choices"][0]
    patch = "" if best["patch_size"] is None else f", {best['patch_size']:.2f} bytes per patch"
    size = f"{show_count(best['parameters'])} parameters + {show_count(best['tables'])} in tables{patch}"
    print(f"train:     {best['model']} (preset {preset}), {size}")
    print(f"data:      {show_bytes(best['bytes'])} processed, {best['epochs']:.2g} epochs, {best['flops']:.2g} FLOPs")
    print(f"expected:  {best['bits']:.3f} bits per byte ({best['low']:.3f} to {best['high']:.3f})")
    print_table(HEAD, rows(found["choices"]))
    for line in remarks(found):
        print(line)
    print(f"next:      {command}")


def rows(choices: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row per model, best first."""
    return [
        [
            one["model"],
            f"{one['bits']:.3f}",
            f"{one['low']:.3f} to {one['high']:.3f}",
            "–" if one is choices[0] else f"{one['bits'] - choices[0]['bits']:+.3f}",
            show_count(one["parameters"]),
            show_count(one["tables"]),
            "–" if one["patch_size"] is None else f"{one['patch_size']:.2f}",
            show_bytes(one["bytes"]),
            show_seconds(3600 * one["hours"]),
        ]
        for one in choices
    ]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the figures."""
    from bytelm.compare.advise import NEAR

    best, data, lines = found["choices"][0], found["data"], list[str]()
    if best["limited"]:
        lines.append(
            f"limit:     the data: {show_bytes(data['train_bytes'])} are processed {best['epochs']:.2g} times in "
            f"{best['hours']:.2g} of {found['hours']:g} hours; more data would help, more hours would not"
        )
    further = [one for one in found["choices"] if one["beyond"] > NEAR]
    if best in further:
        largest = f"{best['flops'] / best['beyond']:.2g} FLOPs"
        lines.append(f"caution:   {best['beyond']:.3g} times the largest budget of the fit ({largest}): extrapolated")
    if best["below"] < 1 / NEAR:
        least = f"{best['flops'] / best['below']:.2g} FLOPs"
        lines.append(f"caution:   {best['below']:.2g} of the smallest budget of the fit ({least}): extrapolated")
    if names := [one["model"] for one in further if one["form"] == "power"]:
        lines.append(
            f"caution:   {', '.join(names)}: of 3 budgets, which show no limit: too optimistic where extrapolated"
        )
    if not data["own"]:
        named = ", ".join(found["fit"]["paths"])
        lines.append(
            f"caution:   bits per byte are a guess by what bzip2 makes of these files and of {named}, of which the fit "
            "is; for better ones give --fit one of these files (`bytelm compare --fit`)"
        )
    lines += [f"left out:  {name}: {why}" for name, why in found["excluded"].items()]
    return lines
