"""Whole training runs with our forward and with diffusers' own: the same losses, the same adapters."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize("stage", ["lora", "moe"])
def test_a_run_ends_with_the_losses_of_diffusers_forward(stage, make_lora, make_moe, tmp_path):
    make = make_lora if stage == "lora" else make_moe
    runs = []
    for name in ("ours", "theirs"):
        trainer = make(output=tmp_path / name, steps=6, optimizer={"lr": 3e-3})
        if name == "theirs":  # every block in the graph, nothing shared, nothing kept
            for backbone in trainer.objective.backbones.values():
                backbone.transformer.patch_embedding.requires_grad_(True)
                backbone.use_diffusers_forward()
        trainer.config.run_folder.mkdir()
        trainer.fit()
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        files = sorted((tmp_path / name).glob("*.safetensors"))
        runs.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows], [load_file(f) for f in files]))
    (ours, our_norms, our_files), (theirs, their_norms, their_files) = runs
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 12
    assert our_norms == pytest.approx(their_norms, rel=1e-3)
    for mine, other in zip(our_files, their_files, strict=True):
        for name, tensor in mine.items():
            # Adam turns rounding in a gradient near zero into a step of lr: compared as a whole, not one by one.
            assert float((tensor - other[name]).norm()) <= 2e-2 * float(other[name].norm()) + 1e-6, name
