"""Context parallelism over two processes (gloo, CPU): velocities, cached steps and a video are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from safetensors.torch import load_file
from torch import Tensor
from two_processes import two_processes

from lapwan.commands import generate
from lapwan.distributed import Processes
from lapwan.errors import UserError
from lapwan.lora.attach import Group, attach
from lapwan.lora.state import AdapterState, LowRank
from lapwan.memory.cost import ClipShape, GroupShape, NoiseExpertShape
from lapwan.models.spec import read_spec
from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.settings.base import RunOptions
from lapwan.settings.generate import GenerateSettings
from lapwan.tiny.model import TRANSFORMER, tiny_folder
from lapwan.train.parallel import join_processes
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.first_block_cache import FirstBlockCache
from lapwan.wan.transformer.forward import TokenTimes
from lapwan.wan.transformer.prompt import Prompt

ODD, EVEN = (3, 6, 6), (3, 6, 8)  # 27 and 36 tokens


def model_fp64() -> WanBackbone:
    torch.manual_seed(0)
    made = WanTransformer3DModel(in_channels=16, **{**TRANSFORMER, "num_layers": 3}).double().eval()
    made.requires_grad_(False)
    return WanBackbone(made)


def velocities(model: WanBackbone, gates: Tensor, holder: object) -> dict[str, Tensor]:
    """Every form of timestep and text, then steps with the first-block cache."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, *ODD, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 12, model.transformer.config.text_dim, generator=generator, dtype=torch.float64)
    values, rows = torch.tensor([[0.0, 600.0], [0.0, 250.0]]).double(), torch.arange(27) >= 9
    results = {}
    with torch.no_grad(), holder.scope(gates):  # type: ignore[attr-defined]
        results["by sample"] = model.velocity(x, values[:, 1], text)
        results["by token"] = model.velocity(x, values[:, rows.long()], text)
        results["two values"] = model.velocity(x, TokenTimes(values, (9, 18)), Prompt(text))
        cache = FirstBlockCache(0.2)
        for step in range(4):
            t = torch.tensor([500.0 - 5 * step]).expand(2)
            results[f"kept {step}"] = model.velocity(x, t, text, first_block_cache=cache.branch("text"))
        results["cache"] = torch.tensor([len(cache.predicted), *cache.predicted, *cache.errors]).double()
    return results


def ours(rank: int, count: int) -> dict[str, Tensor]:
    """With two gated LoRAs on blocks 1 and 2."""
    model = model_fp64()
    groups = []
    for column in range(2):
        generator = torch.Generator().manual_seed(column)
        entries = {}
        for path in ("blocks.1.attn1.to_q", "blocks.1.attn1.to_k", "blocks.2.attn1.to_v", "blocks.2.ffn.net.0.proj"):
            base = model.transformer.get_submodule(path)
            down, up = (torch.randn(*shape, generator=generator).double() * 0.1
                        for shape in ((3, base.in_features), (base.out_features, 3)))
            entries[path] = LowRank(down, up, 3.0)
        groups.append(Group(str(column), AdapterState(entries, {}), trainable=False))
    adapter = attach(model.transformer, groups, gates_required=True)
    if count > 1:
        model.share_tokens(ContextParallel(rank, count))
    return velocities(model, torch.tensor([[0.7, 0.2], [0.1, 0.8]]).double(), adapter.holder)


def diffusers_plan(model: WanTransformer3DModel, rank: int) -> None:
    """As `enable_parallelism` does, which asks for an accelerator."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    config_cp = ContextParallelConfig(ulysses_degree=2)
    config = ParallelConfig(context_parallel_config=config_cp)
    mesh = init_device_mesh("cpu", config_cp.mesh_shape, mesh_dim_names=config_cp.mesh_dim_names)
    config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor._parallel_config = config
    apply_context_parallel(model, config_cp, model._cp_plan)


def settings_for(output: Path, device: str = "cpu") -> GenerateSettings:
    return GenerateSettings.model_validate({
        "model": "tiny", "prompt": "电凝钩切割组织", "size": "48x32", "num_frames": 9, "steps": 4, "guidance": 3.0,
        "output": output, "videos": 2, "device": device, "dtype": "fp32", "sheet": True})


def work(rank: int, folder: Path, device: str) -> None:
    """One of two processes."""
    join_processes(device)
    if device == "cpu":
        torch.save(ours(rank, 2), folder / f"ours_{rank}.pt")
        against_diffusers(rank)
    generate.run(settings_for(folder / "two.safetensors", device), RunOptions())  # leaves the group at its end


def against_diffusers(rank: int) -> None:
    model = model_fp64()
    x, text = torch.randn(2, 16, *EVEN).double(), torch.randn(2, 12, model.transformer.config.text_dim).double()
    t = torch.tensor([600.0, 250.0]).double()
    torch.distributed.broadcast(x, 0)
    torch.distributed.broadcast(text, 0)
    with torch.no_grad():
        model.share_tokens(ContextParallel(rank, 2))
        mine = model.velocity(x, t, text)
        diffusers_plan(model.transformer, rank)
        theirs = model.transformer(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # diffusers embeds the time in fp32


def videos_of_one_and_two(folder: Path, device: str, atol: float) -> None:
    with two_processes(work, folder, device):
        generate.run(settings_for(folder / "one.safetensors", device), RunOptions())
    for seed in (42, 43):
        alone, shared = (load_file(next(folder.glob(f"{name}_*seed={seed}.safetensors")))["latents"]
                         for name in ("one", "two"))
        torch.testing.assert_close(shared, alone, rtol=0, atol=atol)
    assert (folder / "two_sheet.png").is_file()


def test_two_processes_make_what_one_makes(tmp_path):
    videos_of_one_and_two(tmp_path, "cpu", 1e-4)
    one = ours(0, 1)
    assert one["cache"][0] >= 1
    for rank in range(2):
        two = torch.load(tmp_path / f"ours_{rank}.pt")
        for name, value in one.items():
            # Norms of a shard are summed in fp32 on the way to a predicted error.
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6 if name == "cache" else 1e-10, msg=name)


@pytest.mark.gpu
def test_two_gpus_make_what_one_makes(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    videos_of_one_and_two(tmp_path, "cuda", 1e-3)


def test_heads_that_do_not_divide_are_refused(tiny_t2v):
    with pytest.raises(UserError, match="3 processes cannot share this model's 4 attention heads; start one of 1, "):
        Generator(tiny_t2v, processes=Processes(0, 3))


def test_one_gpu_named_for_all_is_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="device = 'cuda:0' with 2 processes, each of which needs its own GPU"):
        join_processes("cuda:0")


def test_a_share_of_the_tokens_takes_about_that_share_of_the_memory():
    shape = NoiseExpertShape(read_spec(tiny_folder("t2v")), NoiseExpert.HIGH, torch.bfloat16)
    one, two = (shape.forward_memory(ClipShape(2, 81, 256, 256), count) for count in (1, 2))
    assert 0.45 * one < two < 0.85 * one  # its exchange holds q, k and v four times: plain, joined, sent, received
    trained = [GroupShape({f"blocks.{i}.attn1.to_q": 4 for i in (6, 7)}, True)]
    shape = NoiseExpertShape(read_spec(tiny_folder("t2v")), NoiseExpert.HIGH, torch.bfloat16, groups=trained)
    one, two = (shape.step_memory(ClipShape(2, 81, 256, 256), ["off"], count).peak("off") for count in (1, 2))
    assert 0.45 * one < two < 0.65 * one
