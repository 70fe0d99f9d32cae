"""The merge command: LoRAs into a model folder, one transformer or one LoRA; a mixture at a given mix into LoRAs.

The arithmetic is elsewhere: LoRA into weights in `lapwan.lora.merge`, LoRA + LoRA in `lapwan.lora.combine`, mixture to
LoRA in `lapwan.moe.to_lora`. `--extract` is in `lapwan.models.extract`, `--average` in `lapwan.models.average`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.rewrite import Advance, check_stored
from lapwan.console import count_text, detail, log, progress, warn
from lapwan.data.labels import resolve_hint
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.files import atomic_folder, check_targets, claim_output, is_temporary, leaves, nearest_folder
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.assign import LoraRequest, assign, assign_to_transformer, group_by_noise_expert, report, warn_mismatch
from lapwan.lora.combine import combine, outline, widest_dtype
from lapwan.lora.formats import check_layout, write_both, write_lora
from lapwan.lora.merge import ComponentPlan, LoraToMerge, plan_component, write_component
from lapwan.lora.noise_expert import NOISE_EXPERT_KEY, noise_expert_from_file_name
from lapwan.lora.read_back import reader
from lapwan.lora.state import AdapterState
from lapwan.models.configs import read_object
from lapwan.models.resolve import resolve
from lapwan.models.spec import OTHER_WEIGHTS, weight_files
from lapwan.moe.mixture import Mixture
from lapwan.moe.mixture_file import read_mixture
from lapwan.moe.to_lora import gate_range, inference_sigmas, mixture_to_lora
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.merge import MergeSettings


def merge(settings: MergeSettings, options: RunOptions) -> Iterator[str]:
    """Plan, check and write; yields one line per result, while it works.

    Raises:
        UserError: inputs that do not fit together, before anything is written.
    """
    if settings.model is not None:
        yield from _into_model(settings, settings.model, options)
    elif settings.dit is not None:
        yield from _into_transformer(settings, settings.dit, options)
    elif settings.moe is not None:
        yield from _from_mixture(settings, settings.moe, options)
    else:
        yield from _into_lora(settings, options)


def _requests(settings: MergeSettings) -> list[LoraRequest]:
    return [LoraRequest(lora.noise_expert, lora.path, lora.strength * settings.multiplier, lora.only or ())
            for lora in settings.lora]


def _to_merge(loras: Sequence[tuple[AdapterFile, float]]) -> list[LoraToMerge]:
    return [LoraToMerge(lora, strength, lora.finite_fingerprint()) for lora, strength in loras]


def _into_model(settings: MergeSettings, model: str, options: RunOptions) -> Iterator[str]:
    spec = resolve(model)
    claim_folder(settings.output, spec.path, options)
    assigned = assign(_requests(settings), spec.noise_experts, settings.key_rule, spec.one_transformer)
    for noise_expert, loras in assigned.items():
        for lora, _ in loras:
            warn_mismatch(lora, spec.task, spec.boundary, spec.fingerprint(noise_expert))
    plans = [
        plan_component(weight_files(spec.component(noise_expert)), _to_merge(loras), noise_expert, settings.dtype)
        for noise_expert, loras in assigned.items()
    ]
    _check_and_log(plans, settings.output, folder_bytes(spec.path, settings.output, plans, settings.link))
    if options.dry_run:
        return
    with _bytes_bar(plans, settings.verify) as advance:
        write_folder(spec.path, settings.output, plans, settings.link, advance, settings.verify)
    yield f"merged model: {settings.output}"


def _into_transformer(settings: MergeSettings, dit: Path, options: RunOptions) -> Iterator[str]:
    whole = dit.is_dir()
    noise_expert, loras = assign_to_transformer(
        _requests(settings), noise_expert_from_file_name(dit), settings.key_rule)
    plan = plan_component(weight_files(dit) if whole else [dit], _to_merge(loras), noise_expert, settings.dtype)
    if whole:
        claim_folder(settings.output, dit, options)
    else:
        claim_file(settings.output, [dit], options)
    needed = folder_bytes(dit, settings.output, [plan], settings.link) if whole else plan.size
    _check_and_log([plan], settings.output, needed)
    if options.dry_run:
        return
    with _bytes_bar([plan], settings.verify) as advance:
        if whole:
            write_folder(dit, settings.output, [plan], settings.link, advance, settings.verify)
        else:
            write_component(plan, [settings.output], advance, settings.verify)
    yield f"merged transformer: {settings.output}"


def _into_lora(settings: MergeSettings, options: RunOptions) -> Iterator[str]:
    groups = group_by_noise_expert(_requests(settings), settings.key_rule)
    outputs = lora_outputs(settings, list(groups))
    for output in outputs.values():
        claim_file(output, [lora.path for lora in settings.lora], options)
    report(lora for loras in groups.values() for lora, _ in loras)
    for noise_expert, loras in groups.items():
        parts = ", ".join(f"{lora.path.name} x {strength:g}" for lora, strength in loras)
        log(f"{outputs[noise_expert].name}: {parts}")
        result = outline([(lora.outline(), strength) for lora, strength in loras], settings.rank)
        check_layout(outputs[noise_expert], result, settings.format or "comfy")
        for lora, _ in loras:
            lora.check_finite()
    if options.dry_run:
        return
    yield from _write_sums(settings, outputs, (
        (noise_expert, [(lora.read_finite(), strength) for lora, strength in loras],
         {} if noise_expert is None else {NOISE_EXPERT_KEY: noise_expert.value})
        for noise_expert, loras in groups.items()
    ))


_Sum = tuple[NoiseExpert | None, Sequence[tuple[AdapterState, float]], dict[str, str]]


def _write_sums(
    settings: MergeSettings, outputs: Mapping[NoiseExpert | None, Path], sums: Iterable[_Sum]
) -> Iterator[str]:
    """Sum each noise expert's terms and write them, to one file each or, with `one_file`, to one for both."""
    both: dict[NoiseExpert, AdapterState] = {}
    dtypes: set[torch.dtype] = set()
    for noise_expert, terms, metadata in sums:
        dtype = _file_dtype(settings, [state for state, _ in terms])
        # In fp32, so that the only rounding is that of the writing, of which reading back tells the error.
        state, energy = combine(terms, settings.rank, dtype and torch.promote_types(dtype, torch.float32))
        if energy is not None and settings.rank is not None:
            yield energy.describe(settings.rank)
        state.metadata |= metadata
        if settings.one_file and noise_expert is not None:
            both[noise_expert] = state
            dtypes |= {dtype} if dtype else set()
            continue
        output = outputs[noise_expert]
        write_lora(output, state, settings.format or "comfy", dtype, settings.fold_alpha,
                   check=reader(output, {noise_expert: state}))
        yield f"LoRA: {output}"
    if both:
        dtype = max(dtypes, key=lambda d: d.itemsize, default=None)
        write_both(settings.output, both, dtype, settings.fold_alpha, reader(settings.output, both))
        yield f"LoRA: {settings.output}"


def _file_dtype(settings: MergeSettings, states: Sequence[AdapterState]) -> torch.dtype | None:
    """The dtype of a file with the sum of `states`; None: every tensor keeps its own."""
    if settings.dtype is not None:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    return None if len(states) == 1 and settings.rank is None else widest_dtype(states)


def _from_mixture(settings: MergeSettings, path: Path, options: RunOptions) -> Iterator[str]:
    """The mixture at a given mix as one LoRA per noise expert; the range of w shows what a constant gate loses."""
    mixture = read_mixture(path)
    taxonomy = Taxonomy.from_dict(mixture.taxonomy, str(path))
    shares = resolve_hint(settings.mix or "", taxonomy)
    outputs = lora_outputs(settings, mixture.noise_experts)
    for output in outputs.values():
        claim_file(output, [path], options)
    log("mix: " + ", ".join(f"{f} {share:.2f}" for f, share in zip(mixture.families, shares, strict=True) if share))
    if mixture.base_lora:
        warn(f"{path} was trained over a base LoRA, which is not part of the mixture; use it with these files")
    gates: dict[NoiseExpert, float] = {}
    for noise_expert in mixture.noise_experts:
        sigmas = [settings.sigma] if settings.sigma is not None else inference_sigmas(mixture, noise_expert)
        if not sigmas:
            raise UserError(f"none of the model's {mixture.spec.steps} sampling steps is in the band of the "
                            f"{noise_expert.value} noise expert; give --sigma")
        gate = gate_range(mixture, noise_expert, sigmas)
        gates[noise_expert] = gate.mean
        title = "" if mixture.one_transformer else f"{noise_expert.value} noise: "
        yield (f"{title}timestep gate w = {gate.mean:.4f} (from {gate.lowest:.4f} to "
               f"{gate.highest:.4f} over {count_text(len(sigmas), 'sigma')})")
    if options.dry_run:
        return
    yield from _write_sums(settings, outputs, (
        (noise_expert, [(mixture_to_lora(mixture, noise_expert, shares, gate), settings.multiplier)],
         _mixture_metadata(mixture, noise_expert))
        for noise_expert, gate in gates.items()
    ))


def _mixture_metadata(mixture: Mixture, noise_expert: NoiseExpert) -> dict[str, str]:
    metadata = {NOISE_EXPERT_KEY: noise_expert.value, "lapwan.task": mixture.spec.task}
    if mixture.one_transformer:
        metadata = {"lapwan.task": mixture.spec.task, "lapwan.boundary": ""}
    if noise_expert in mixture.spec.base:
        metadata["lapwan.base_fingerprint"] = mixture.spec.base[noise_expert]
    return metadata


def lora_outputs(
    settings: MergeSettings, noise_experts: Sequence[NoiseExpert | None]
) -> dict[NoiseExpert | None, Path]:
    """The output path itself, or `{name}_high_noise.safetensors` and `{name}_low_noise.safetensors` for two files.

    Raises:
        UserError: one file for both noise experts, without a LoRA for each.
    """
    if settings.one_file and set(noise_experts) != set(NoiseExpert):
        have = ", ".join("an unknown one" if e is None else e.value for e in noise_experts)
        raise UserError(f"--one-file needs a LoRA for each noise expert; these are for: {have}; give high=FILE and "
                        "low=FILE, or leave it out")
    output = settings.output
    if settings.one_file or len(noise_experts) == 1:
        return dict.fromkeys(noise_experts, output)
    return {e: output if e is None else output.with_name(f"{output.stem}_{e.file_suffix}{output.suffix}")
            for e in noise_experts}


def claim_file(output: Path, inputs: Sequence[Path], options: RunOptions) -> None:
    """Refuse an output that is not a .safetensors file, or is one of the inputs, or exists already."""
    if output.is_dir():
        raise UserError(f"output {output} is a folder, but this merge writes a .safetensors file")
    if output.suffix != ".safetensors":
        raise UserError(f"output {output}: this merge writes one .safetensors file; give it that suffix")
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise UserError(f"output {output} is one of the inputs; choose another path")
    claim_output(output, options.overwrite)


def claim_folder(output: Path, source: Path, options: RunOptions) -> None:
    """Refuse an output that is a file, or nested with the source, or exists already."""
    if output.is_file():
        raise UserError(f"output {output} is a file, but this merge writes a folder")
    target, model = output.resolve(), source.resolve()
    if target == model or model in target.parents or target in model.parents:
        raise UserError(f"output {output} and the model {source} are nested; choose a folder outside the model")
    claim_output(output, options.overwrite)


@contextmanager
def _bytes_bar(plans: Sequence[ComponentPlan], verify: bool) -> Iterator[Advance]:
    """A progress bar in MiB over bytes written and, with `verify`, read back."""
    size = sum(plan.size for plan in plans) * (2 if verify else 1)
    with progress("merge", round(size / 2**20, 1), "MiB") as bar:
        yield lambda size: bar.advance(size / 2**20)


def _check_and_log(plans: Sequence[ComponentPlan], output: Path, needed: int) -> None:
    report(item.lora for plan in plans for item in plan.loras)
    for plan in plans:
        log(plan.describe(plan.noise_expert.component if plan.noise_expert else plan.files[0].path.name))
    check_disk(output, needed)
    log(f"{output}: {needed / 2**30:.3g} GiB to write")


# Bytes from which a file is hard-linked: weights. Smaller ones are configs, which people edit in place.
_LINK_FROM = 1 << 20
_OTHER_WEIGHTS = (*OTHER_WEIGHTS, ".msgpack", ".h5", ".onnx")
_PLAIN_FILES = (".json", ".md", ".safetensors", ".gguf")  # beside the components, or of a transformer's folder
_DEEPEST = 8  # folders in a model
_DISK_MARGIN = 64 << 20


def carried_files(folder: Path, plans: Sequence[ComponentPlan]) -> tuple[list[Path], dict[Path, str]]:
    """(files to copy or link, files to leave out with the reason), relative to `folder`.

    Other formats of a merged transformer's weights are left out: they would still hold the unmerged weights. So is a
    link that leads out of the model, unless it is to a part of the model. Hidden files (version control, download
    caches) are not part of a model.
    """
    rewritten = {file.path for plan in plans for file in plan.files}
    merged = {file.path.parent for plan in plans for file in plan.files}
    carried: list[Path] = []
    left_out: dict[Path, str] = {}
    root, parts = _root(folder), _parts(folder)
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder)
        if path in rewritten:
            continue
        if path.parent in merged and (path.suffix in (*_OTHER_WEIGHTS, ".safetensors")
                                      or path.name.endswith(".bin.index.json")):
            left_out[name] = "it holds unmerged weights in another format"
        elif leaves(path, root) and not (name.parts[0] in parts or (
                len(name.parts) == 1 and path.suffix in _PLAIN_FILES)):
            left_out[name] = f"it is a link to {path.resolve()}, outside the model"
        else:
            carried.append(name)
    return carried, left_out


def _root(folder: Path) -> Path:
    """The folder that a model's links may lead to: itself, or of a snapshot the hub's folder with its blobs."""
    hub = folder.absolute().parent.parent
    return hub if folder.absolute().parent.name == "snapshots" and (hub / "blobs").is_dir() else folder


def _parts(folder: Path) -> set[str]:
    """The components' folders, which may be links to where they are stored."""
    index = folder / "model_index.json"
    return {name for name, entry in read_object(index).items() if isinstance(entry, list)} if index.is_file() else set()


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith(".") or is_temporary(path):
            continue
        if path.is_dir():
            if path.resolve() in above or len(above) > _DEEPEST:
                raise UserError(f"{path} leads back to {path.resolve()}, a folder that it lies in; remove this link")
            yield from _walk(path, above)
        elif path.is_file():
            yield path


def check_disk(output: Path, needed: int) -> None:
    """Check free disk space before the work; `needed` in bytes.

    Raises:
        UserError: too little, with both figures.
    """
    parent = nearest_folder(output)
    free = shutil.disk_usage(parent).free
    if free < needed + _DISK_MARGIN:
        raise UserError(f"not enough disk for {output}: {needed / 2**30:.3g} GiB needed, {free / 2**30:.3g} GiB free "
                        f"on {parent}; free some space or choose another output")


def folder_bytes(folder: Path, output: Path, plans: Sequence[ComponentPlan], link: bool) -> int:
    """Bytes a merged copy of `folder` takes at `output`: the merged files, and files copied rather than linked."""
    carried, _ = carried_files(folder, plans)
    files = [(folder / path).stat() for path in carried]
    device = nearest_folder(output).stat().st_dev
    copied = [f.st_size for f in files if not (link and f.st_size >= _LINK_FROM and f.st_dev == device)]
    return sum(plan.size for plan in plans) + sum(copied)


def write_folder(
    folder: Path, output: Path, plans: Sequence[ComponentPlan], link: bool, advance: Advance, verify: bool = False
) -> None:
    """Write the merged model folder atomically; configs and indices are copied byte for byte."""
    carried, left_out = carried_files(folder, plans)
    for path, reason in left_out.items():
        warn(f"{folder / path} is not copied: {reason}")
    with atomic_folder(output) as temporary:
        check_targets(temporary, (temporary / path for path in carried))
        for path in carried:
            _carry(folder / path, temporary / path, link)
        for plan in plans:
            targets = [(temporary / file.path.relative_to(folder)).with_suffix(".safetensors") for file in plan.files]
            check_targets(temporary, targets)
            write_component(plan, targets, advance, verify)


def _carry(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # a hub's snapshot folder holds links into its blobs
    if link and real.stat().st_size >= _LINK_FROM:
        try:
            os.link(real, target)
            return
        except OSError as error:  # another file system, or one without hard links
            detail(f"{source} is copied: {error.strerror}")
    if source.suffix == ".safetensors" and source.parent.name in {e.component for e in NoiseExpert}:
        weights = read_header(source)
        for info in weights.tensors.values():
            check_stored(weights, info)
    shutil.copyfile(real, target)
