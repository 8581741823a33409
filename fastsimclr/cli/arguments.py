"""The words of a command line before they are parsed: commands, recipes by name, and the recipe to start from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fastsimclr import stages
from fastsimclr.models.foreign import is_foreign
from fastsimclr.recipe import check_sections

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

COMMANDS: dict[str, str] = {
    **{name: stage.summary for name, stage in stages.STAGES.items()},
    "study": "Many trainings that differ in one thing: labels, augment, batch, head, size or transfer.",
    "evaluate": "Every published protocol on a pretrained network, or the whole report on a classifier; one table.",
    "run": "All of them in a row; the same command again goes on where it stopped.",
    "demo": "The whole chain on embedded images, in a few minutes on a CPU.",
    "import-tf": "Google's TensorFlow checkpoint as a run folder.",
    "export": "The weights of a run for torchvision, timm or Hugging Face, as safetensors or as ONNX.",
    "embed": "Features of a folder of images, to .npy or Parquet.",
    "predict": "Classes of a folder of images, to CSV.",
    "detect": "Fine-tune a pretrained encoder to find objects: Faster R-CNN, COCO's format.",
    "segment": "Fine-tune a pretrained encoder to segment images: FCN, masks as PNG.",
    "pack": "Any data set as one .beton file, which is read fastest.",
    "inspect": "What a .beton file holds; a contact sheet; a check of every image.",
    "index": "The index.json of WebDataset shards, by which a run starts without reading them all.",
    "bench": "Measure loader, step or training beside a baseline; compare two reports.",
    "plan": "Predicted speed, hours and memory of a recipe on GPUs that are not here.",
}
"""Every command and its line of help."""
FROM_NOTHING = tuple(name for name, stage in stages.STAGES.items() if stage.start == "nothing")
TOOLS = ("import-tf", "export", "embed", "predict", "detect", "segment", "pack", "inspect", "index", "bench", "plan")
"""Commands without a recipe, which run in one process."""

_SPLIT = ("--config", "--from", "--teacher", "--smoke", "--resume")


def normalise_argv(words: Sequence[str]) -> list[str]:
    """--config=NAME and its like as two words, --loader in full, and a bare --smoke with its value."""
    found: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "--loader" and words[0] not in TOOLS:
            key, word = "--data.loader", f"--data.loader{equals}{value}"
        found += [key, value] if equals and key in _SPLIT else [word]
    for i in reversed([i for i, word in enumerate(found) if word == "--smoke"]):
        if found[i + 1 : i + 2] not in (["true"], ["false"]):
            found.insert(i + 1, "true")
    return found


def prepend_recipes(words: list[str]) -> list[str]:
    """Recipes by name looked up in configs/; the recipe of the run to start from, or the default one, put first.

    That of a teacher without its into_itself, which words of this command line alone can ask for.
    """
    words = [_known(word) if i and words[i - 1] == "--config" else word for i, word in enumerate(words)]
    if not words or words[0] not in COMMANDS or words[0] in TOOLS or "--help" in words or "-h" in words:
        return words
    if words == ["study"]:  # without the name of one
        return words
    first: list[str] = []
    run = _start(words)
    fresh = words[0] in (*FROM_NOTHING, "run", "study") or (words[0] == "distill" and run is None)
    if words[0] == "demo" or (fresh and "--config" not in words):
        own = words[0] != "demo" and any(word.startswith("--data.root") for word in words)
        first = ["--config", str(CONFIGS / ("folder.yaml" if own else "digits.yaml"))]
    if run is not None:
        first = ["--config", str(stages.recipe_path(Path(run)))]
        if words[0] == "distill":  # how the teacher itself was made, no wish for its student
            first += ["--distill.into_itself", "false"]
    for word, path in pairwise(first + words):
        if word == "--config" and Path(path).is_file():
            check_sections(Path(path).read_text(), f"recipe {path}")
    begin = 2 if words[0] == "study" else 1
    return [*words[:begin], *first, *words[begin:]]


def _start(words: Sequence[str]) -> str | None:
    """The first run that --from or --teacher names; a library's network has no recipe."""
    found, option = None, ""
    for word in words:
        if word.startswith("--"):
            option, found = word, None if word in ("--from", "--teacher") else found
        elif option in ("--from", "--teacher") and found is None and not is_foreign(word):
            found = word
    return found


def _known(name: str) -> str:
    path = Path(name)
    if path.is_file():
        return name
    packaged = CONFIGS / f"{path.stem}.yaml"
    if packaged.is_file() and path.suffix in ("", ".yaml") and path.parent in (Path(), Path("configs")):
        return str(packaged)
    known = ", ".join(path.name for path in sorted(CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"--config {name} is not a file; give a file, or one of {known}")
