"""Options of other programs by lapwan's command: musubi-tuner's, Wan's generate.py, ai-toolkit's, diffusion-pipe's and
diffusers' scripts. `foreign_line` answers a command line that has any.

Source of the names: wan_generate_video.py, training/parser_common.py and cache_*.py of kohya-ss/musubi-tuner 30c658c;
generate.py of Wan-Video/Wan2.2 42bf4cf.
How to add an option: a line `names words here | note` in a table below; options that belong together have no `here` and
a function in `foreign_line`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lapwan.settings.aliases import OTHER_TRAINERS


@dataclass(frozen=True)
class ForeignOption:
    """An option of another program.

    Args:
        words: how many words follow it: a number, or `*` for any.
        here: lapwan's options, `{}` for the value; empty: none.
        note: why there is none, or what differs.
    """

    words: str
    here: str = ""
    note: str = ""


def _table(text: str) -> dict[str, ForeignOption]:
    table = {}
    for line in text.strip().splitlines():
        option, _, note = line.partition("|")
        names, words, *here = option.split()
        for name in names.split(","):
            table[f"--{name}"] = ForeignOption(words, " ".join(here), note.strip())
    return table


_MEMORY = "chosen by --memory: auto keeps on the device what fits and streams the rest; --memory GIB is a limit"
_ATTENTION = "PyTorch picks the fastest attention kernel"

_GENERATE = _table(f"""
task 1 | read from the model
clip 1 | Wan2.2 has no image encoder
ckpt-dir,dit,dit-high-noise,vae,t5,guidance-scale-high-noise,guidance-scale-2,save-path,save-file,height,width 1
sample-solver,timestep-boundary,base-seed 1
lora-weight,lora-multiplier,lora-weight-high-noise,lora-multiplier-high-noise *
sample-guide-scale 1 --guidance {{}}
infer-steps,sample-steps,num-inference-steps 1 --steps {{}}
video-length,frame-num 1 --num-frames {{}}
sample-shift 1 --flow-shift {{}}
end-image-path 1 --last-image {{}}
video-path 1 --video {{}} | --start-sigma says how much of it is kept
from-file 1 --prompts {{}} | its lines must become JSON: {{"prompt": "...", "size": "480x832", "seed": 1}}
fp8,fp8-scaled,fp8-fast 0 --dtype fp8
fp8-t5 0 --text-dtype fp8
blocks-to-swap,offload-model 1 | {_MEMORY}
offload-inactive-dit,lazy-loading,t5-cpu,use-pinned-memory-for-block-swap,t5-fsdp,dit-fsdp 0 | {_MEMORY}
disable-numpy-memmap 0 | files are read without numpy's memory map
vae-cache-cpu 0 | the VAE decodes frame by frame
vae-dtype 1 | the VAE computes in fp32
attn-mode 1 | {_ATTENTION}
compile-args * --compile on | blocks are compiled one by one, with static shapes
lycoris 0 | the layout of a LoRA file is read from its keys
include-patterns,exclude-patterns * | a LoRA is applied as a whole
save-merged-model 1 | lapwan merge writes merged weights
fps 1 | a video has the model's frame rate
trim-tail-frames 1 | no frames are cut; choose --num-frames
cpu-noise 0 | the noise is always drawn on the CPU
force-v2-1-time-embedding 0 | the time embedding is one row a sample, which gives the same output
control-path 1 | Wan2.1 Fun-Control models are not supported
one-frame-inference 1 --num-frames 1
control-image-path,control-image-mask-path * | one-frame control images are not supported
cfg-skip-mode,cfg-apply-ratio 1 | --guidance-interval LOW,HIGH applies guidance only between two sigmas
slg-layers,slg-scale,slg-start,slg-end,slg-mode 1 | skip-layer guidance is not supported
output-type 1 | the ending of -o decides: .mp4, .gif, .webp, .png, .safetensors (latents)
latent-path * | latents of another program are not decoded
no-metadata 0 | a video always holds its settings
ulysses-size 1 | several GPUs: torchrun --nproc-per-node N -m lapwan generate ...
convert-model-dtype 0 --dtype bf16
use-prompt-extend 0 | prompts are taken as they are
prompt-extend-method,prompt-extend-model,prompt-extend-target-lang 1 | prompts are taken as they are
audio,num-clip,pose-video,infer-frames 1 | Wan2.2-S2V is not supported
src-root-path 1 | Wan2.2-Animate is not supported
""")

_FOLDER = "training reads a model folder in diffusers layout"
_CACHED = "only lapwan cache needs it, from the model folder"
_STEPS = "counted in steps: --save-every N"
_PREVIEW = "previews: --set preview.every=N and --set 'preview.prompts=[\"...\"]'"
_CACHE_READ = "clips are read from the cache, in this process"
_SAVED = "saved with every checkpoint"
_TRACKER = "TensorBoard files and metrics.jsonl are in the run folder; --tracker wandb or trackio sends them there too"

_TRAIN = _table(f"""
task,timestep-boundary 1 | read from the model
clip 1 | Wan2.2 has no image encoder
dit,dit-high-noise 1 | {_FOLDER}
vae,t5,vae-dtype 1 | {_CACHED}
fp8-t5,vae-cache-cpu 0 | {_CACHED}
dataset-config,network-module,network-dim,max-train-steps,mixed-precision,optimizer-type,lr-scheduler 1
lr-warmup-steps,timestep-sampling,discrete-flow-shift,sigmoid-scale,weighting-scheme,logit-mean,logit-std 1
network-alpha 1 --set alpha={{}}
network-args,optimizer-args *
network-weights 1 --set init_lora.high={{}} --set init_lora.low={{}}
network-dropout 1 --set dropout.neuron={{}}
dim-from-weights 0 | ranks are those of init_lora's file
scale-weight-norms 1 --set max_norm={{}}
base-weights * | merge them first: lapwan merge --model MODEL --lora high=FILE --lora low=FILE -o OUT
base-weights-multiplier * | FILE:STRENGTH of lapwan merge
learning-rate 1 --lr {{}}
max-train-epochs,num-train-epochs 1 --epochs {{}}
train-batch-size 1 --batch-size {{}}
gradient-accumulation-steps 1 --set accumulate={{}}
gradient-checkpointing 0 | chosen by memory; --set activation_checkpointing=block forces it
gradient-checkpointing-cpu-offload 0 | activations stay on the device; {_MEMORY}
max-grad-norm 1 --set max_grad_norm={{}}
save-precision 1 | LoRAs are saved in fp32; lapwan merge --dtype converts them
fp8-base,fp8-scaled 0 --dtype fp8
full-bf16 0 --dtype bf16
blocks-to-swap,block-swap-ring-size 1 | {_MEMORY}
offload-inactive-dit,use-pinned-memory-for-block-swap,block-swap-h2d-only 0 | {_MEMORY}
disable-numpy-memmap 0 | files are read without numpy's memory map
force-v2-1-time-embedding 0 | the time embedding is one row a sample, which gives the same output
lr-scheduler-num-cycles 1 --set schedule.cycles={{}}
lr-scheduler-power 1 --set schedule.power={{}}
lr-decay-steps 1 | the schedule ends with the run
mode-scale 1 | mode weighting is not supported
min-timestep,max-timestep 1 | each noise expert trains its own part of sigma, divided at the model's boundary
preserve-distribution-shape 0 | always so; --set sigma.band=squeeze for the other
num-timestep-buckets 1 --set sigma.strata={{}}
show-timesteps 1 | the log shows the losses by sigma
guidance-scale 1 | training has no guidance
output-dir 1 --output {{}}
output-name 1 --name {{}}
save-every-n-steps 1 --save-every {{}}
save-every-n-epochs 1 | {_STEPS}
save-last-n-steps,save-last-n-epochs 1 | a number of checkpoints: --set keep_last=N
save-last-n-steps-state,save-last-n-epochs-state 1 | a number of checkpoints: --set keep_last=N
save-state,save-state-on-train-end 0 | {_SAVED}
sample-prompts,sample-every-n-steps,sample-every-n-epochs 1 | {_PREVIEW}
sample-at-first 0 | {_PREVIEW}
logging-dir,log-with,log-prefix,log-tracker-name,wandb-run-name,wandb-api-key 1 | {_TRACKER}
log-config 0 | {_TRACKER}
max-data-loader-n-workers 1 | {_CACHE_READ}
persistent-data-loader-workers 0 | {_CACHE_READ}
sdpa,flash-attn,flash3,sage-attn,xformers,split-attn 0 | {_ATTENTION}
compile 0 --set compile=on
no-metadata 0 | a LoRA file always holds what it was trained with
training-comment 1 | not kept
config-file 1 | lapwan's own settings: --config FILE, such as examples/stage1.toml
""")

_CACHE = _table("""
dataset-config 1 --dataset {}
vae,t5 1 | read from the model folder
clip 1 | Wan2.2 has no image encoder
fp8-t5 0 | the text encoder runs as it is stored
vae-cache-cpu 0 | the VAE encodes in parts
skip-existing 0 | finished files are always kept
keep-cache 0 | files of other clips are kept unless --prune
num-workers 1 --workers {}
one-frame 0 --num-frames 1
""")

_MERGE = _table("""
lora-weight,lora-multiplier *
save-merged-model 1 -o {}
""")

_OPTIMIZERS = {name: f"--set optimizer.type={name}" for name in ("adamw", "adamw8bit", "automagic", "prodigy")}

# Option -> its value in lower case -> lapwan's options.
VALUES: Mapping[str, Mapping[str, str]] = {
    "--sample-solver": {"unipc": "--sampler unipc", "dpm++": "--sampler dpmpp", "vanilla": "--sampler euler"},
    "--optimizer-type": _OPTIMIZERS,
    "--optimizer": _OPTIMIZERS,
    "--mixed-precision": {"bf16": "--dtype bf16", "no": "--dtype fp32"},
    "--lr-scheduler": {name: f"--set schedule.name={name}" for name in (
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")},
}

# Word to be replaced in a printed command line -> what it is.
PLACEHOLDERS: Mapping[str, str] = {
    "TOKENIZER_FOLDER": "the folder of umT5's tokenizer (google/umt5-xxl)",
    "HIGH_NOISE_FILE": "the high-noise transformer", "LOW_NOISE_FILE": "the low-noise transformer",
    "VAE_FILE": "Wan2.1_VAE.pth", "T5_FILE": "models_t5_umt5-xxl-enc-bf16.pth", "TRANSFORMER_FILE": "the transformer",
    "MODEL_FOLDER": "a model folder in diffusers layout",
}

# Settings without an option of their own that a plain value fits.
_KEYS = ("rank", "alpha", "accumulate", "max_norm", "max_grad_norm", "keep_last", "caption_dropout", "turn", "targets")
_OPTIONS = ("lr", "steps", "epochs", "batch_size", "save_every", "name", "output", "dtype", "model")


def _trained() -> dict[str, ForeignOption]:
    """The options of training, with settings and the names of `OTHER_TRAINERS` that a user may type as options."""
    table = {**_TRAIN, "--optimizer": ForeignOption("1")}
    for name, key in {**{key: key for key in _KEYS}, **OTHER_TRAINERS}.items():
        here = f"--set {key}={{}}" if key in _KEYS else f"--{key.replace('_', '-')} {{}}" if key in _OPTIONS else ""
        note = "" if here else f"the setting {key}, in a file for --config or with --set"
        table.setdefault("--" + name.replace("_", "-"), ForeignOption("1", here, note))
    return table


FOREIGN: Mapping[str, Mapping[str, ForeignOption]] = {
    "generate": _GENERATE, "train-lora": _trained(), "train-moe": _trained(), "cache": _CACHE, "merge": _MERGE,
}


def option_name(word: str) -> str:
    """`--lora_weight=FILE` -> `--lora-weight`; empty if it is no long option."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else ""


def has_foreign(command: str, words: Sequence[str]) -> bool:
    """Whether a line holds an option of another program."""
    table = FOREIGN.get(command, {})
    return any(option_name(word) in table for word in words[: words.index("--") if "--" in words else len(words)])
