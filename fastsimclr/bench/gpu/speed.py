"""Part 2: each kernel against the measured ceilings of the device, then the benches of `fastsimclr bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastsimclr.bench import lars, loss, norm, views
from fastsimclr.bench.calls import Candidate, OpCase, measure_case
from fastsimclr.bench.calls_table import table_of_calls
from fastsimclr.bench.ceilings import Ceilings, measure_ceilings
from fastsimclr.bench.configs import LarsBench, LoaderBench, LossBench, NormBench, ViewsBench
from fastsimclr.bench.e2e import bench_e2e
from fastsimclr.bench.gpu.record import Entry, Job, Size
from fastsimclr.bench.loader import bench_loader
from fastsimclr.bench.record import Report, write
from fastsimclr.bench.step import bench_step
from fastsimclr.bench.table import table
from fastsimclr.bench.training_configs import E2eBench, Mode, StepBench

MAPS = dict((name, tuple(kind)) for name, *kind in norm.MAPS)

LEFT_OUT = (
    "step-r18", "step-r50", "e2e-r18", "views-cifar", "e2e-r50", "step-r18-1024", "step-r50-finetune",
    "step-r50-distill",
)  # fmt: skip
"""Benches that a rehearsal drops: they train whole networks, or others run the same code at the same tiny size."""


@cache
def ceilings(device: torch.device) -> Ceilings:
    """The ceilings of the device, measured once."""
    return measure_ceilings(device)


def roofline(device: torch.device, make: Callable[[], Any], items: int, *, moved: float = 0, m: int = 0) -> Entry:
    """Ours alone: its time, and the time that its bytes, or the loss of `m` rows of 128, take at the ceilings."""
    top = ceilings(device)
    bound_s, bound = top.loss_s(m, 128) if m else (top.bytes_s(moved), "bytes, as a copy")
    ours = Candidate(name="ours", family="ours", make=make, make_small=make, items=items)
    work = OpCase(name="roofline", unit="items", items=items, bound=lambda _: (bound_s, bound), candidates=(ours,))
    (row,) = measure_case(work, 3, 100.0 if device.type == "cuda" else 1.0, device)
    kept = {key: row[key] for key in ("ms", "per_s", "peak_memory_mib", "timed_by")}
    needs = {"flops": 6 * m * m * 128, "exps": 2 * m * m} if m else {"bytes": moved}
    return kept | needs | {"bound_ms": 1e3 * bound_s, "bound": bound, "share_pct": 1e5 * bound_s / row["ms"]["median"]}


def _rooflines(device: torch.device, tiny: bool) -> list[Job]:
    place, roof = str(device), partial(roofline, device)

    def of_loss(m: int) -> Entry:
        made = partial(loss.make, "ours", m, dim=128, temperature=0.1, dtype="fp32", device=place, seed=0)
        return roof(made, m // 2, m=m)

    def of_views(config: ViewsBench, build: Any, n: int) -> Entry:
        config = replace(config, images=n, device=place)
        written = 2 * 3 * config.size**2 * (2 if device.type == "cuda" else 4)
        return roof(partial(build, config, n, place), n, moved=n * (3 * config.side**2 + written))

    def of_lars(arch: str) -> Entry:
        width = 0.125 if tiny else 1.0
        count = sum(p.numel() for p in lars.tensors(arch, width, "cpu", 0).params)
        made = partial(lars.make, "ours", arch, width, variant="google", device=place, seed=0)
        return roof(made, 1, moved=lars.BYTES_A_PARAMETER * count)

    def of_norm(name: str, n: int) -> Entry:
        divisor, channels, residual = MAPS[name]
        side = 2 if tiny else -(-224 // divisor)
        shape = (n, 16 if tiny else channels, side, side)
        made = partial(norm.make, "ours", shape, residual=bool(residual), dtype="bf16", device=place, seed=0)
        return roof(made, n, moved=(10 if residual else 8) * 2 * n * shape[1] * side * side)

    large = ViewsBench(size=24, side=32) if tiny else ViewsBench()
    small = ViewsBench(policy="cifar", size=16 if tiny else 32, side=16 if tiny else 32, dataset=64 if tiny else 50_000)
    found: dict[str, Sequence[tuple[str, Callable[[], Entry]]]] = {
        "ceilings": [("full", lambda: asdict(ceilings(device)) | {"in words": ceilings(device).words()})],
        **{f"nt_xent M {m}": [("full", partial(of_loss, m))] for m in ((64,) if tiny else (8192, 16384, 65536))},
        "views 224": [(f"{n} images", partial(of_views, large, views.ours, n)) for n in ((4,) if tiny else (512, 64))],
        "views 32": [(f"{n} images", partial(of_views, small, views.ours, n)) for n in ((4,) if tiny else (8192, 512))],
        "gather_views": [
            (f"{n} images", partial(of_views, small, views.one_gather, n)) for n in ((4,) if tiny else (8192, 512))
        ],
        "lars": [("full", partial(of_lars, "resnet18" if tiny else "resnet50"))],
        **{f"batch_norm {name}": [(f"{n} views", partial(of_norm, name, n)) for n in ((2,) if tiny else (128, 32))]
           for name in (list(MAPS)[:3:2] if tiny else MAPS)},
    }  # fmt: skip
    return [
        Job(name=f"roofline {name}", sizes=[Size(name=size, expected_s=6.0, run=run) for size, run in sizes])
        for name, sizes in found.items()
    ]


def jobs(device: torch.device, tiny: bool, out: Path, images: str | None) -> list[Job]:
    """The rooflines, then the benches, most important first, each with a report in `out`. tiny: a rehearsal."""
    place = str(device)
    modes: tuple[Mode, ...] = ("eager", "compile", "graph") if device.type == "cuda" else ("eager",)
    loaders = ("resident", "native", *(["dali_gpu"] if find_spec("nvidia") and find_spec("nvidia.dali") else []))
    step = partial(StepBench, device=place, smoke=tiny, modes=modes)
    r50 = partial(step, arch="resnet50", size=224, steps=12)
    e2e: Any = partial(E2eBench, device=place, smoke=tiny)
    root = images if images and Path(images).is_dir() and not list(Path(images).glob("*.beton")) else None
    full = {"root": root, "side": 256, "arch": "resnet50", "size": 224, "workers": (16,), "loaders": loaders}
    cifar: Any = {"policy": "cifar", "size": 32, "side": 32, "images": 8192, "dataset": 50_000}
    calls: Any = {"device": place, "smoke": tiny}
    table_of: list[tuple[str, float, Callable[[Any], Report], Sequence[Any]]] = [
        ("step-r18", 40, bench_step, [step(batch=512, steps=30), step(batch=128, steps=30)]),
        ("step-r50", 75, bench_step, [r50(batch=128), r50(batch=32)]),
        (
            "loss",
            40,
            loss.bench_loss,
            [LossBench(rows=rows, **calls) for rows in ((8192, 16384, 65536), (8192, 16384))],
        ),
        ("e2e-r18", 45, bench_e2e, [e2e(batch=512, steps=20, images=10240, workers=(4, 16))]),
        ("loader", 45, bench_loader, [LoaderBench(root=root, rounds=3, sets=("packed", "raw"), whole=False, **calls)]),
        ("views-224", 30, views.bench_views, [ViewsBench(images=n, **calls) for n in (512, 64)]),
        ("views-cifar", 25, views.bench_views, [ViewsBench(**calls, **cifar)]),
        ("lars", 15, lars.bench_lars, [LarsBench(**calls)]),
        ("norm", 45, norm.bench_norm, [NormBench(batch=n, **calls) for n in (128, 32)]),
        ("e2e-r50", 60, bench_e2e, [e2e(**full, batch=n, images=384, steps=12) for n in (256, 64)]),
        ("step-r18-1024", 40, bench_step, [step(batch=1024, steps=16)]),
        ("step-r50-finetune", 60, bench_step, [r50(batch=n, stage="finetune") for n in (256, 64)]),
        ("step-r50-distill", 70, bench_step, [r50(batch=n, stage="distill", teacher="resnet50") for n in (256, 64)]),
    ]
    found = _rooflines(device, tiny)
    for name, expected_s, bench, configs in table_of:
        if tiny and name in LEFT_OUT:
            found.append(Job(name=name, sizes=[]))
            continue
        sizes = []
        for config in configs:
            what = ", ".join(
                f"{key} {getattr(config, key)}" for key in ("rows", "batch", "images") if hasattr(config, key)
            )
            run = partial(_bench, bench, config, out / f"{'rehearsal-' * tiny}{name}.json")
            sizes.append(Size(name=what, expected_s=expected_s, run=run))
        found.append(Job(name=name, sizes=sizes[:1] if tiny else sizes))
    return found


def _bench(bench: Callable[[Any], Report], config: Any, path: Path) -> Entry:
    """Run a bench, write its report and print its table; the entry has the settings and one line a row."""
    try:
        result = bench(config)
    finally:
        torch.compiler.reset()  # or batches of another size would be compiled for any size
    write(path, result)
    print(f"\n{table_of_calls(result) if 'works' in result else table(result)}\n", flush=True)
    keys = ("group", "name", "ms", "images_per_s", "roofline_pct", "peak_memory_mib", "reason", "fault")
    rows = [{key: row[key] for key in keys if row.get(key) is not None} for row in result["rows"]]
    return {"report": path.name, "config": result["config"], "checks": result["checks"], "rows": rows}
