"""Distillation: -sum_y P_teacher(y|x; t) log P_student(y|x; t). Chen et al. 2020b (SimCLRv2), Eq. 2 and 3."""

# N images of a batch, A all images, K classes, M teachers

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.methods.base import Objective, Outcome
from fastsimclr.models import ClassifierNet


class Distillation(Objective):
    """The student learns the teacher's class probabilities; the teacher is frozen and in evaluation mode.

    teacher: images [N, 3, S, S] -> logits [N, K], of the same classes in the same order as the student's.
    temperature > 0 divides both logits. label_weight w in [0, 1]: (1 - w)·distillation + w·CE(labels), where images
    without a label (-1) take no part in the second term, which is the mean over the labelled images of all ranks. The
    paper's alpha (Eq. 3) is 1 - w. ValueError where the teacher is an Ensemble of another temperature.
    """

    views = 1
    loss_implementation = "distillation.torch"

    def __init__(
        self, student: ClassifierNet, teacher: nn.Module, *, temperature: float, label_weight: float = 0.0
    ) -> None:
        super().__init__()
        if isinstance(teacher, Ensemble) and teacher.temperature != temperature:
            raise ValueError(
                f"temperature={temperature} is not the ensemble's {teacher.temperature}, at which alone its softmax is"
                " the mean of its teachers'; give both the same"
            )
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.temperature = temperature
        self.label_weight = label_weight
        self._divisor: Tensor | None = None

    def frozen_modules(self) -> Sequence[nn.Module]:
        return (self.teacher,)

    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        with torch.no_grad():
            teacher_NK = _at_least_float32(self.teacher(images))
        return self._compared(images, teacher_NK, labels)

    def _compared(self, images: Tensor, teacher_NK: Tensor, labels: Tensor) -> Outcome:
        student_NK = _at_least_float32(self.student(images))
        target_NK = (teacher_NK / self.temperature).softmax(dim=1)
        loss = F.cross_entropy(student_NK / self.temperature, target_NK.to(student_NK.dtype))
        if self.label_weight > 0:
            labelled = (labels >= 0).to(student_NK.dtype)
            per_image = F.cross_entropy(student_NK, labels.clamp(min=0), reduction="none")
            supervised = (per_image * labelled).sum() / (
                self._labelled_per_rank(labelled) if self._divisor is None else self._divisor
            )
            loss = (1 - self.label_weight) * loss + self.label_weight * supervised
        agree = (student_NK.detach().argmax(dim=1) == teacher_NK.argmax(dim=1)).float().mean()
        return Outcome(loss=loss, metrics={"teacher_agreement": agree})

    def in_micro_batches(self, labels: Tensor | None, micro_batches: int) -> None:
        """A micro-batch's sum over its labelled images is divided by those of the whole batch, over `micro_batches`."""
        self._divisor = None
        if labels is not None and self.label_weight > 0:
            self._divisor = self._labelled_per_rank((labels >= 0).float()) / micro_batches

    def _labelled_per_rank(self, labelled: Tensor) -> Tensor:
        """How many labelled images a rank has on average: each counts the same, whichever rank it is on."""
        count = labelled.sum()
        if self.group is None:
            return count.clamp(min=1)
        dist.all_reduce(count, group=self.group)
        return count.clamp(min=1) / dist.get_world_size(self.group)

    def supervised_heads(self) -> Sequence[nn.Module]:
        return (self.student.classifier,)


class RecordedDistillation(Distillation):
    """Distillation by logits that the teacher gave once for each image, whatever crop the student sees.

    logits: float [A, K]. labels: int64 [A], -1 for none. `forward` and `in_micro_batches` get row numbers of both,
    int64 [N], where others get labels. Neither is part of the state: a checkpoint holds the student alone.
    """

    def __init__(
        self, student: ClassifierNet, *, logits: Tensor, labels: Tensor, temperature: float, label_weight: float = 0.0
    ) -> None:
        super().__init__(student, nn.Module(), temperature=temperature, label_weight=label_weight)
        self.register_buffer("logits_AK", logits, persistent=False)
        self.register_buffer("labels_A", labels, persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        """labels: the rows of these images, int64 [N]."""
        return self._compared(images, self.get_buffer("logits_AK")[labels], self.get_buffer("labels_A")[labels])

    def in_micro_batches(self, labels: Tensor | None, micro_batches: int) -> None:
        """labels: the rows of the rank's batch, int64 [N]."""
        super().in_micro_batches(None if labels is None else self.get_buffer("labels_A")[labels], micro_batches)


class Ensemble(nn.Module):
    """Several teachers as one: t·log(1/M sum_m softmax(z_m / t)), whose softmax at t is the mean of theirs.

    Images -> [N, K]. With the mean of probabilities the loss is the mean of the losses by each teacher alone, since a
    cross-entropy is linear in its target. The mean of logits is the geometric mean of probabilities: a teacher with
    large logits outweighs the others, and one that rules a class out forbids it.
    """

    def __init__(self, teachers: Sequence[nn.Module], temperature: float) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K], float32 or wider."""
        each = [(_at_least_float32(teacher(images)) / self.temperature).log_softmax(dim=1) for teacher in self.teachers]
        return self.temperature * (torch.stack(each).logsumexp(dim=0) - math.log(len(each)))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
