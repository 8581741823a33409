"""Weighted k-nearest neighbours on cosine similarity. Wu et al. 2018, Sec. 3.4."""

# N images to classify, T labelled images, C channels, K classes, S settings

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.features import Features
from fastsimclr.evaluation.scores import Score, count


def knn(
    train: Features, test: Features, classes: int, *, ks: Sequence[int], temperatures: Sequence[float], ranks: Ranks
) -> dict[tuple[int, float], Score]:
    """Weighted kNN on cosine similarity, each neighbour voting exp(similarity / temperature). Wu et al. 2018, Sec. 3.4.

    The score of each (k, temperature), the first of both first; k is cut to the number of labelled images. Each rank
    classifies its own images by the labelled ones of all ranks: T·C numbers in memory, and those of a block of images
    against them.
    """
    bank_TC = ranks.gather_rows(F.normalize(train.values, dim=1))
    labels_T = ranks.gather_rows(train.labels)
    settings = list(dict.fromkeys((min(k, len(bank_TC)), temperature) for k in ks for temperature in temperatures))
    most = max(k for k, _ in settings)
    counts_S3K = torch.zeros(len(settings), 3, classes, dtype=torch.int64, device=bank_TC.device)
    predicted_SN = torch.empty(len(settings), len(test.labels), dtype=torch.int64, device=bank_TC.device)
    done = 0
    rows = max(1, 2**24 // len(bank_TC))
    blocks = torch.split(F.normalize(test.values, dim=1), rows), torch.split(test.labels, rows)
    for block_NC, truth_N in zip(*blocks, strict=True):
        similarity, index = (block_NC @ bank_TC.T).topk(most, dim=1)  # the nearest first
        neighbours = labels_T[index]
        for s, (k, temperature) in enumerate(settings):
            weight = ((similarity[:, :k] - 1) / temperature).exp()
            votes_NK = weight.new_zeros(len(block_NC), classes).scatter_add_(1, neighbours[:, :k], weight)
            counts_3K, predicted_SN[s, done : done + len(block_NC)] = count(votes_NK, truth_N)
            counts_S3K[s] += counts_3K
        done += len(block_NC)
    summed = ranks.total(counts_S3K).cpu()
    return {
        setting: Score(counts_3K=counts_3K, predicted_N=predicted_N)
        for setting, counts_3K, predicted_N in zip(settings, summed, predicted_SN, strict=True)
    }
