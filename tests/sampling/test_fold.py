"""LoRAs in the weights instead of beside them."""

from __future__ import annotations

import torch
from adapter_cases import random_lora
from safetensors.torch import load_file
from sampling_cases import generate, refused

from lapwan.lora.formats import write_lora


def test_folded_is_beside_and_leaves_no_adapter(lapwan, tmp_path, mixture_file):
    write_lora(tmp_path / "a.safetensors", random_lora(0))
    given = ("--lora", "both=a.safetensors:0.7")
    frames = {}
    for name, more in (("beside", ()), ("folded", ("--fold",)), ("without", None)):
        options = () if more is None else (*given, *more)
        assert generate(lapwan, *options, output=f"{name}.safetensors").code == 0
        frames[name] = load_file(tmp_path / f"{name}.safetensors")["latents"]
    torch.testing.assert_close(frames["folded"], frames["beside"], rtol=1e-3, atol=1e-3)
    assert float((frames["without"] - frames["beside"]).abs().max()) > 1e-2
    refused(generate(lapwan, *given, "--fold", "--moe", str(mixture_file), output="no"), "--fold", "leave --fold out")
