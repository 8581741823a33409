"""What is counted of a classifier: hits, confusions, calibration and subgroups, summed over all ranks.

ECE = sum_b |B_b| / N · |accuracy(B_b) - confidence(B_b)| over 15 bins, B_b the images whose largest probability is in
((b - 1) / 15, b / 15]. Guo et al. 2017, Eq. 3.
"""

# N images of this rank, K classes, B bins, G subgroups, P pairs of classes that occur

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimclr.distributed.ranks import Ranks

ECE_BINS = 15
_ROWS = 4096  # of logits in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a classifier was right over all ranks. counts_3K: int64 on the CPU: images, top-1 hits, top-5 hits of
    each true class. predicted_N: int64 on the device, the best class of each of this rank's images."""

    counts_3K: Tensor
    predicted_N: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """top1 and, with more than five classes, top5: fractions of all images."""
        images, top1, top5 = self.counts_3K.sum(dim=1).tolist()
        result = {"top1": top1 / images}
        if self.counts_3K.shape[1] > 5:
            result["top5"] = top5 / images
        return result

    @property
    def top1(self) -> float:
        """The fraction of all images whose best class is the true one."""
        return self.metrics["top1"]

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One entry a class, in order: its name, how many images it has, and how many of them were right (top-1)."""
        images, correct, _ = self.counts_3K.tolist()
        return [
            {"name": name, "images": n, "correct": right} for name, n, right in zip(names, images, correct, strict=True)
        ]


def count(scores_NK: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [3, K]: images, top-1 hits and top-5 hits of each true class; int64 [N]: the best class of each image)."""
    best = scores_NK.topk(min(5, scores_NK.shape[1]), dim=1).indices
    ranked = best == labels_N[:, None]
    hits_3N = torch.stack([torch.ones_like(labels_N), ranked[:, 0].long(), ranked.any(dim=1).long()])
    counts_3K = torch.zeros(3, scores_NK.shape[1], dtype=torch.int64, device=scores_NK.device)
    return counts_3K.scatter_add_(1, labels_N.expand(3, -1), hits_3N), best[:, 0]


def score(scores_NK: Tensor, labels_N: Tensor, ranks: Ranks) -> Score:
    """How often the largest of the scores (logits, votes) is that of the label. The rows are this rank's."""
    counts_3K, predicted_N = count(scores_NK, labels_N)
    return Score(counts_3K=ranks.total(counts_3K).cpu(), predicted_N=predicted_N)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far a classifier's probabilities can be believed, over all ranks.

    bins_3B: float64 on the CPU: images, top-1 hits and summed confidence of each bin. nll: mean of -log p(label), nats.
    """

    bins_3B: Tensor
    nll: float

    @property
    def ece(self) -> float:
        """The expected calibration error, 0 (believe them) to 1."""
        images, hits, confidence = self.bins_3B
        return float((hits - confidence).abs().sum() / images.sum())

    @property
    def bins(self) -> list[dict[str, Any]]:
        """One entry a bin that has images: its upper end, images, accuracy and mean confidence."""
        rows = zip(range(1, self.bins_3B.shape[1] + 1), *self.bins_3B.tolist(), strict=True)
        return [
            {
                "up_to": round(b / self.bins_3B.shape[1], 4),
                "images": int(n),
                "accuracy": hits / n,
                "confidence": sure / n,
            }
            for b, n, hits, sure in rows
            if n
        ]


def calibration(logits_NK: Tensor, predicted_N: Tensor, labels_N: Tensor, ranks: Ranks) -> Calibration:
    """Calibration of the softmax of `logits_NK`, at temperature 1, in float64. predicted_N: the best classes."""
    right_N = predicted_N == labels_N
    sums = torch.zeros(3 * ECE_BINS + 1, dtype=torch.float64, device=logits_NK.device)
    edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=torch.float64, device=logits_NK.device)
    blocks = (torch.split(values, _ROWS) for values in (logits_NK, right_N, labels_N))
    for logits, right, labels in zip(*blocks, strict=True):
        log_p = F.log_softmax(logits.double(), dim=1)
        confidence = log_p.amax(dim=1).exp()
        place = (torch.bucketize(confidence, edges) - 1).clamp(0, ECE_BINS - 1)  # NaN goes last and stays NaN
        for row, values in enumerate((torch.ones_like(confidence), right.double(), confidence)):
            sums.scatter_add_(0, row * ECE_BINS + place, values)
        sums[-1] -= log_p.gather(1, labels[:, None]).sum()
    sums = ranks.total(sums).cpu()
    bins_3B = sums[:-1].view(3, ECE_BINS)
    return Calibration(bins_3B=bins_3B, nll=float(sums[-1] / bins_3B[0].sum()))


def confusion(predicted_N: Tensor, labels_N: Tensor, classes: int, ranks: Ranks) -> Tensor:
    """int64 [P, 3] on the CPU: true class, predicted class, images of each pair that occurs on any rank, in order.

    Pairs rather than [K, K], which for 21,841 classes is 3.8 GB: there are no more pairs than images.
    """
    codes = ranks.gather_rows(labels_N * classes + predicted_N).cpu()
    pairs, images = torch.unique(codes, return_counts=True)
    return torch.stack([pairs // classes, pairs % classes, images], dim=1)


def by_group(right_N: Tensor, groups_N: Tensor, groups: int, ranks: Ranks) -> Tensor:
    """int64 [2, G] on the CPU: images of each group over all ranks, and how many of them are right.

    right_N: bool. groups_N: int64, which of the `groups` each image is of.
    """
    hits_2N = torch.stack([torch.ones_like(groups_N), right_N.long()])
    counts_2G = torch.zeros(2, groups, dtype=torch.int64, device=groups_N.device)
    return ranks.total(counts_2G.scatter_add_(1, groups_N.expand(2, -1), hits_2N)).cpu()


@dataclass(frozen=True, kw_only=True)
class ClassifierReport(Score):
    """A score, and where the classifier errs. confusion_P3: see `confusion`. calibration: None of what has no
    probabilities. groups_2G: see `by_group`; None without subgroups."""

    confusion_P3: Tensor
    calibration: Calibration | None = None
    groups_2G: Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """top1, perhaps top5, and of probabilities nll and ece."""
        sure = self.calibration
        return super().metrics | ({} if sure is None else {"nll": sure.nll, "ece": sure.ece})
