"""What ComfyUI's, musubi-tuner's and diffusers' own loaders make of the files that lapwan writes.

    python tests/bench/bench_peer_loaders.py --comfyui DIR --musubi DIR
    python tests/bench/bench_peer_loaders.py                               # diffusers alone

DIR is a checkout of the tool; its loading code is imported from there. Modules that it imports and that have nothing to
do with loading an adapter (device management, model classes) are replaced by empty ones.

An adapter with random values for every Linear of the embedded model (8 blocks, 80 modules, ranks and alphas that
differ), or of a small transformer of TI2V-5B's form (one for all noise, 48 channels), is written by `lapwan merge`'s
writers in each layout, and of other kinds where the layout has them. A row
passes if the tool applies every module, says of no key that it is unused, and its ΔW is the one written, to 1e-6. The
arithmetic is the tool's, on zero weights (DoRA: on random ones; ΔW is not judged there, since ComfyUI divides by ‖W‖
where the paper and peft divide by ‖W + V‖).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.wan_keys import original_target, target_path, to_original
from lapwan.lora.combine import combine
from lapwan.lora.formats import write_lora
from lapwan.lora.kinds import DoRA, FullDelta
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.tiny.model import tiny_folder

LIMIT = 1e-6
TI2V = {"patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 48,
        "out_channels": 48, "text_dim": 64, "freq_dim": 32, "ffn_dim": 192, "num_layers": 3}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outcome:
    """ΔW by path, as the tool computed it, and the keys that it did not use."""

    deltas: dict[str, Tensor]
    unused: int


Loader = Callable[[Path, Mapping[str, Tensor]], Outcome]  # (adapter file, base weights by path) -> what it applies


class Stub(ModuleType):
    """A module in which every name is an empty class, for imports that an adapter's loading does not use."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class Warnings(logging.Handler):
    """Collects the tool's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def original_name(path: str) -> str:
    """The tensor's name in the original layout: `blocks.0.attn1.to_q` -> `blocks.0.self_attn.q.weight`."""
    known = original_target(path)
    assert known is not None, path
    return ".".join(known)


def comfyui(folder: Path) -> Loader:
    """`comfy.sd.load_lora_for_models` as far as the model: key map, conversion, patches, and their arithmetic."""
    def cast_to_device(tensor: Tensor, device: object, dtype: torch.dtype, copy: bool = False) -> Tensor:
        return tensor.to(dtype, copy=copy)

    sys.path.insert(0, str(folder))
    management = Stub("comfy.model_management")
    management.cast_to_device = cast_to_device
    package = importlib.import_module("comfy")
    for stub in (management, Stub("comfy.model_base")):
        sys.modules[stub.__name__] = stub
        setattr(package, stub.__name__.rpartition(".")[2], stub)
    if importlib.util.find_spec("einops") is None:
        sys.modules["einops"] = Stub("einops")
    lora, convert, utils = map(importlib.import_module, ("comfy.lora", "comfy.lora_convert", "comfy.utils"))

    def load(path: Path, base: Mapping[str, Tensor]) -> Outcome:
        names = {f"diffusion_model.{original_name(target)}": target for target in base}
        model = SimpleNamespace(state_dict=lambda: {name: base[target] for name, target in names.items()},
                                model_config=SimpleNamespace(unet_config={}))
        tensors = convert.convert_lora(utils.load_torch_file(str(path), safe_load=True))
        warnings = Warnings()
        logging.getLogger().addHandler(warnings)
        patches = lora.load_lora(tensors, lora.model_lora_keys_unet(model, {}))
        logging.getLogger().removeHandler(warnings)
        deltas = {}
        for name, patch in patches.items():
            weight = base[names[name]].double()
            patched = lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), name, torch.float64)
            deltas[names[name]] = patched - weight
        return Outcome(deltas, sum("not loaded" in message for message in warnings.messages))
    return load


def musubi(folder: Path) -> Loader:
    """`load_safetensors_with_lora_and_fp8`, with which `wan_generate_video.py` loads a model and its LoRAs."""
    sys.path.insert(0, str(folder / "src"))
    utils = importlib.import_module("musubi_tuner.utils.lora_utils")

    def load(path: Path, base: Mapping[str, Tensor]) -> Outcome:
        names = {original_name(target): target for target in base}
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model.safetensors"
            save_file({name: base[target].contiguous() for name, target in names.items()}, model)
            warnings = Warnings()
            utils.logger.addHandler(warnings)
            merged = utils.load_safetensors_with_lora_and_fp8(
                str(model), [utils.filter_lora_state_dict(load_file(path))], [1.0], False, torch.device("cpu"))
            utils.logger.removeHandler(warnings)
        deltas = {names[name]: merged[name].double() - base[names[name]].double() for name in names}
        unused = [m.rpartition(":")[2].split(", ") for m in warnings.messages if "not all LoRA keys are used" in m]
        return Outcome({target: delta for target, delta in deltas.items() if delta.any()}, sum(map(len, unused)))
    return load


def diffusers() -> Loader:
    """`WanPipeline.load_lora_weights`; ΔW as peft computes it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def load(path: Path, base: Mapping[str, Tensor]) -> Outcome:
        single = base["patch_embedding"].shape[1] == TI2V["in_channels"]
        if single:
            transformer = WanTransformer3DModel(**TI2V)
        else:
            transformer = WanTransformer3DModel.from_pretrained(tiny_folder("t2v"), subfolder="transformer")
        transformer = transformer.to(torch.float32)
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
                           scheduler=FlowMatchEulerDiscreteScheduler(), expand_timesteps=single)
        pipe.load_lora_weights(path)
        deltas = {name: module.get_delta_weight("default_0").detach().double()
                  for name, module in transformer.named_modules() if hasattr(module, "get_delta_weight")}
        return Outcome(deltas, 0)  # a key that it does not use raises, or its module is missing
    return load


def shapes(single: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that an adapter may change, by path; `single`: of TI2V-5B's form."""
    if single:
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            named = {name: tuple(p.shape) for name, p in WanTransformer3DModel(**TI2V).named_parameters()}
    else:
        file = read_header(next((tiny_folder("t2v") / "transformer").glob("*.safetensors")))
        named = {name: tuple(info.shape) for name, info in file.tensors.items()}
    paths = {target_path(name): shape for name, shape in named.items()}
    return {path: shape for path, shape in paths.items() if path is not None}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def _lora(n: int, out: int, columns: int) -> LowRank:
    rank = (4, 8, 16)[n % 3]
    return LowRank(_random(rank, columns), _random(out, rank), (1.0, 4.0, 8.0)[n % 3])


def _lokr(n: int, out: int, columns: int) -> LoKr:
    second = {"lokr_w2": _random(out // 8, columns // 8)} if n % 2 else {
        "lokr_w2_a": _random(out // 8, 4), "lokr_w2_b": _random(4, columns // 8)}
    return LoKr({"lokr_w1": _random(8, 8)} | second, 2.0)


def _loha(n: int, out: int, columns: int) -> LoHa:
    parts = zip(LoHa.PARTS, ((out, 4), (4, columns)) * 2, strict=True)
    return LoHa({part: _random(*shape) for part, shape in parts}, 2.0)


def _dora(n: int, out: int, columns: int) -> DoRA:
    return DoRA(_lora(n, out, columns), torch.rand(out, 1) + 0.5)


def adapters() -> dict[str, AdapterState]:
    """The adapters to write, by what they hold."""
    everything = shapes()
    blocks = {path: shape for path, shape in everything.items() if path.startswith("blocks.") and to_original(path)}
    outer = {path: shape for path, shape in everything.items()
             if not path.startswith("blocks.") and to_original(path) and len(shape) == 2}

    def of(targets: Shapes, make: Callable[..., WeightUpdate]) -> AdapterState:
        return AdapterState({path: make(n, *shape) for n, (path, shape) in enumerate(targets.items())})

    deltas = AdapterState({path: FullDelta(_random(*shape)) for path, shape in everything.items()})
    convolution = of({"patch_embedding": everything["patch_embedding"]}, lambda n, *shape: LowRank(
        _random(4, *shape[1:]), _random(shape[0], 4, 1, 1, 1), 4.0))
    some = dict(list(blocks.items())[3:20:4])
    single = {path: shape for path, shape in shapes(single=True).items()
              if path.startswith("blocks.") and to_original(path)}
    return {
        "TI2V-5B, LoRA": of(single, _lora), "TI2V-5B, LoRA, 5 modules": of(dict(list(single.items())[3:20:4]), _lora),
        "LoRA": of(blocks, _lora), "LoRA, 5 modules": of(some, _lora), "LoRA, outer too": of(blocks | outer, _lora),
        "LoRA, patch embedding too": AdapterState(of(blocks, _lora).entries | convolution.entries),
        "LoKr": of(blocks, _lokr), "LoHa": of(blocks, _loha), "DoRA": of(blocks, _dora),
        "full deltas": deltas,
        "LoKr, LoHa, deltas -> rank 24": combine([
            (of(blocks, _lokr), 1.0), (of(some, _loha), 0.5), (of(some, lambda n, *s: FullDelta(_random(*s))), 1.0),
        ], 24)[0],
    }


# (adapter, layout, fold_alpha, tools that read the layout and the kind)
ROWS: list[tuple[str, str, bool, tuple[str, ...]]] = [
    ("TI2V-5B, LoRA", "comfy", False, ("ComfyUI", "diffusers")),
    ("TI2V-5B, LoRA", "musubi", False, ("ComfyUI", "musubi", "diffusers")),
    ("TI2V-5B, LoRA", "diffusers", False, ("diffusers",)),
    ("TI2V-5B, LoRA, 5 modules", "comfy", False, ("ComfyUI", "diffusers")),
    ("TI2V-5B, LoRA, 5 modules", "musubi", True, ("ComfyUI", "musubi")),
    ("TI2V-5B, LoRA, 5 modules", "diffusers", False, ("diffusers",)),
    ("LoRA", "comfy", False, ("ComfyUI", "diffusers")),
    ("LoRA", "comfy", True, ("ComfyUI", "diffusers")),
    ("LoRA, 5 modules", "comfy", False, ("ComfyUI", "diffusers")),
    ("LoRA, outer too", "comfy", False, ("ComfyUI", "diffusers")),
    ("LoRA, patch embedding too", "comfy", False, ("ComfyUI",)),  # diffusers raises
    ("LoRA", "musubi", False, ("ComfyUI", "musubi", "diffusers")),
    ("LoRA", "musubi", True, ("ComfyUI", "musubi", "diffusers")),
    ("LoRA, 5 modules", "musubi", False, ("ComfyUI", "musubi")),
    ("LoRA, outer too", "musubi", False, ("ComfyUI", "musubi")),
    ("LoRA", "diffusers", False, ("diffusers",)),
    ("LoRA", "diffusers", True, ("diffusers",)),
    ("LoRA, 5 modules", "diffusers", False, ("diffusers",)),
    ("LoRA, outer too", "diffusers", False, ("diffusers",)),
    ("LoRA, patch embedding too", "diffusers", False, ("diffusers",)),
    ("LoKr", "comfy", False, ("ComfyUI",)),
    ("LoKr", "musubi", False, ("ComfyUI", "musubi")),
    ("LoKr", "musubi", True, ("ComfyUI", "musubi")),
    ("LoHa", "comfy", False, ("ComfyUI",)),
    ("LoHa", "musubi", False, ("ComfyUI", "musubi")),
    ("DoRA", "comfy", False, ("ComfyUI",)),
    ("full deltas", "comfy", False, ("ComfyUI",)),
    ("LoKr, LoHa, deltas -> rank 24", "comfy", False, ("ComfyUI", "diffusers")),
    ("LoKr, LoHa, deltas -> rank 24", "musubi", False, ("ComfyUI", "musubi", "diffusers")),
    ("LoKr, LoHa, deltas -> rank 24", "diffusers", False, ("diffusers",)),
]


def compare(state: AdapterState, outcome: Outcome, base: Mapping[str, Tensor]) -> tuple[int, float]:
    """(modules that the tool changed and lapwan wrote, the largest relative error of ΔW in them)."""
    matched, worst = 0, 0.0
    for path, entry in state.entries.items():
        if path not in outcome.deltas:
            continue
        wanted = entry.delta(torch.float64, base[path].double())
        difference = outcome.deltas[path].reshape(wanted.shape) - wanted
        matched, worst = matched + 1, max(worst, (difference.norm() / wanted.norm()).item())
    return matched, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--musubi", type=Path, help="a checkout of musubi-tuner")
    options = parser.parse_args()
    torch.manual_seed(0)
    states = adapters()
    loaders = {"diffusers": diffusers()}
    if options.comfyui:
        loaders["ComfyUI"] = comfyui(options.comfyui)
    if options.musubi:
        loaders["musubi"] = musubi(options.musubi)
    failed = 0
    print("| adapter | layout | tool | modules | unused keys | largest relative error of ΔW |  |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        for name, layout, fold, tools in ROWS:
            state = states[name]
            write_lora(path, state, layout, torch.float32, fold)
            zeros = {target: torch.zeros(shape) for target, shape in shapes(name.startswith("TI2V")).items()}
            base = {target: torch.randn_like(w) for target, w in zeros.items()} if name == "DoRA" else zeros
            for tool in filter(loaders.__contains__, tools):
                outcome = loaders[tool](path, base)
                matched, error = compare(state, outcome, base)
                good = matched == len(state.entries) == len(outcome.deltas) and not outcome.unused
                good = good and (error <= LIMIT or name == "DoRA")
                failed += not good
                form, verdict = layout + ", alpha folded" * fold, "" if good else "DIFFERS"
                print(f"| {name} | {form} | {tool} | {matched} of {len(state.entries)} | {outcome.unused} | "
                      f"{error:.1e} | {verdict} |", flush=True)
    print(f"\n{failed} of the rows differ" if failed else "\nall rows agree")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
