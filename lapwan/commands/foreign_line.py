"""The answer to a command line with options of other programs: what each is here, and the whole line for lapwan.

`foreign_options` has the options that stand alone; here are those that belong together (weights and multipliers, the
files of a model, the distribution of sigma).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lapwan.commands.foreign_options import FOREIGN, PLACEHOLDERS, VALUES, option_name
from lapwan.commands.options import OptionWords, option_words
from lapwan.commands.table import COMMANDS
from lapwan.errors import nearest


@dataclass(frozen=True)
class Answer:
    """Options as typed, lapwan's options for them, and a note."""

    typed: str
    here: tuple[str, ...] = ()
    note: str = ""


@dataclass
class ForeignLine:
    """A command line: lapwan's options with their words, foreign ones by name, and what is neither."""

    ours: list[tuple[str, ...]] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[Answer] = field(default_factory=list)

    def value(self, name: str, default: str = "") -> str:
        """The last word of a foreign option; `default` if it is absent."""
        return (self.given.get(name) or [default])[-1]

    def has(self, name: str) -> bool:
        """Whether an option of lapwan is given."""
        return any(words[0] == name for words in self.ours)

    @property
    def two_transformers(self) -> bool:
        """Whether the line is about Wan2.2 A14B, with two noise experts."""
        return "--dit-high-noise" in self.given or "a14b" in self.value("--task").lower()


_HUB = "Wan-AI/Wan2.2-{}-A14B-Diffusers"


def _set(**keys: str) -> tuple[str, ...]:
    return tuple(word for key, value in keys.items() for word in ("--set", f"{key.replace('__', '.')}={value}"))


def _model_files(line: ForeignLine) -> list[Answer]:
    """Wan's checkpoint folder, or musubi-tuner's files, as [model]."""
    names = [name for name in ("--ckpt-dir", "--dit", "--dit-high-noise", "--vae", "--t5") if name in line.given]
    if not names or line.has("--model"):
        return [Answer(name, note="--model is given") for name in names]
    typed = {name: f"{name} {line.value(name)}" for name in names}
    if "--ckpt-dir" in names:
        folder, single = line.value("--ckpt-dir").rstrip("/"), "5b" in line.value("--task").lower()
        transformers = {"model__transformer": folder} if single else {
            "model__high": f"{folder}/high_noise_model", "model__low": f"{folder}/low_noise_model"}
        answer = Answer(typed.pop("--ckpt-dir"), _set(
            **transformers, model__vae=f"{folder}/Wan2.{2 if single else 1}_VAE.pth",
            model__text_encoder=f"{folder}/models_t5_umt5-xxl-enc-bf16.pth",
            model__tokenizer=f"{folder}/google/umt5-xxl"))
        return [answer, *(Answer(words, note="it is in --ckpt_dir") for words in typed.values())]
    two = line.two_transformers
    keys = {"--dit-high-noise": "model__high", "--dit": "model__low" if two else "model__transformer",
            "--vae": "model__vae", "--t5": "model__text_encoder"}
    lacking = {"--dit": "LOW_NOISE_FILE" if two else "TRANSFORMER_FILE", "--vae": "VAE_FILE", "--t5": "T5_FILE"} | (
        {"--dit-high-noise": "HIGH_NOISE_FILE"} if two else {})
    absent = {keys[name]: word for name, word in lacking.items() if name not in names}
    return [*(Answer(typed[name], _set(**{keys[name]: line.value(name)})) for name in names),
            Answer("(also needed)", _set(**absent, model__tokenizer="TOKENIZER_FOLDER"))]


def _model_folder(line: ForeignLine) -> list[Answer]:
    """The `--model` of training and caching, which the files' names do not tell."""
    names = {"--dit", "--dit-high-noise", "--vae", "--t5"} & set(line.given)
    if not names or line.has("--model"):
        return []
    task = line.value("--task").lower()
    two = line.two_transformers
    model = _HUB.format("I2V" if task.startswith("i2v") else "T2V") if two else "MODEL_FOLDER"
    return [Answer("(also needed)", ("--model", model), "a folder, or the hub id of a downloaded model")]


def _loras(line: ForeignLine) -> list[Answer]:
    """Weights and multipliers as `FILE:STRENGTH`; musubi-tuner's first pair is the low noise expert's of two."""
    answers = []
    for end, role in (("", "low=" if line.two_transformers else ""), ("-high-noise", "high=")):
        files = line.given.get(f"--lora-weight{end}")
        strengths = line.given.get(f"--lora-multiplier{end}", ())
        words: list[str] = []
        for index, file in enumerate(files or ()):
            strength = strengths[index] if index < len(strengths) else "1"
            words += ["--lora", f"{role}{file}" + ("" if _number(strength) == 1.0 else f":{strength}")]
        typed = [f"--{kind}{end} {' '.join(given)}" for kind, given in (
            ("lora-weight", files), ("lora-multiplier", strengths)) if given]
        if typed:
            answers.append(Answer(" ".join(typed), tuple(words), "" if words else "no --lora-weight for it"))
    return answers


def _number(text: str, default: float | None = None) -> float | None:
    """The number in a text; `default` if it is none."""
    try:
        return float(text)
    except ValueError:
        return default


def _guidance(line: ForeignLine) -> list[Answer]:
    """musubi-tuner's --guidance_scale is the low noise expert's beside one for the high; diffusers' is the high's."""
    high, second = line.value("--guidance-scale-high-noise"), line.value("--guidance-scale-2")
    plain = line.value("--guidance-scale")
    if not high and not second:
        return []
    low, high = (plain, high) if high else (second, plain)
    sides = ",".join(f"{side}={value}" for side, value in (("high", high), ("low", low)) if value)
    typed = [f"{name} {line.value(name)}" for name in (
        "--guidance-scale", "--guidance-scale-high-noise", "--guidance-scale-2") if name in line.given]
    return [Answer(" ".join(typed), ("--guidance", sides))]


def _output(line: ForeignLine) -> list[Answer]:
    answers = []
    for name in ("--save-path", "--save-file"):
        if name in line.given:
            path = line.value(name)
            file = "." in path.rpartition("/")[2]
            answers.append(Answer(f"{name} {path}", ("-o", path if file else f"{path.rstrip('/')}/video.mp4"),
                                  "" if file else "a file; a folder takes PNG frames"))
    return answers


def _height_width(line: ForeignLine) -> list[Answer]:
    height, width = line.value("--height"), line.value("--width")
    if not height and not width:
        return []
    typed = " ".join(f"{name} {line.value(name)}" for name in ("--height", "--width") if name in line.given)
    return [Answer(typed, ("--size", f"{height}x{width}") if height and width else (),
                   "" if height and width else "both are needed: --size HEIGHTxWIDTH")]


def _boundary(line: ForeignLine) -> list[Answer]:
    text = line.value("--timestep-boundary")
    number = _number(text)
    if not text:
        return []
    sigma = text if number is None or number <= 1.0 else f"{number / 1000:g}"
    return [Answer(f"--timestep-boundary {text}", ("--boundary", sigma))]


def _seed(line: ForeignLine) -> list[Answer]:
    text = line.value("--base-seed")
    if not text:
        return []
    random = text.startswith("-")
    return [Answer(f"--base-seed {text}", () if random else ("--seed", text),
                   "no random seed; --seed is 42 unless given" if random else "")]


def _data(line: ForeignLine) -> list[Answer]:
    if "--dataset-config" not in line.given:
        return []
    here = () if line.has("--cache") else ("--cache", "cache")
    return [Answer(f"--dataset-config {line.value('--dataset-config')}", here,
                   "made first by lapwan cache, below; musubi-tuner's own cache folder is read too")]


def _network(line: ForeignLine) -> list[Answer]:
    """musubi-tuner adapts every linear layer of all blocks, at alpha 1 unless it is given."""
    answers = []
    if module := line.value("--network-module"):
        known = module.rpartition(".")[2] in ("lora", "lora_wan")
        answers.append(Answer(f"--network-module {module}", note="a LoRA is what is trained" if known else
                              "only LoRA is trained"))
    if rank := line.value("--network-dim"):
        answers.append(Answer(f"--network-dim {rank}", _set(targets="all", rank=rank),
                              "all blocks, as in musubi-tuner; without targets=all the last 8, which is faster"))
        if "--network-alpha" not in line.given:
            answers.append(Answer("(--network-alpha)", _set(alpha="1"), "musubi-tuner's default; here it is the rank"))
    keys = {"rank_dropout": "dropout.rank", "module_dropout": "dropout.module",
            "loraplus_lr_ratio": "optimizer.lora_plus"}
    for pair in line.given.get("--network-args", ()):
        name, _, value = pair.partition("=")
        note = "patterns: --set 'targets.patterns={\"blocks.*\" = 16}'" if "patterns" in name else "no such setting"
        answers.append(Answer(f"--network-args {pair}", ("--set", f"{keys[name]}={value}") if name in keys else (),
                              "" if name in keys else note))
    return answers


def _optimizer(line: ForeignLine) -> list[Answer]:
    answers = []
    for pair in line.given.get("--optimizer-args", ()):
        name, _, value = pair.partition("=")
        known = name in ("weight_decay", "betas", "eps", "d0", "d_coef")
        text = f"[{value.strip('()[]')}]" if name == "betas" else value
        answers.append(Answer(f"--optimizer-args {pair}", ("--set", f"optimizer.{name}={text}") if known else (),
                              "" if known else "no such setting"))
    if warmup := line.value("--lr-warmup-steps"):
        number, steps = _number(warmup, 0.0) or 0.0, _number(line.value("--max-train-steps"))
        share = 0 < number < 1
        count = str(round(number * steps)) if share and steps else "" if share else warmup
        answers.append(Answer(f"--lr-warmup-steps {warmup}", _set(schedule__warmup_steps=count) if count else (),
                              "" if count else "a number of steps: --set schedule.warmup_steps=N"))
    if steps_text := line.value("--max-train-steps"):
        epochs = "--max-train-epochs" in line.given or line.has("--epochs")
        answers.append(Answer(f"--max-train-steps {steps_text}", () if epochs else ("--steps", steps_text),
                              "epochs are given" if epochs else "of each noise expert"))
    return answers


def _sigma(line: ForeignLine) -> list[Answer]:
    """The distribution of sigma. musubi-tuner's `shift` is its `sigmoid` with a shift."""
    names = ("--timestep-sampling", "--discrete-flow-shift", "--sigmoid-scale", "--weighting-scheme", "--logit-mean",
             "--logit-std")
    given = {name: line.value(name) for name in names if name in line.given}
    sampling, scheme = given.get("--timestep-sampling", "sigma"), given.get("--weighting-scheme", "none")
    keys: dict[str, tuple[str, ...]] = {}
    if sampling in ("uniform", "sigmoid", "shift"):
        sampler = "uniform" if sampling == "uniform" else "sigmoid"
        keys["--timestep-sampling"] = _set(sigma__sampler=sampler)
        if sampler == "sigmoid":
            keys["--sigmoid-scale"] = _set(sigma__scale=given.get("--sigmoid-scale", ""))
        if sampling == "shift":
            keys["--discrete-flow-shift"] = _set(sigma__shift=given.get("--discrete-flow-shift", ""))
    elif sampling == "sigma":
        keys["--discrete-flow-shift"] = _set(sigma__shift=given.get("--discrete-flow-shift", ""))
        if scheme == "logit_normal":
            keys["--weighting-scheme"] = _set(sigma__sampler="logit_normal")
            keys["--logit-mean"] = _set(sigma__mean=given.get("--logit-mean", ""))
            keys["--logit-std"] = _set(sigma__std=given.get("--logit-std", ""))
    if scheme == "cosmap":
        keys["--weighting-scheme"] = _set(weighting__kind="cosmap")
    default = {"--timestep-sampling": "sigma", "--weighting-scheme": "none"}
    return [Answer(f"{name} {value}", keys.get(name, ()), "" if name in keys else "the default here"
                   if default.get(name) == value else "no effect beside the others, or not supported")
            for name, value in given.items()]


_JOINT: Mapping[str, Sequence[Callable[[ForeignLine], list[Answer]]]] = {
    "generate": (_model_files, _loras, _guidance, _output, _height_width, _boundary, _seed),
    "train-lora": (_model_folder, _data, _network, _optimizer, _sigma),
    "train-moe": (_model_folder, _data, _network, _optimizer, _sigma),
    "cache": (_model_folder,),
    "merge": (_loras,),
}


def answer(command: str, words: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """What each foreign option is here, and the whole line under lapwan's names.

    Args:
        aliases: older option -> today's.
    """
    options = option_words(next(row for row in COMMANDS if row.name == command))
    line = _split(command, words, aliases, options)
    order = {name: index for index, name in enumerate(line.given)}
    answers = sorted(_answers(command, line), key=lambda item: order.get(item.typed.split()[0], len(order)))
    answers += line.unknown
    groups = [*line.ours, *(group for item in answers for group in _grouped(item.here))]
    typed = shlex.join(["lapwan", command, *_joined(groups, options)])
    width = min(36, max(len(item.typed) for item in answers))
    rows = [f"  {item.typed:<{width}}  " + "; ".join(filter(None, (shlex.join(item.here), item.note)))
            for item in answers]
    lines = ["these options are of other programs; here they are:", *rows, "", "The whole command:"]
    if "--dataset-config" in line.given and command != "cache":
        model = next((group[1] for group in groups if group[0] == "--model"), "MODEL_FOLDER")
        lines.append(shlex.join(["lapwan", "cache", "--dataset", line.value("--dataset-config"), "--model", model,
                                 "-o", "cache"]))
    lines.append(typed)
    lines += [f"Replace {word}: {what}." for word, what in PLACEHOLDERS.items() if any(word in text for text in lines)]
    return lines


def _split(
    command: str, words: Sequence[str], aliases: Mapping[str, str], options: Mapping[str, OptionWords]
) -> ForeignLine:
    line, rest, table = ForeignLine(), list(words), FOREIGN[command]
    pair = any(option_name(word) in ("--guidance-scale-high-noise", "--guidance-scale-2") for word in words)
    while rest:
        word = rest.pop(0)
        typed, equals, value = word.partition("=")
        typed = option_name(word) or typed
        name = aliases.get(typed, typed)
        if not word.startswith("-"):
            line.ours.append((word,))
        elif typed in table or (pair and typed == "--guidance-scale"):
            count = table[typed].words if typed in table else "1"
            line.given.setdefault(typed, [])
            line.given[typed] += [value] if equals else _take(rest, count)
        elif typed == "--video-size" and not equals:
            line.ours.append((name, "x".join(_take(rest, "2"))))
        elif name in options and options[name].value:
            given = [value] if equals else _take(rest, "1")
            if name == "--size" and "*" in "".join(given):  # Wan's WIDTH*HEIGHT
                given = ["x".join(reversed(given[0].split("*")))]
            line.ours.append((name, *(given or (["on"] if name == "--compile" else []))))  # a flag of musubi-tuner
        elif name in options:
            line.ours.append((name,))
            if name == "--resume" and (state := _take(rest, "1")):
                note = "continues from the newest checkpoint of the run folder"
                line.unknown.append(Answer(f"--resume {state[0]}", ("--resume",), note))
        else:
            line.unknown.append(Answer(" ".join([word, *_take(rest, "*")]), note="no such option" + nearest(
                name, [option for option in options if option.startswith("--")])))
    return line


def _take(rest: list[str], count: str) -> list[str]:
    """Remove the words of an option from the rest of the line: up to the next option."""
    taken: list[str] = []
    while rest and not _is_option(rest[0]) and (count == "*" or len(taken) < int(count)):
        taken.append(rest.pop(0))
    return taken


def _is_option(word: str) -> bool:
    return word.startswith("-") and _number(word) is None


def _answers(command: str, line: ForeignLine) -> Iterator[Answer]:
    joint = [item for function in _JOINT[command] for item in function(line)]
    answered = {word for item in joint for word in item.typed.split() if word.startswith("--")}
    yield from joint
    for name, words in line.given.items():
        if name in answered:
            continue
        option, text = FOREIGN[command][name], " ".join(words)
        typed = f"{name} {text}".rstrip()
        if (known := VALUES.get(name)) is not None:
            here = known.get(text.lower(), "")
            yield Answer(typed, tuple(here.split()), "" if here else f"not supported; known: {', '.join(known)}")
        else:
            yield Answer(typed, tuple(word.replace("{}", text) for word in option.here.split()),
                         option.note or ("" if option.here else "no counterpart"))


def _grouped(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Options with their values: a word that starts with a dash opens a group."""
    group: list[str] = []
    for word in words:
        if _is_option(word) and group:
            yield tuple(group)
            group = []
        group.append(word)
    if group:
        yield tuple(group)


def _joined(groups: Sequence[tuple[str, ...]], options: Mapping[str, OptionWords]) -> list[str]:
    """The groups as one line; of an option that is given twice the last, unless it may be repeated."""
    last: dict[tuple[str, ...], tuple[str, ...]] = {}
    for group in groups:
        option = options.get(group[0])
        if option is None:
            key = group
        elif group[0] == "--set":
            key = (group[0], group[1].partition("=")[0])
        else:
            key = group if option.repeatable else (option.name,)
        last[key] = group
    return [word for group in last.values() for word in group]
