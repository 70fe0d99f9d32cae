"""Losses on a mixture's router: KL to the label teacher, entropy floor, load balance.

Shapes: B samples, E experts. Probabilities are the router's softmax before top-k; logarithms are natural (nats).
Sources: Hinton et al. (arXiv 1503.02531) for the teacher; Fedus et al., Switch (arXiv 2101.03961) for the balance term.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-30  # makes 0·log 0 = 0, and is below any probability that matters in fp32


def teacher(label_weights_BE: Tensor, temperature: float) -> Tensor:
    """softmax(weights / T) over the families; for T = 0.35 and a one-hot label of four its entropy is 0.58 nats.

    Args:
        label_weights_BE: label weights in [0, 1], each row summing to 1.
        temperature: T > 0; lower values sharpen the teacher.

    Returns:
        [B, E] probabilities.
    """
    return F.softmax(label_weights_BE / temperature, dim=-1)


def entropy(probabilities_BE: Tensor) -> Tensor:
    """H = −Σ p·log p of each sample, in nats: [B].

    Args:
        probabilities_BE: before top-k, each row summing to 1.
    """
    return -(probabilities_BE * probabilities_BE.clamp_min(_TINY).log()).sum(dim=-1)


def entropy_hinge(probabilities_BE: Tensor, mean_entropy: float, floor: float = 0.5) -> Tensor:
    """Per sample, 1[H̄ < floor]·(floor − H_b): [B]. Its mean over the step's samples is relu(floor − H̄).

    It acts only when the router becomes too certain.

    Args:
        probabilities_BE: the router's, before top-k.
        mean_entropy: H̄ over *all* samples of the step, so that the hinge does not depend on the split into batches.
        floor: entropy below which it acts, in nats.
    """
    return (floor - entropy(probabilities_BE)) * float(mean_entropy < floor)


def teacher_kl(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """KL(student ‖ teacher) = Σ p·(log p − log q) of each sample, in nats: [B].

    Args:
        student_BE: the router's probabilities before top-k, with gradient.
        teacher_BE: see `teacher`.
    """
    ratio = student_BE.clamp_min(_TINY).log() - teacher_BE.clamp_min(_TINY).log()
    return (student_BE * ratio).sum(dim=-1)


def balance(usage_E: Tensor, probabilities_BE: Tensor) -> Tensor:
    """E·Σ_e stopgrad(usage_e)·p_be − 1 per sample: [B]; its mean is 0 at uniform usage, E − 1 if one expert gets all.

    Args:
        usage_E: running mean over many steps (see `update_usage`), so that the term is meaningful for a batch of one.
        probabilities_BE: the router's, before top-k, with gradient.
    """
    usage = usage_E.detach().to(probabilities_BE)
    return usage_E.numel() * (usage * probabilities_BE).sum(dim=-1) - 1


def update_usage(usage_E: Tensor, batch_mean_E: Tensor, decay: float = 0.99) -> Tensor:
    """EMA of usage; call it once per optimizer step with the mean over the global batch.

    Args:
        usage_E: the EMA so far.
        batch_mean_E: mean probability of each expert over the samples of the step.
        decay: weight of the old EMA, in [0, 1).

    Returns:
        [E] in the dtype of `usage_E`.
    """
    return torch.lerp(batch_mean_E.detach().to(usage_E.dtype), usage_E, decay)
