"""The loss of stage 2 as one number, with the settings' defaults, against its formula."""

from __future__ import annotations

import pytest
import torch
from training_cases import draws_for, randomise

from lapwan.names import NoiseExpert


@pytest.mark.parametrize("sure", [False, True], ids=["above the entropy floor", "below it"])
def test_the_loss_is_flow_3_region_002_entropy_01_balance_and_1_teacher(make_moe, sure):
    """L = L_flow + 3.0·L_roi + 0.02·relu(0.5 − H) + 0.1·(E·Σ EMA·p̄ − 1) + 1.0·KL over the labelled clips."""
    trainer = make_moe(targets={"last_blocks": 1, "ffn_last_blocks": 1}, routing_loss={})
    objective, noise_expert = trainer.objective, NoiseExpert.LOW
    randomise(trainer)
    mixture, adapter = objective.mixture, objective.adapters[noise_expert]
    if sure:
        mixture.router.temperature = 0.01
    batch = trainer.data.load_batch([0, 1, 2, 3])  # the first has boxes, the last is a fallback
    draws = draws_for(trainer, noise_expert, batch)
    usage = 0.99 * torch.full((4,), 0.25)
    objective.prepare(noise_expert, [batch], draws=[draws])
    with objective.loss(noise_expert, batch, draws) as loss:
        found = float(loss.total_B.detach().double().mean())
    with torch.no_grad():
        p = mixture.route(batch.text).double()
        two = p * (p >= p.topk(2, dim=1).values[:, 1:])
        mix = two / two.sum(dim=1, keepdim=True)
        sigma = draws.sigma_B.view(-1, 1, 1, 1, 1)
        with adapter.holder.scope((mixture.timestep_gate(noise_expert)(draws.sigma_B)[:, None] * mix).float()):
            v = objective.backbones[noise_expert].velocity(
                sigma * draws.noise_BCTHW + (1 - sigma) * batch.latents_BCTHW, 1000 * draws.sigma_B.float(),
                list(batch.text), batch.condition_BCTHW)
        error = (v - (draws.noise_BCTHW - batch.latents_BCTHW)).double().square().mean(dim=1)
        region = [float((e * m).sum() / m.sum()) if m.sum() else 0.0
                  for e, m in zip(error, batch.roi_BTHW.double(), strict=True)]
        entropy = float(-(p * p.log()).sum(dim=1).mean())
        teacher = torch.softmax(batch.label_weights_BE.double() / 0.35, dim=1)
        kl = (p * (p.log() - teacher.log())).sum(dim=1)[~batch.fallback_B].mean()
        balance = 4 * float(((usage + 0.01 * mix.mean(dim=0)) * p.mean(dim=0)).sum()) - 1
    assert (entropy < 0.5) is sure and bool(batch.fallback_B.any()) and max(region) > 0
    want = float(error.mean()) + 3 * sum(region) / 4 + 0.02 * max(0.0, 0.5 - entropy) + 0.1 * balance + float(kl)
    assert found == pytest.approx(want, rel=1e-5)
