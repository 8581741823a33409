"""What there is to know of a packed file without decoding it, as JSON values and as lines of text."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastsimclr.loaders.beton.reader import BetonSource

_EDGES = (1, 32, 64, 96, 128, 160, 192, 224, 256, 257, 320, 384, 448, 512, 768, 1024, 2048, 4096, 2**16)
_SHOWN = 20  # of a long list, in text
_BAR = 40  # characters


def inspection_report(source: BetonSource) -> dict[str, Any]:
    """Everything that `inspect` prints, in JSON values."""
    card, sides = source.sidecar, source.pixel_sizes.min(axis=1)
    counts, _ = np.histogram(sides, _EDGES)
    highest = [edge - 1 for edge in _EDGES[1:]]
    labelled = source.labels[source.labels >= 0]
    per_class = np.bincount(labelled, minlength=len(source.classes)).tolist()
    height, width = source.pixel_sizes.T
    return {
        "file": str(source.path),
        "bytes": source.path.stat().st_size,
        "images": len(source),
        "jpeg": int((~source.raw).sum()),
        "raw": int(source.raw.sum()),
        "bytes_per_image": {"mean": int(source.lengths.mean()), "largest": int(source.lengths.max())},
        "height": {"least": int(height.min()), "median": int(np.median(height)), "most": int(height.max())},
        "width": {"least": int(width.min()), "median": int(np.median(width)), "most": int(width.max())},
        "shorter_side": [list(row) for row in zip(_EDGES, highest, counts.tolist(), strict=False) if row[2]],
        "unlabelled": len(source) - len(labelled),
        "classes": dict(zip(source.classes, per_class, strict=True)),
        "page_bytes": source.page_bytes,
        "fingerprint": source.fingerprint,
        "sidecar": None if card is None else {"source": card.source, "settings": card.settings, "stored": card.stored},
        "left_out": [] if card is None else [list(pair) for pair in card.left_out],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """`inspection_report`, and what else `inspect` found, to be read by people."""
    card = report["sidecar"]
    text = [
        f"{report['file']}: {report['images']:,} images, {report['bytes']:,} bytes",
        f"stored: {report['jpeg']:,} JPEG, {report['raw']:,} raw; {report['bytes_per_image']['mean']:,} bytes an image,"
        f" at most {report['bytes_per_image']['largest']:,}",
    ]
    for name in ("height", "width"):
        text.append(f"{name}: {report[name]['least']} to {report[name]['most']} px, median {report[name]['median']}")
    most = max(count for _, _, count in report["shorter_side"])
    for low, high, count in report["shorter_side"]:
        text.append(f"  shorter side {low:>5}-{high:<5} {count:>9,} {'#' * -(-_BAR * count // most)}")
    text.append(f"classes: {len(report['classes'])}; {report['unlabelled']:,} images without a label")
    text += [f"  {name}: {count:,}" for name, count in list(report["classes"].items())[:_SHOWN]]
    text += _more(len(report["classes"]))
    if card is None:
        text.append("no sidecar: no names, checksums or settings; written by FFCV, or the .json beside it is missing")
    else:
        text.append(f"packed from: {card['source']['name']}")
        text.append("settings: " + ", ".join(f"{key}={value}" for key, value in card["settings"].items()))
        text.append("images as they were stored: " + ", ".join(f"{k} {v:,}" for k, v in card["stored"].items()))
    for key, title in (("left_out", "left out"), ("damaged", "damaged")):
        if key in report:
            text.append(f"{title}: {len(report[key]):,}")
            text += [f"  {reason}" for _, reason in report[key][:_SHOWN]] + _more(len(report[key]))
    if "sheet" in report:
        text.append(f"contact sheet: {report['sheet']}")
    return text


def _more(count: int) -> list[str]:
    return [f"  and {count - _SHOWN:,} more (--json lists them)"] if count > _SHOWN else []
