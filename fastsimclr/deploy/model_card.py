"""The README.md of an exported model: what it is, what it learnt from, how to use it, what it measured. Facts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.origin import result_of
from fastsimclr.stages import recipe_path

_TRAINING = {
    "pretrain": "pretrained without labels by SimCLR's contrastive loss",
    "linear": "pretrained without labels by SimCLR's contrastive loss; the classifier trained on the frozen encoder",
    "finetune": "pretrained without labels by SimCLR's contrastive loss, then fine-tuned with labels",
    "supervised": "trained with labels from scratch",
    "distill": "trained to give the class probabilities of a larger or equal teacher (distillation)",
}
_PAPERS = (
    "SimCLR: Chen et al., [arXiv 2002.05709](https://arxiv.org/abs/2002.05709) and"
    " [arXiv 2006.10029](https://arxiv.org/abs/2006.10029)."
)


def model_card(card: Card, parameters: int, run: Path, weights: str, reasons: Sequence[str]) -> str:
    """Markdown with Hugging Face's front matter. reasons: why `transformers` cannot load it; empty where it can.

    Facts come from the card and from the recipe, result.json and evaluation.json of the run; of files that are not
    there, or of other weights than those exported, nothing is said. Folders of the recipe are cut to their last part.
    weights: the digest of the run's network.
    """
    recipe = _without_folders(yaml.safe_load(recipe_path(run).read_text()))
    result = result_of(run)
    classifier = card.part == "classifier"
    what = f"A classifier of {len(card.classes)} classes" if classifier else "An encoder of images, without classifier"
    lines = [
        "---",
        "# license: choose one; fastsimclr does not know under which licence the data and these weights may be used",
        f"library_name: {'fastsimclr' if reasons else 'transformers'}",
        f"pipeline_tag: image-{'classification' if classifier else 'feature-extraction'}",
        "tags: [simclr, fastsimclr, resnet]",
        "---",
        f"# {card.config.arch}, {'classifier' if classifier else 'encoder'}",
        "",
        f"{what}: {card.config.arch}, width {card.config.width:g}, {parameters:,} parameters,"
        f" {_TRAINING[card.stage]}. Written by fastsimclr {card.version}, stage `{card.stage}`. {_PAPERS}",
        "",
        "## Use",
        "",
        *_use(card, reasons),
        "",
        f"Input: {card.input(normalised=False)}.",
        *([] if reasons or not card.preprocessing["centre_fraction"] else [_RESIZED_FIRST]),
        "",
        *_data(result),
        *_metrics(result),
        *_evaluation(run, weights),
        "## Limits",
        "",
        "- The metrics are those of this run on its own validation images; on other images they may be lower.",
        "- Nothing is known of how it treats groups of people or subjects differently, unless a table above says so.",
        *(
            [f"- The classes are those of its labels: {_shown(card.classes)}; it has no answer for others."]
            * classifier
        ),
        f"- The views were {card.size} px; other sizes were not tried in this run.",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


_RESIZED_FIRST = (
    "`preprocessor_config.json` resizes first and cuts the centre then, as transformers does it; training cut first."
)


def _use(card: Card, reasons: Sequence[str]) -> list[str]:
    if reasons:
        names = "logits" if card.part == "classifier" else "features"
        return [
            f"transformers' ResNet cannot hold this network: {'; '.join(reasons)}. So config and weights have"
            " fastsimclr's own form:",
            "",
            "```python",
            "from fastsimclr.deploy import load_pretrained",
            "",
            'network, card = load_pretrained("FOLDER")  # card.classes, card.preprocessing, ...',
            f"{names} = network(images)  # images: [N, 3, {card.size}, {card.size}], prepared as below",
            "```",
        ]
    kind, outputs = "AutoModel", "pooler_output[:, :, 0, 0]  # features"
    if card.part == "classifier":
        kind, outputs = "AutoModelForImageClassification", "logits"
    return [
        "```python",
        f"from transformers import AutoImageProcessor, {kind}",
        "",
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        f'model = {kind}.from_pretrained("FOLDER")',
        f'outputs = model(**processor(images, return_tensors="pt")).{outputs}',
        "```",
        "",
        'Or without transformers: `fastsimclr.deploy.load_pretrained("FOLDER")`.',
    ]


def _data(result: Mapping[str, Any]) -> list[str]:
    data = result.get("data")
    if not data:
        return []
    known = [
        f"{data[key]:,} {text}"
        for key, text in (
            ("images", "images for training"),
            ("labelled", "of them with a label that was available"),
            ("val", "for validation"),
        )
        if key in data
    ]
    labels = f" Labels used: {result['labels']:,}." if "labels" in result else ""
    where = result.get("environment", {})
    took = f" Trained in {result['seconds']:,.0f} s on {where['device']}." if {"device"} <= where.keys() else ""
    return ["## Data", "", f"`{Path(str(data.get('source', '?'))).name}`: {', '.join(known)}.{labels}{took}", ""]


def _metrics(result: Mapping[str, Any]) -> list[str]:
    if not (metrics := result.get("metrics")):
        return []
    lines = ["## Metrics", "", "| metric | on the run's validation images |", "|---|---|"]
    return lines + [f"| {name} | {value:.4f} |" for name, value in metrics.items()] + [""]


def _evaluation(run: Path, weights: str) -> list[str]:
    """The rows of `fastsimclr evaluate`, from the run folder or where that writes by default; none of other weights."""
    folder = run.resolve().parent.parent if run.is_file() else run.resolve()
    for place in (folder, folder.with_name(f"{folder.name}-evaluate")):
        path = place / "evaluation.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if found.get("protocols") and found["network"]["weights"] == weights:
            head = ["| protocol | labels | top1 | top5 | ece | published top1 |", "|---|---|---|---|---|---|"]
            return ["## Evaluation", "", *head, *map(_row, found["protocols"]), ""]
    return []


def _row(row: Mapping[str, Any]) -> str:
    known = row["published"]
    labels = "-" if row["labels"] is None else f"{row['labels']:,}"
    shares = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("top1", "top5", "ece")]
    published = f"{known['top1']:.4f} ({known['what']}, {known['source']})" if known else "-"
    return f"| {' | '.join([row['protocol'], labels, *shares, published])} |"


def _shown(classes: Sequence[str], most: int = 20) -> str:
    text = ", ".join(json.dumps(name, ensure_ascii=False) for name in classes[:most])
    return text if len(classes) <= most else f"{text} and {len(classes) - most} more in config.json"


def _without_folders(recipe: Any) -> Any:
    """The recipe with each path or address cut to its last part: a card is made to be published."""
    if isinstance(recipe, dict):
        return {key: _without_folders(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [_without_folders(value) for value in recipe]
    return recipe.rstrip("/").rpartition("/")[2] if isinstance(recipe, str) else recipe
