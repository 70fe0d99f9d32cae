"""Options of other programs: one answer for all of a line, with the whole line for lapwan."""

from __future__ import annotations

import shlex

import pytest
from command_line import run_lapwan

from lapwan.cli_aliases import _ALIASES, rewrite
from lapwan.commands.foreign_options import FOREIGN
from lapwan.commands.options import click_command, option_words
from lapwan.commands.table import COMMANDS
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.base import flag_fields
from lapwan.settings.load import load

ROWS = {row.name: row for row in COMMANDS}


def answer(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        rewrite(shlex.split(text))
    return str(caught.value).splitlines()


def whole_command(text: str) -> list[str]:
    lines = answer(text)
    return shlex.split(lines[lines.index("The whole command:") + 1 :][-1 - sum("Replace " in s for s in lines)])[1:]


def settings_of(arguments: list[str]):
    """The settings that a line of lapwan gives, by the parser and the loader that a run uses."""
    row = ROWS[arguments[0]]
    given = click_command(row).make_context(row.name, rewrite(arguments)[1:]).params
    keys = {field.key.replace(".", "__"): field.key for field in flag_fields(row.settings_model())}
    options = {keys[name]: value for name, value in given.items() if name in keys and value not in (None, (), [])}
    return load(row.settings_model(), None, given["sets"], options, environment={})


def test_a_line_of_musubi_tuners_generate_is_answered_at_once(tmp_path):
    done = run_lapwan(*shlex.split(
        "generate --task t2v-A14B --dit X --vae Y --t5 Z --clip C --save_path 'my out.mp4' --infer_steps 40 "
        "--lora_weight a.safetensors --lora_multiplier 0.8 --offload_model True --sample_steps 40 "
        "--blocks_to_swap 20 --prompt 'a b'"), cwd=tmp_path)
    assert done.code == 2 and not done.out and not list(tmp_path.iterdir())
    for name in ("--task", "--dit", "--vae", "--t5", "--clip", "--save-path", "--infer-steps", "--lora-weight",
                 "--offload-model", "--sample-steps", "--blocks-to-swap"):
        assert f"  {name} " in done.err
    command = next(line for line in done.err.splitlines() if line.startswith("lapwan generate"))
    settings = settings_of(shlex.split(command)[1:])
    assert settings.prompt == "a b" and settings.steps == 40 and str(settings.output) == "my out.mp4"
    assert [str(lora) for lora in settings.lora] == ["low=a.safetensors:0.8"]
    assert (str(settings.model.low), str(settings.model.vae), str(settings.model.text_encoder)) == ("X", "Y", "Z")
    assert "Replace TOKENIZER_FOLDER" in done.err


def test_a_line_of_wans_generate():
    command = whole_command(
        "generate --task t2v-A14B --ckpt_dir ./Wan --size 832*480 --frame_num 17 --base_seed 7 --sample_solver dpm++ "
        "--sample_shift 12 --sample_guide_scale 4 --save_file o.mp4 --prompt x")
    settings = settings_of(command)
    assert str(settings.model.high) == "Wan/high_noise_model" and str(settings.model.vae) == "Wan/Wan2.1_VAE.pth"
    assert (settings.num_frames, settings.seed, settings.sampler, settings.flow_shift) == (17, 7, "dpmpp", 12.0)
    assert settings.guidance == 4.0 and settings.size == (480, 832)
    assert whole_command("generate --task ti2v-5B --ckpt_dir W")[1:5] == [
        "--set", "model.transformer=W", "--set", "model.vae=W/Wan2.2_VAE.pth"]


def test_guidance_and_loras_of_both_noise_experts():
    settings = settings_of(whole_command(
        "generate --model M --dit l --dit_high_noise h --lora_weight a b --lora_multiplier 1.0 0.5 "
        "--lora_weight_high_noise c --guidance_scale 3 --guidance_scale_high_noise 4 --fp8 --fp8_scaled --fp8_t5 "
        "--timestep_boundary 875 --video_size 480 832"))
    assert [str(lora) for lora in settings.lora] == ["low=a", "low=b:0.5", "high=c"]
    assert settings.guidance == {NoiseExpert.HIGH: 4.0, NoiseExpert.LOW: 3.0} and settings.model == "M"
    assert (settings.dtype, settings.text_dtype, settings.boundary, settings.size) == ("fp8", "fp8", 0.875, (480, 832))


def test_a_line_of_musubi_tuners_training():
    text = ("train-lora --task t2v-A14B --dit l.safetensors --dit_high_noise h.safetensors --dataset_config d.toml "
            "--network_module networks.lora_wan --network_dim 16 --learning_rate 2e-4 --max_train_epochs 4 "
            "--max_train_steps 100 --optimizer_type AdamW8bit --optimizer_args weight_decay=0.1 betas=0.9,0.99 "
            "--timestep_sampling shift --discrete_flow_shift 5 --mixed_precision bf16 --fp8_base --output_dir out "
            "--output_name my --sdpa --seed 3 --accumulate 4 --network_args loraplus_lr_ratio=4 --lr_scheduler cosine")
    settings = settings_of(whole_command(text))
    assert settings.model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers" and str(settings.data.cache) == "cache"
    assert (settings.targets.last_blocks, settings.targets.ffn_out, settings.alpha) == ("all", 16, 1.0)
    assert (settings.epochs, settings.steps, settings.accumulate, settings.seed) == (4.0, None, 4, 3)
    optimizer = settings.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas) == ("adamw8bit", 2e-4, (0.9, 0.99))
    assert (settings.sigma.sampler, settings.sigma.shift, settings.schedule.name) == ("sigmoid", 5.0, "cosine")
    assert (settings.dtype, settings.name, settings.optimizer.lora_plus) == ("fp8", "my", 4.0)
    assert answer(text)[-2] == "lapwan cache --dataset d.toml --model Wan-AI/Wan2.2-T2V-A14B-Diffusers -o cache"


def test_what_is_no_option_anywhere_is_listed_too():
    lines = answer("generate --infer_steps 4 --promt x")
    assert any(line.startswith("  --promt x") and "did you mean '--prompt'?" in line for line in lines)
    assert lines[-1] == "lapwan generate --steps 4"


@pytest.mark.parametrize("command", FOREIGN)
def test_no_foreign_name_hides_an_option_of_ours(command):
    ours = {*option_words(ROWS[command]), *(_ALIASES.get(command, {}))}
    assert not set(FOREIGN[command]) & ours


@pytest.mark.parametrize(("command", "name"), [(c, n) for c, table in FOREIGN.items() for n in table])
def test_every_foreign_option_gives_a_line_that_parses(command, name):
    words = {"0": "", "2": "480 832", "*": "9", "1": "9"}[FOREIGN[command][name].words]
    given = whole_command(f"{command} {name} {words}")
    row = ROWS[command]
    params = click_command(row).make_context(row.name, rewrite(given)[1:]).params
    option = FOREIGN[command][name]
    assert option.here or option.note or command in ("generate", "train-lora", "train-moe", "merge")
    try:
        load(row.settings_model(), None, params["sets"], {}, environment={})
    except UserError as error:
        assert "unknown key" not in str(error)


@pytest.mark.parametrize(("line", "here"), [
    ("generate --sample_solver vanilla", "--sampler euler"),
    ("generate --sample_solver rk", "not supported; known: unipc, dpm++, vanilla"),
    ("generate --save_path out", "-o out/video.mp4"), ("generate --base_seed -1", "no random seed"),
    ("generate --height 480 --width 832", "--size 480x832"), ("generate --height 480", "both are needed"),
    ("generate --lora_multiplier 0.5", "no --lora-weight for it"), ("train-lora --optimizer came", "not supported"),
    ("train-lora --lr_warmup_steps 0.1 --max_train_steps 200", "schedule.warmup_steps=20"),
    ("train-lora --weighting_scheme logit_normal --logit_mean 0.5", "--set sigma.sampler=logit_normal"),
    ("train-lora --timestep_sampling qwen_shift", "not supported"), ("train-lora --linear 32", "--set rank=32"),
    ("train-lora --network_dim 8 --resume state", "continues from the newest checkpoint"),
    ("train-moe --network_args include_patterns=x", "targets.patterns"),
    ("merge --lora_weight a --lora_multiplier 2", "a:2"),
    ("generate --fps 8 --compile --preview", "--compile on --preview"),
    ("generate --model M --vae V", "--model is given"), ("cache --dataset_config d.toml --t5 T", "--dataset d.toml"),
])
def test_values_with_a_meaning_of_their_own(line, here):
    assert here in "\n".join(answer(line))
