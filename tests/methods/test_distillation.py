"""Distillation: gradients by the formula, ensembles, libraries' teachers, recorded logits, self-distillation."""

# N images, K classes, M teachers

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from fastsimclr.cli.main import main
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.features import extract
from fastsimclr.methods.config import DistillConfig
from fastsimclr.methods.distillation import Distillation, Ensemble, RecordedDistillation
from fastsimclr.models import ModelConfig
from fastsimclr.models.foreign import ForeignNet, load_foreign
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.stages import Setting, protocols
from fastsimclr.stages.distillation import student_of, temperature_of
from fastsimclr.stages.networks import load_classifier
from fastsimclr.stages.published import fitting
from fastsimclr.stages.teachers import RECORD, Teacher, load_teachers, numbered, recorded_logits
from tests.smoke import SMOKE, SmokeRun

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FIVE = ("ant", "bee", "cat", "dog", "emu")
N, K = 6, 5


class Table(nn.Module):
    """Logits that depend on no image, in the place of a network."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.classifier = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def table(seed: int, scale: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return Table(scale * torch.randn(N, K, generator=generator, dtype=torch.float64))


def numbers(module: Any) -> np.ndarray:
    values: np.ndarray = module.logits.detach().numpy()
    return values


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


LABELS = torch.tensor([2, -1, 0, -1, 4, 4])


def wanted(student: np.ndarray, target: np.ndarray, t: float, weight: float) -> np.ndarray:
    """dL/dlogit = (1 - w)·(softmax(s/t) - target)/t/N + w·(softmax(s) - onehot)/labelled, the last where labelled."""
    marked = LABELS.numpy() >= 0
    onehot = np.eye(K)[LABELS.clamp(min=0).numpy()]
    supervised = (softmax(student) - onehot) * marked[:, None] / marked.sum()
    gradient: np.ndarray = (1 - weight) * (softmax(student / t) - target) / t / N + weight * supervised
    return gradient


@pytest.mark.parametrize("t", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["one", "several", "recorded"])
def test_the_gradient_is_the_formula(kind: str, t: float, weight: float) -> None:
    student, teachers = table(0), [table(1), table(2, 8.0), table(3)]
    images = torch.zeros(N, 3, 4, 4, dtype=torch.float64)
    several = kind == "several"
    target = np.mean([softmax(numbers(one) / t) for one in (teachers if several else teachers[:1])], axis=0)
    objective: Distillation
    labels = LABELS
    if kind == "recorded":  # the rows stand elsewhere, among others
        rows = torch.tensor([7, 2, 5, 0, 9, 4])
        logits, truth = torch.full((10, K), torch.nan, dtype=torch.float64), torch.full((10,), 3)
        logits[rows], truth[rows] = teachers[0].logits.detach(), LABELS
        objective = RecordedDistillation(student, logits=logits, labels=truth, temperature=t, label_weight=weight)
        labels = rows
    else:
        teacher = Ensemble(teachers, t) if several else teachers[0]
        objective = Distillation(student, teacher, temperature=t, label_weight=weight)
    objective.train()(images, labels).loss.backward()
    np.testing.assert_allclose(student.logits.grad.numpy(), wanted(numbers(student), target, t, weight), atol=1e-12)
    assert all(one.logits.grad is None for one in teachers)


def test_an_ensemble_is_the_mean_of_probabilities_and_so_of_losses() -> None:
    student, teachers, x = table(0), [table(1), table(2, 8.0)], torch.zeros(N, 3, 4, 4, dtype=torch.float64)
    for t in (0.1, 1.0):
        alone = [Distillation(student, one, temperature=t)(x, LABELS).loss.item() for one in teachers]
        both = Distillation(student, Ensemble(teachers, t), temperature=t)(x, LABELS).loss.item()
        assert both == pytest.approx(sum(alone) / 2, rel=1e-12)
    mean_of_logits = softmax(sum(numbers(one) for one in teachers) / 2)
    assert np.abs(softmax(Ensemble(teachers, 1.0)(x).detach().numpy()) - mean_of_logits).max() > 0.1  # is another rule


def test_parts_of_a_recorded_batch_are_the_batch() -> None:
    student, x = table(0), torch.zeros(N, 3, 4, 4, dtype=torch.float64)
    rows = torch.arange(N)

    def objective(of: Any) -> RecordedDistillation:
        logits = table(1).logits.detach()
        return RecordedDistillation(of, logits=logits, labels=LABELS, temperature=1.0, label_weight=0.4)

    whole = objective(student)(x, rows).loss
    parts = []
    for part in (rows[:3], rows[3:]):
        of = objective(Table(student.logits.detach()[part]))
        of.in_micro_batches(rows, 2)
        parts.append(of(x[:3], part).loss)
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_recorded_logits_are_no_state() -> None:
    objective = RecordedDistillation(
        table(0), logits=torch.zeros(9, K), labels=torch.zeros(9, dtype=torch.int64), temperature=1.0
    )
    assert list(objective.state_dict()) == ["student.logits"]


def test_temperature_and_student_by_the_teachers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastsimclr")
    small, large = ModelConfig(arch="resnet18", head_layers=0), ModelConfig(arch="resnet18", width=2.0)

    def teacher(model: ModelConfig | None) -> Teacher:
        return Teacher(name="timm:x" if model is None else "a", network=nn.Identity(), model=model)

    same, other, foreign = teacher(replace(small, head_layers=3)), teacher(large), teacher(None)
    assert temperature_of(None, small, [same]) == temperature_of(None, small, [same, same]) == 0.1
    assert temperature_of(None, small, [other]) == temperature_of(None, small, [same, other]) == 1.0
    assert temperature_of(None, small, [foreign]) == 1.0
    assert temperature_of(None, replace(small, selective_kernels=True), [same]) == 1.0
    assert temperature_of(0.1, small, [same]) == 0.1 and not caplog.text
    assert temperature_of(2.5, small, [same]) == 2.5 and "--distill.temperature null) 0.1" in caplog.text
    assert student_of(small, [other, same], into_itself=True) == replace(large, head_layers=0)
    assert student_of(small, [other], into_itself=False) == small
    with pytest.raises(ValueError, match=r"into_itself=true .* timm:x"):
        student_of(small, [foreign], into_itself=True)
    with pytest.raises(ValueError, match=r"distill\.temperature=0"):
        DistillConfig(temperature=0.0)


def views(seen: Any, size: int) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], and the same as the student sees them."""
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if seen is None:
        return pixels, pixels
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in seen)
    return pixels, (pixels - mean) / std


def saved(network: nn.Module, file: Path) -> Path:
    """Weights in a file, the classifier's large enough that logits differ from class to class."""
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(classifier.weight, std=0.5)
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(network.state_dict(), str(file))
    else:
        torch.save(network.state_dict(), file)
    return file


def own_input(pixels: Tensor, mean: Any, std: Any, size: int | None) -> Tensor:
    """As the library's own transforms make it of the pixels."""
    if size is not None:
        resize = torchvision.transforms.Resize((size, size), antialias=True)
        pixels = resize(pixels)
    normalised: Tensor = torchvision.transforms.Normalize(mean, std)(pixels)
    return normalised


@pytest.mark.parametrize("seen", [None, IMAGENET])
@pytest.mark.parametrize(
    ("teacher", "suffix", "size"),
    [
        ("timm:test_vit", ".safetensors", 160),  # of one size only; mean and std .5
        ("timm:test_resnet", ".pt", None),
        ("torchvision:shufflenet_v2_x0_5", ".pt", None),
    ],
)
def test_a_librarys_teacher_gives_its_own_logits(
    tmp_path: Path, teacher: str, suffix: str, size: int | None, seen: Any
) -> None:
    torch.manual_seed(1)
    library, name = teacher.split(":")
    if library == "timm":
        network = timm.create_model(name, num_classes=K)
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    else:
        network = torchvision.models.get_model(name, num_classes=K)
        mean, std = IMAGENET
    file = saved(network, tmp_path / f"w{suffix}")
    found = load_foreign(f"{teacher}@{file}", FIVE, "here", seen=seen, size=48).double()
    pixels, shown = views(seen, 48)
    with torch.no_grad():
        expected = network.eval().double()(own_input(pixels, mean, std, size))
        # The wrapper's constants are float32.
        torch.testing.assert_close(found(shown), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_classes_beside_the_weights_order_the_outputs(tmp_path: Path) -> None:
    file = saved(timm.create_model("test_resnet", num_classes=K), tmp_path / "w.pt")
    plain = load_foreign(f"timm:test_resnet@{file}", FIVE, "here", seen=None, size=32)
    listed = ("emu", "bee", "ant", "dog", "cat")
    beside = tmp_path / "w.pt.classes.txt"
    beside.write_text("\n".join(listed) + "\n")
    ordered = load_foreign(f"timm:test_resnet@{file}", FIVE, "here", seen=None, size=32)
    pixels = views(None, 32)[0].float()
    with torch.no_grad():
        torch.testing.assert_close(ordered(pixels), plain(pixels)[:, [listed.index(name) for name in FIVE]])
    beside.write_text("emu\nbee\nant\ndog\nfox\n")
    with pytest.raises(ValueError, match=r"classes\.txt names 5 classes, here has 5; they differ in cat, fox"):
        load_foreign(f"timm:test_resnet@{file}", FIVE, "here", seen=None, size=32)


def test_without_a_list_the_outputs_are_the_sorted_names(tmp_path: Path) -> None:
    file = saved(timm.create_model("test_resnet", num_classes=K), tmp_path / "w.pt")
    ordered = load_foreign(f"timm:test_resnet@{file}", FIVE, "here", seen=None, size=32)
    backwards = load_foreign(f"timm:test_resnet@{file}", FIVE[::-1], "here", seen=None, size=32)
    pixels = views(None, 32)[0].float()
    with torch.no_grad():
        torch.testing.assert_close(backwards(pixels), ordered(pixels).flip(1))


def test_a_transformer_of_a_file_takes_views_of_the_size_it_was_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(name: str, *, weights: None, num_classes: int) -> nn.Module:
        return torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=num_classes)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    file = saved(small("", weights=None, num_classes=K), tmp_path / "w.pt")
    found = load_foreign(f"torchvision:vit_h_14@{file}", FIVE, "here", seen=None, size=48)
    assert found.size == 32  # the library's own weights are for 518


def test_the_librarys_own_weights_are_for_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torchvision.models.shufflenet_v2_x0_5()
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    saved(network, tmp_path / "checkpoints" / url.rsplit("/", 1)[1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    ids = ["n01440764", *(f"n{number:08}" for number in range(2_000_000, 2_000_998)), "n15075141"]
    found = load_foreign("torchvision:shufflenet_v2_x0_5", ids, "here", seen=IMAGENET, size=32).double()
    pixels, shown = views(IMAGENET, 32)
    with torch.no_grad():
        expected = network.eval().double()(own_input(pixels, *IMAGENET, None))
        torch.testing.assert_close(found(shown), expected, rtol=1e-5, atol=1e-5)
        found = load_foreign("torchvision:shufflenet_v2_x0_5", ids[::-1], "here", seen=IMAGENET, size=32).double()
        torch.testing.assert_close(found(shown), expected.flip(1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has 1000 outputs, here has 5 classes"):
        load_foreign("torchvision:shufflenet_v2_x0_5", FIVE, "here", seen=None, size=32)
    with pytest.raises(ValueError, match="in the order of their WordNet ids, here has a0000"):
        names = [f"a{number:04}" for number in range(1000)]
        load_foreign("torchvision:shufflenet_v2_x0_5", names, "here", seen=None, size=32)
    with pytest.raises(ValueError, match="in the order of their WordNet ids, here has n00000001"):
        load_foreign("torchvision:shufflenet_v2_x0_5", ["n00000001", *ids[1:]], "here", seen=None, size=32)


def test_teachers_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(timm.create_model("test_resnet", num_classes=3), tmp_path / "w.pt")

    def refusal(teacher: str, size: int = 32) -> str:
        with pytest.raises(ValueError) as caught:
            load_foreign(teacher, FIVE, "here", seen=None, size=size)
        return str(caught.value)

    assert "has 3 outputs, here has 5 classes (ant, bee, cat, …)" in refusal(f"timm:test_resnet@{file}")
    assert f"{file} does not fit" in refusal(f"timm:test_vit@{file}")
    assert "torchvision has no classifier 'resnet19'" in refusal("torchvision:resnet19")
    assert "timm has no 'resnet19'" in refusal("timm:resnet19")
    assert "gone.safetensors is not a file" in refusal(f"timm:test_resnet@{tmp_path}/gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    assert "cannot be read as safetensors" in refusal(f"timm:test_resnet@{tmp_path}/bad.safetensors")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    assert "cannot be read as weights" in refusal(f"timm:test_resnet@{tmp_path}/bad.pt")
    alex = saved(torchvision.models.get_model("alexnet", num_classes=K), tmp_path / "alex.pt")
    assert "cannot take views of 32 px" in refusal(f"torchvision:alexnet@{alex}")

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    line = refusal("torchvision:resnet18")
    assert "cannot be had (no route to host)" in line and "torchvision:resnet18@FILE" in line
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs timm" in refusal("timm:test_resnet") and "pip install fastsimclr[timm]" in refusal("timm:test_resnet")


def done(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    assert main([str(word) for word in words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def result(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "result.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def chain(smoke_run: SmokeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain with self-distillation, its student of another depth; the stages before were done before."""
    out = tmp_path_factory.mktemp("chain") / "out"
    for stage in ("pretrain", "knn", "linear", "supervised", "finetune"):
        shutil.copytree(smoke_run(stage), out / stage)
    done("run", *SMOKE, "--distill.self_first", "true", "--distill.student.arch", "resnet34", "--out", out)
    return out


def test_the_chain_distills_into_itself_first(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = result(chain)
    assert list(whole)[-3:] == ["finetune", "self-distill", "distill"]
    own, student, tuned = (whole[stage] for stage in ("self-distill", "distill", "finetune"))
    assert own["metrics"]["teacher_top1"] == tuned["metrics"]["top1"]
    assert student["metrics"]["teacher_top1"] == own["metrics"]["top1"]
    assert (own["temperature"], student["temperature"]) == (0.1, 1.0)
    assert own["parameters"] < tuned["parameters"] < student["parameters"]  # tuned has a head layer
    assert parse_recipe((chain / "self-distill" / "recipe.yaml").read_text()).distill.into_itself
    text = (chain / "summary.txt").read_text()
    for row in ("self-distilled ", "self-distilled - fine-tuned: ", "student - teacher: ", "student - fine-tuned: "):
        assert row in text
    # What an earlier version wrote has none of the keys that came later.
    path = chain / "recipe.yaml"
    lines = [line for line in path.read_text().splitlines() if "into_itself" not in line and "teacher_view" not in line]
    path.write_text("\n".join(lines) + "\n")
    done("run", *SMOKE, "--distill.self_first", "true", "--distill.student.arch", "resnet34", "--out", chain)
    assert result(chain) == whole
    assert "distill.self_first: True -> False" in refused(
        capsys, "run", *SMOKE, "--distill.student.arch", "resnet34", "--out", chain
    )


def test_published_self_distillation_is_found() -> None:
    big = ModelConfig(arch="resnet152", width=3.0, selective_kernels=True)
    of_itself = student_of(ModelConfig(), [Teacher(name="a", network=nn.Identity(), model=big)], into_itself=True)
    found = fitting("ImageNet", "distill", of_itself, labels=0.1, epochs=800)
    assert [(entry.top1, entry.what.endswith("from itself")) for entry in found] == [(0.809, True)]


def test_the_report_on_a_network_distilled_into_itself_is_beside_its_own_numbers(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelConfig] = []

    def published_entry(setting: Setting, stage: str, model: ModelConfig, labels: str) -> dict[str, Any]:
        asked.append(model)
        return {"published": [{"top1": 0.5}]}

    monkeypatch.setattr(protocols, "published_entry", published_entry)
    own = Path(shutil.copytree(chain / "self-distill", tmp_path / "own"))
    recipe = parse_recipe((own / "recipe.yaml").read_text())
    found = protocols.evaluate(recipe, own, tmp_path / "a", False)
    assert asked == [] and "published" not in found["report"]  # as the run itself has none
    (own / "result.json").write_text(json.dumps(result(own) | {"published": [{"top1": 0.5}]}))
    found = protocols.evaluate(recipe, own, tmp_path / "b", False)
    assert asked == [replace(recipe.model, head_layers=0)] and asked[0].arch != recipe.distill.student.arch
    assert found["protocols"][0]["published"] == {"top1": 0.5}


def test_into_itself_is_not_taken_from_a_teachers_recipe(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("distill: {into_itself: true}\n")

    def into_itself(*words: object) -> bool:
        with pytest.raises(SystemExit):
            main(["distill", "--teacher", str(chain / "self-distill"), *map(str, words), "--print_config"])
        return parse_recipe(capsys.readouterr().out).distill.into_itself

    assert not into_itself("--distill.student.arch", "resnet18")
    assert into_itself("--distill.into_itself", "true")
    assert into_itself("--config", tmp_path / "own.yaml")


@pytest.mark.parametrize("change", [{"normalise": "imagenet"}, {"size": 16}, {"size": 16, "normalise": "imagenet"}])
def test_a_runs_teacher_sees_views_as_it_learned_from(
    chain: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    recipe = parse_recipe((chain / "finetune" / "recipe.yaml").read_text())
    other = replace(recipe, views=replace(recipe.views, **change))
    caplog.set_level("WARNING", "fastsimclr")
    (plain,) = load_teachers(Setting(recipe), [str(chain / "finetune")])
    assert not caplog.text and not isinstance(plain.network, ForeignNet)
    (shown,) = load_teachers(Setting(other), [str(chain / "finetune")])
    assert "learned from views of 8 px, torchvision, (mean, std) None" in caplog.text
    pixels, views_here = views(IMAGENET if "normalise" in change else None, other.views.size)
    pixels, views_here = pixels.float(), views_here.float()
    with torch.no_grad():
        expected = plain.network.eval()(torchvision.transforms.Resize((8, 8), antialias=True)(pixels))
        scale = expected.std()  # small: the classifier has hardly been trained
        torch.testing.assert_close(shown.network(views_here) / scale, expected / scale, rtol=1e-3, atol=1e-3)
        assert ((plain.network(views_here) - expected) / scale).abs().max() > 0.1


def test_student_same_by_command(chain: Path, tmp_path: Path) -> None:
    done("distill", "--teacher", chain / "finetune", "--student", "same", "--out", tmp_path / "a")
    state = checkpoint.load(checkpoint.newest(tmp_path / "a"))
    assert state["facts"]["model"]["width"] == 0.125 and result(tmp_path / "a")["temperature"] == 0.1


@pytest.mark.slow
def test_several_teachers_by_command(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(timm.create_model("test_resnet", num_classes=10), tmp_path / "w.pt")
    names = [str(chain / "finetune"), str(chain / "self-distill"), f"timm:test_resnet@{file}"]
    done("distill", "--teacher", *names, "--out", tmp_path / "run")
    found = result(tmp_path / "run")
    assert [one["name"] for one in found["teachers"]] == names and found["temperature"] == 1.0
    assert found["teacher_parameters"] == sum(one["parameters"] for one in found["teachers"])
    assert parse_recipe((tmp_path / "run" / "recipe.yaml").read_text()).smoke  # of the first run
    done("distill", *SMOKE, "--teacher", names[2], "--out", tmp_path / "alone")
    assert result(tmp_path / "alone")["metrics"]["teacher_top1"] == found["teachers"][2]["top1"]
    line = refused(capsys, "distill", *SMOKE, "--teacher", names[2], "--student", "same", "--out", tmp_path / "x")
    assert "into_itself=true" in line and names[2] in line
    other = shutil.copytree(chain / "finetune", tmp_path / "other")
    path = checkpoint.newest(other)
    state = torch.load(path, weights_only=True)
    state["facts"]["classes"] = state["facts"]["classes"][::-1]
    torch.save(state, path)
    line = refused(capsys, "distill", "--teacher", names[0], other, "--out", tmp_path / "x")
    assert names[0] in line and str(other) in line and "(0, 1, 2, …) and 10 classes (9, 8, 7, …)" in line


@pytest.fixture(scope="module")
def fixed(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation by recorded logits, with the few labels."""
    run = tmp_path_factory.mktemp("fixed") / "run"
    done("distill", *fixed_words(chain), "--out", run)
    return run


def fixed_words(chain: Path, *more: object) -> list[object]:
    mixed = ("--distill.teacher_view", "fixed", "--distill.label_weight", "0.3")
    return ["--teacher", chain / "finetune", *mixed, *more]


def test_recorded_logits_are_those_of_the_evaluation_views(chain: Path, fixed: Path) -> None:
    held = torch.load(fixed / RECORD, weights_only=True)["logits"]
    setting = Setting(parse_recipe((fixed / "recipe.yaml").read_text()))
    network = load_classifier(chain / "finetune")[0].eval()
    every = setting.splits.unlabelled
    expected = extract(network, setting.passes(every), setting.evaluation_policy, setting.runtime).values
    assert held.shape == (64, 10) and held.dtype == torch.float32
    torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)
    state = checkpoint.load(checkpoint.newest(fixed))["objective"]
    assert all(key.startswith("student.") for key in state)
    found = result(fixed)
    assert found["labels"] == 20 and found["recording_seconds"] > 0
    assert found["metrics"]["teacher_top1"] == result(chain / "finetune")["metrics"]["top1"]


def test_a_resume_takes_the_recorded_logits(chain: Path, fixed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(fixed, tmp_path / "run"))
    stamp = (run / RECORD).stat().st_mtime_ns
    (run / "result.json").unlink()
    done("distill", *fixed_words(chain), "--out", run, "--resume", "auto")
    assert (run / RECORD).stat().st_mtime_ns == stamp and result(run)["recording_seconds"] == 0
    assert result(run)["metrics"] == result(fixed)["metrics"]
    # What is looked up is what is learned from: with other logits of the same teacher the student becomes another.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    held = torch.load(run / RECORD, weights_only=True)
    torch.save({**held, "logits": held["logits"].flip(1)}, fresh / RECORD)
    done("distill", *fixed_words(chain), "--out", fresh)
    assert result(fresh)["training"]["loss"] != result(fixed)["training"]["loss"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda chain: ["--teacher", chain / "self-distill"], "teacher="),
        (lambda chain: ["--views.size", "16"], "size="),
    ],
)
def test_other_recorded_logits_are_refused(
    chain: Path,
    fixed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], list[Any]],
    key: str,
) -> None:
    shutil.copy(fixed / RECORD, tmp_path / RECORD)
    line = refused(capsys, "distill", *fixed_words(chain), *change(chain), "--out", tmp_path)
    assert f"{tmp_path / RECORD} was made with {key}" in line and "another --out" in line


@pytest.mark.slow
def test_damaged_recorded_logits_are_refused(
    chain: Path, fixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / RECORD).write_bytes((fixed / RECORD).read_bytes()[:200])
    line = refused(capsys, "distill", *fixed_words(chain), "--out", tmp_path)
    assert f"{tmp_path / RECORD} cannot be read" in line and "delete it" in line
    held = torch.load(fixed / RECORD, weights_only=True)
    torch.save({**held, "facts": {**held["facts"], "fingerprint": "of other data"}}, tmp_path / RECORD)
    line = refused(capsys, "distill", *fixed_words(chain), "--out", tmp_path)
    assert "was made with fingerprint='of other data', this run has" in line
    line = refused(capsys, "distill", *fixed_words(chain), "--out", fixed)
    assert "already holds step-" in line


def record(ranks: Ranks, run: Path, folder: Path) -> Tensor:
    """Recorded by these ranks, a second time from the file."""
    setting = Setting(parse_recipe((run / "recipe.yaml").read_text()))
    setting.ranks, setting.runtime = ranks, replace(setting.runtime, ranks=ranks)
    network, rows = load_classifier(run)[0], numbered(setting.splits.unlabelled)
    facts = {"classes": list(setting.splits.val.classes)}
    first, seconds = recorded_logits(setting, network, rows, folder, facts)
    again, none = recorded_logits(setting, network, rows, folder, facts)
    assert seconds > 0 == none and torch.equal(first, again)
    return first


@pytest.mark.slow
def test_ranks_record_together(chain: Path, fixed: Path, tmp_path: Path, ranks_pool: Any) -> None:
    found = ranks_pool(2, record, chain / "finetune", tmp_path)
    assert (tmp_path / RECORD).is_file()
    held = torch.load(fixed / RECORD, weights_only=True)["logits"]
    for one in found:
        torch.testing.assert_close(one, held, rtol=1e-5, atol=1e-5)
