"""inspect-weights: figures against brute force, growth, and the verdict on runs whose statistics are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.commands.inspect_weights import run
from lapwan.diagnostics.growth import update_cosine
from lapwan.diagnostics.lora_figures import inner_product, measure, summarise
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, write_lora
from lapwan.lora.kinds import DoRA, FullDelta
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.spec import weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import load
from lapwan.tiny.resolve import resolve
from lapwan.train.srpo.data import FEATURES_FILE, TextFeatures

# In and out features of Wan-14B's block Linears, and the floor they give at B = 0.
WIDTH, FFN = 5120, 13824
SHAPES = {d: {"ffn.0": (FFN, WIDTH), "ffn.2": (WIDTH, FFN)}.get(o, (WIDTH, WIDTH)) for o, d in PROJECTIONS.items()}
FLOOR = 0.00318


def inspect(*files: Path, json_file: Path | str = "-", capsys: pytest.CaptureFixture | None = None, **options: str):
    settings = load(InspectWeightsSettings, options={
        "files": [str(f) for f in files], "json_file": str(json_file), **options}, environment={})
    run(settings, RunOptions())
    return json.loads(capsys.readouterr().out) if capsys else None


def random_lora(seed: int, modules: int = 5, rank: int = 3, alpha: float = 2.0, dtype=torch.float32) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    paths = [f"blocks.{b}.{d}" for b in range(3) for d in PROJECTIONS.values()][:modules]
    return AdapterState({
        path: LowRank(torch.randn(rank + n % 2, 20, generator=generator).to(dtype),
                      torch.randn(14, rank + n % 2, generator=generator).to(dtype), alpha)
        for n, path in enumerate(paths)
    })


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_equal_brute_force(dtype):
    state = random_lora(1, dtype=dtype)
    got = summarise(measure(state.entries))
    a = torch.cat([e.down.double().flatten() for e in state.entries.values()])
    b = torch.cat([e.up.double().flatten() for e in state.entries.values()])
    deltas = [e.delta(torch.float64) for e in state.entries.values()]
    sigmas = [torch.linalg.svdvals(d)[: e.rank] for d, e in zip(deltas, state.entries.values(), strict=True)]
    shares = [s / s.sum() for s in sigmas]
    want = {
        "modules": 5, "parameters": a.numel() + b.numel(), "rank": 3,
        "legacy_mean_abs": torch.cat([a, b]).abs().mean().item(),
        "mean_abs_A": a.abs().mean().item(), "mean_abs_B": b.abs().mean().item(),
        "delta_norm": math.sqrt(sum(d.square().sum().item() for d in deltas)),
        "spectral_norm_max": max(s[0].item() for s in sigmas),
        "stable_rank_mean": sum((s.square().sum() / s[0] ** 2).item() for s in sigmas) / 5,
        "effective_rank_mean": sum((-(p * p.log()).sum()).exp().item() for p in shares) / 5,
        "nonfinite_modules": 0, "dead_modules": 0,
    }
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-9), name
    assert got.init_floor == pytest.approx(a.numel() / (2 * math.sqrt(20)) / (a.numel() + b.numel()))


def test_scale_of_many_modules_is_not_lost_to_rounding():
    """Squares are summed in fp64: one large module does not swallow a thousand small ones."""
    generator = torch.Generator().manual_seed(0)
    entries = {f"blocks.{n}.attn1.to_q": LowRank(torch.randn(2, 8, generator=generator),
                                                 torch.randn(8, 2, generator=generator) * (1e4 if n == 0 else 1e-2),
                                                 2.0) for n in range(1000)}
    want = math.sqrt(math.fsum(e.delta(torch.float64).square().sum().item() for e in entries.values()))
    assert summarise(measure(entries)).delta_norm == pytest.approx(want, rel=1e-12)


def test_rank_deficient_modules_have_their_true_spectrum():
    """Rank 32 stored, rank 2 true: the other singular values do not blow up the effective rank."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(32, 64, generator=generator), torch.zeros(48, 32)
    up[:, :2] = torch.randn(48, 2, generator=generator)
    (got,) = measure({"blocks.0.attn1.to_q": LowRank(down, up, 32.0)})
    sigma = torch.linalg.svdvals(up.double() @ down.double())[:2]
    share = sigma / sigma.sum()
    assert got.effective_rank == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-6)
    assert got.spectral_norm == pytest.approx(sigma[0].item(), rel=1e-12)


def test_dead_and_nonfinite_modules_are_counted_and_kept_out(tmp_path, capsys):
    state = random_lora(2, modules=4)
    paths = list(state.entries)
    state.entries[paths[1]].up.zero_()
    state.entries[paths[2]].down[0, 0] = math.nan
    state.entries[paths[3]].up[0, 0] = math.inf
    write_lora(tmp_path / "x_high_noise.safetensors", state)
    document = inspect(tmp_path / "x_high_noise.safetensors", capsys=capsys)
    high = document["experts"]["high"]
    assert (high["nonfinite_modules"], high["dead_modules"]) == (2, 1)
    assert document["dead"]["high"] == [paths[1]] and sorted(document["nonfinite"]["high"]) == sorted(paths[2:])
    only = AdapterState({p: state.entries[p] for p in paths[:1]})
    assert high["delta_norm"] == pytest.approx(summarise(measure(only.entries)).delta_norm)
    statuses = {r["rule"]: r["status"] for r in document["verdict"]["rules"]}
    assert statuses["non-finite modules"] == "stop" and statuses["dead modules"] == "warn"
    assert document["verdict"]["status"] == "stop" and document["ratios"] == dict.fromkeys(document["ratios"])


@pytest.mark.parametrize("value", [3e38, 1e20])
def test_values_whose_squares_overflow_are_not_finite(tmp_path, capsys, value):
    state = random_lora(2, modules=2)
    for entry in state.entries.values():
        entry.up.fill_(value)
    write_lora(tmp_path / "x_high_noise.safetensors", state)
    document = inspect(tmp_path / "x_high_noise.safetensors", capsys=capsys)
    assert document["experts"]["high"]["nonfinite_modules"] == 2
    assert document["verdict"]["status"] == "stop"
    for entry in state.entries.values():
        entry.up.zero_()  # of an update of zero, too
        entry.down.fill_(value)
    assert not any(figures.finite for figures in measure(state.entries))
    (got,) = measure({"blocks.0.attn1.to_q": LowRank(torch.ones(1, 4), torch.ones(4, 1), 1e200)})
    assert not got.finite


def test_inner_product_and_update_cosine_equal_brute_force():
    a, b, c = (random_lora(seed, alpha=1.0 + seed) for seed in (1, 2, 3))
    for path in a.entries:
        x, y = a.entries[path], b.entries[path]
        want = (x.delta(torch.float64) * y.delta(torch.float64)).sum().item()
        assert inner_product(x, y) == pytest.approx(want, rel=1e-12)
    flat = [torch.cat([e.delta(torch.float64).flatten() for e in s.entries.values()]) for s in (a, b, c)]
    want = torch.nn.functional.cosine_similarity(flat[2] - flat[1], flat[1] - flat[0], dim=0).item()
    assert update_cosine(a.entries, b.entries, c.entries) == pytest.approx(want, abs=1e-12)
    assert update_cosine(a.entries, b.entries, b.entries) is None


def reference(magnitude: float, seed: int, rank: int = 4) -> AdapterState:
    """One block in Wan-14B's shapes with |A| at its start (1 / (2 √in)) and |B| such that mean|w| = `magnitude`."""
    generator = torch.Generator().manual_seed(seed)
    total = rank * sum(o + i for o, i in SHAPES.values())
    floor = rank * sum(i / (2 * math.sqrt(i)) for _, i in SHAPES.values())
    size = (magnitude * total - floor) / (rank * sum(o for o, _ in SHAPES.values()))

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0

    return AdapterState({
        f"blocks.0.{d}": LowRank(signs(rank, i) / (2 * math.sqrt(i)), signs(o, rank) * size, float(rank))
        for d, (o, i) in SHAPES.items()
    })


def save_pair(folder: Path, high: float, low: float, seed: int = 0, **metadata: str) -> tuple[Path, Path]:
    paths = []
    for n, (label, magnitude) in enumerate((("high", high), ("low", low))):
        state = reference(magnitude, 2 * seed + n)
        state.metadata = {"lapwan.noise_expert": label, **metadata}
        paths.append(folder / f"run_{label}_noise.safetensors")
        write_lora(paths[-1], state)
    return paths[0], paths[1]


def rule(document: dict, start: str) -> dict:
    (found,) = [r for r in document["verdict"]["rules"] if r["rule"].startswith(start)]
    return found


def test_a_pair_with_the_reference_runs_statistics(tmp_path, capsys):
    """high 0.005605, low 0.004710: 1.19 as people read it, 1.58 net of the floor; LR 1.48e-4 / 1.10e-4 = 1.35."""
    high, low = save_pair(tmp_path, 0.005605, 0.004710)
    document = inspect(high, low, capsys=capsys, lr="high=1.48e-4,low=1.10e-4", preset="motion")
    noise_experts = document["experts"]
    assert noise_experts["high"]["legacy_mean_abs"] == pytest.approx(0.005605, rel=1e-6)
    assert noise_experts["low"]["init_floor"] == pytest.approx(FLOOR, abs=5e-6)
    assert document["ratios"]["legacy_mean_abs"] == pytest.approx(1.19, abs=0.005)
    assert document["ratios"]["mean_abs_B"] == pytest.approx(1.58, abs=0.01)
    assert document["ratios"]["lr"] == pytest.approx(1.345, abs=0.005)
    assert document["verdict"]["status"] == "warn"
    for start in ("legacy magnitude, high / low", "legacy magnitude of high", "LR, high / low", "mean|B|, high / low"):
        found = rule(document, start)
        assert found["status"] == "warn" and "one run's experience" in found["source"] and found["action"]


def test_the_floor_is_the_known_one_at_any_rank():
    for rank in (1, 16):
        state = reference(0.004, 0, rank)
        assert summarise(measure(state.entries)).init_floor == pytest.approx(0.003178, abs=1e-6)
    attention = {p: e for p, e in state.entries.items() if "ffn" not in p}
    assert summarise(measure(attention)).init_floor == pytest.approx(0.00349, abs=1e-5)


def test_a_pair_as_advised_is_good_for_motion_and_not_for_character(tmp_path, capsys):
    high, low = save_pair(tmp_path, 0.0090, 0.0055, **{"lapwan.step": "2000"})
    for lr in ("high=4e-4,low=1e-4", "high=3e-4,low=1e-4"):  # the second is the lower bound, but for rounding
        document = inspect(high, low, capsys=capsys, lr=lr)
        assert document["verdict"]["status"] == "good", document["verdict"]
    document = inspect(high, low, capsys=capsys, lr="high=4e-4,low=1e-4", preset="character")
    assert document["verdict"]["status"] == "stop"
    assert rule(document, "mean|B|, low / high")["status"] == "stop"
    swapped = inspect(*save_pair(tmp_path / "s", 0.0055, 0.0090), capsys=capsys, preset="motion")
    assert rule(swapped, "norm of the update")["status"] == "stop"


def run_folder(folder: Path) -> None:
    """The reference run's growth: +5.4 % and +7.1 % as people read it, from step 2400 to 3000."""
    grown = (0.005605 * 1.054, 0.004710 * 1.071)
    for step, (high, low) in {1800: (0.0050, 0.0043), 2400: (0.005605, 0.004710), 3000: grown}.items():
        (folder / f"step_{step}").mkdir(parents=True)
        save_pair(folder / f"step_{step}", high, low, seed=0, **{"lapwan.step": str(step)})
    lines = [{"step": s, "noise_expert": e, "lr": 1e-4 * (4 if e == "high" else 1) * s / 3000, "loss": 0.1}
             for s in range(100, 3001, 100) for e in ("high", "low")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31')


def test_a_run_folder_over_time_tells_noise_from_growth(tmp_path, capsys):
    run_folder(tmp_path / "run")
    for name in ("high", "low"):  # the last files, hard-linked
        file = f"run_{name}_noise.safetensors"
        (tmp_path / "run" / file).hardlink_to(tmp_path / "run" / "step_3000" / file)
    document = inspect(tmp_path / "run", capsys=capsys)
    assert [(g["from_step"], g["to_step"]) for g in document["growth"]] == [(1800, 2400), (2400, 3000)]
    last = document["growth"][-1]
    assert last["high"]["legacy"] == pytest.approx(0.054, abs=1e-6)
    assert last["low"]["legacy"] == pytest.approx(0.071, abs=1e-6)
    assert last["high"]["net"] == pytest.approx(0.125, abs=0.002)
    assert last["low"]["net"] == pytest.approx(0.218, abs=0.002)
    assert last["high"]["mean_abs_B"] == pytest.approx(last["high"]["net"], rel=1e-4)
    assert last["low"]["sqrt_step"] == pytest.approx(math.sqrt(3000 / 2400) - 1)
    assert last["high"]["update_cosine"] == pytest.approx(1.0)  # the same signs throughout: straight ahead
    assert document["growth"][0]["high"]["update_cosine"] is None
    found = rule(document, "low grows faster than high")
    assert found["value"] == pytest.approx(0.218 / 0.125, rel=0.02) and found["status"] == "stop"
    assert "step 2400" in found["action"]
    assert document["ratios"]["lr"] == pytest.approx(4.0)


def test_text_features_in_the_folder_of_an_srpo_run_are_no_lora(tmp_path, tiny_t2v, capsys):
    run_folder(tmp_path / "run")
    before = inspect(tmp_path / "run", capsys=capsys)
    TextFeatures(tmp_path / "run" / FEATURES_FILE).ensure(["a hook cuts"], tiny_t2v, torch.device("cpu"))
    assert inspect(tmp_path / "run", capsys=capsys) == before


def test_own_steps_of_a_noise_expert_set_its_sqrt_step(tmp_path, capsys):
    """Turns of different length: the low expert took no step between the checkpoints."""
    run_folder(tmp_path)
    lines = [{"step": s, "noise_expert": "low" if s <= 1500 else "high", "lr": 1e-4} for s in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = inspect(tmp_path, capsys=capsys)
    last = document["growth"][-1]
    assert last["low"]["sqrt_step"] == 0.0
    assert last["high"]["sqrt_step"] == pytest.approx(math.sqrt(1500 / 900) - 1)
    assert not any("grows faster" in r["rule"] for r in document["verdict"]["rules"])  # nothing to compare


def test_unequal_turns_are_no_alarm(tmp_path, capsys):
    """Between 2400 and 3000 the low expert took four times the steps: it grew more, at a slower pace."""
    run_folder(tmp_path)
    lines = [{"step": s, "noise_expert": "low" if s % 5 else "high", "lr": 1e-4} for s in range(1, 3001)]
    before = [line for line in lines if line["step"] <= 2400]
    for line in before:  # until then turn by turn
        line["noise_expert"] = "low" if line["step"] % 2 else "high"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rule(inspect(tmp_path, capsys=capsys), "low grows faster than high")
    paces = {"high": 0.125 / (math.sqrt(1320 / 1200) - 1), "low": 0.218 / (math.sqrt(1680 / 1200) - 1)}
    assert found["value"] == pytest.approx(paces["low"] / paces["high"], rel=0.02) and found["status"] == "good"


@pytest.mark.parametrize(("by", "names"), [("block", ["0", "1", "2"]), ("projection", list(PROJECTIONS))])
def test_groups_make_up_the_whole(tmp_path, capsys, by, names):
    for n, label in enumerate(("high", "low")):
        write_lora(tmp_path / f"x_{label}.safetensors", random_lora(n, modules=30))
    paths = (tmp_path / "x_high.safetensors", tmp_path / "x_low.safetensors")
    document = inspect(*paths, by=by, capsys=capsys)
    groups = document["by"]["groups"]
    assert sorted(groups) == sorted(names)
    assert sum(g["experts"]["low"]["parameters"] for g in groups.values()) == document["experts"]["low"]["parameters"]
    square = sum(g["experts"]["high"]["delta_norm"] ** 2 for g in groups.values())
    assert math.sqrt(square) == pytest.approx(document["experts"]["high"]["delta_norm"])
    inspect(*paths, by=by, json_file=tmp_path / "x.json")
    text = capsys.readouterr().out
    assert "verdict for motion" in text and max(map(len, text.split("\nupdate:")[0].splitlines())) <= 80
    for name in names:  # high, low, high / low
        rows = [line.split()[1:] for line in text.splitlines() if line.split()[:1] == [name]]
        assert [len(row) for row in rows] == [9, 9, 6]
        high, low = (groups[name]["experts"][label] for label in ("high", "low"))
        keys = ("legacy_mean_abs", "init_floor", "mean_abs_B", "delta_norm", "spectral_norm_max", "stable_rank_mean",
                "effective_rank_mean")
        assert rows[0] == [*(f"{high[key]:.3g}" for key in keys), "0", "0"]
        assert rows[2] == [f"{high[key] / low[key]:.3g}" for key in keys if key != "init_floor"]
    assert json.loads((tmp_path / "x.json").read_text()) == document


def test_the_json_has_the_keys_scripts_rely_on(tmp_path, capsys):
    run_folder(tmp_path)
    document = inspect(tmp_path, capsys=capsys)
    assert document["format"] == 1
    assert set(document["experts"]["high"]) == {
        "modules", "parameters", "rank", "legacy_mean_abs", "init_floor", "mean_abs_A", "mean_abs_B", "delta_norm",
        "spectral_norm_max", "stable_rank_mean", "effective_rank_mean", "nonfinite_modules", "dead_modules"}
    assert {"legacy_mean_abs", "mean_abs_B", "delta_norm", "lr"} <= set(document["ratios"])
    assert {"from_step", "to_step", "high", "low"} <= set(document["growth"][0])
    assert set(document["verdict"]["rules"][0]) == {"rule", "value", "threshold", "status", "source", "action"}


def test_the_lr_ratio_is_what_was_logged_else_what_the_files_state_and_what_is_said_goes_first(tmp_path, capsys):
    high, low = (save_pair(tmp_path, 0.009, 0.005)[n] for n in (0, 1))
    for path, rate in ((high, "4e-4"), (low, "1e-4")):
        (state,) = open_lora(path).values()
        state = state.read()
        state.metadata |= {"ss_learning_rate": rate, "lapwan.step": "10"}
        write_lora(path, state)
    assert inspect(high, low, capsys=capsys)["ratios"]["lr"] == pytest.approx(4.0)
    lines = [{"step": 10, "noise_expert": "high", "lr": 3e-4}, {"step": 9, "noise_expert": "low", "lr": 2e-4},
             {"step": 11, "noise_expert": "low", "lr": 9e-9}]  # after the files were saved
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert inspect(high, low, capsys=capsys)["ratios"]["lr"] == pytest.approx(1.5)
    assert inspect(high, low, capsys=capsys, lr="high=1e-3,low=1e-4")["ratios"]["lr"] == pytest.approx(10.0)


def test_mistakes_are_answered(tmp_path, capsys):
    high, low = save_pair(tmp_path, 0.005, 0.004)
    with pytest.raises(UserError, match=r"is for the low noise expert .*not for the high"):
        inspect(low, high)
    with pytest.raises(UserError, match="the same file twice"):
        inspect(high, high)
    with pytest.raises(UserError, match="0 files given; give HIGH LOW, one FILE, or a RUN_FOLDER"):
        inspect()
    with pytest.raises(UserError, match="3 files given"):
        inspect(high, low, high)
    with pytest.raises(UserError, match="holds no LoRA or mixture"):
        inspect(Path(__file__).parent)
    with pytest.raises(UserError, match="lr"):
        inspect(high, low, lr="high=-1,low=2")
    (tmp_path / "taken.json").write_text("{}")
    with pytest.raises(UserError, match="output exists"):
        inspect(high, low, json_file=tmp_path / "taken.json")
    (tmp_path / "run_high_noise_copy.safetensors").write_bytes(
        save_pair(tmp_path / "other", 0.006, 0.004)[0].read_bytes())
    with pytest.raises(UserError, match="are both for the high noise expert"):
        inspect(tmp_path)


def test_files_are_read_module_by_module(tmp_path):
    """What `measure` holds at any time is a couple of modules, however many the file has."""
    state = random_lora(3, modules=30)
    write_lora(tmp_path / "x.safetensors", state)
    (lora,) = open_lora(tmp_path / "x.safetensors").values()
    alive, most = 0, 0

    class Counting:
        def __init__(self, module):
            self.module, self.rank, self.stackable = module, module.rank, module.stackable

        def entry(self):
            nonlocal alive, most
            entry = self.module.entry()
            alive += 1
            most = max(most, alive)

            class Counted(LowRank):
                def __del__(self):
                    nonlocal alive
                    alive -= 1

            return Counted(entry.down, entry.up, entry.alpha)

    got = summarise(measure({path: Counting(module) for path, module in lora.modules.items()}))
    assert got.delta_norm == pytest.approx(summarise(measure(state.entries)).delta_norm, rel=1e-12) and most <= 3


@pytest.mark.parametrize("update", [
    LoKr({"lokr_w1": torch.randn(4, 3), "lokr_w2_a": torch.randn(12, 2), "lokr_w2_b": torch.randn(2, 16)}, -3.0),
    LoKr({"lokr_w1_a": torch.randn(4, 2), "lokr_w1_b": torch.randn(2, 3), "lokr_w2": torch.randn(12, 16)}, 1.0),
    LoHa({part: torch.randn((48, 2) if part.endswith("a") else (2, 48)) for part in LoHa.PARTS}, 5.0),
])
def test_products_have_the_spectrum_of_their_delta(update: LoKr | LoHa) -> None:
    sigma = torch.linalg.svdvals(update.delta(torch.float64))
    share = sigma / sigma.sum()
    (got,) = measure({"blocks.0.attn1.to_q": update})
    assert got.spectral_norm == pytest.approx(sigma[0].item(), rel=1e-7)
    assert got.stable_rank == pytest.approx((sigma.square().sum() / sigma[0].square()).item(), rel=1e-7)
    entropy = -torch.special.xlogy(share, share).sum()
    assert got.effective_rank == pytest.approx(entropy.exp().item(), rel=1e-5)
    (without,) = measure({"blocks.0.attn1.to_q": update}, spectrum=False)
    assert math.isnan(without.spectral_norm) and without.delta_norm == got.delta_norm


def test_other_kinds_of_update_are_measured_by_module(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    width = 192  # of the embedded model
    norms = {"blocks.0.attn1.to_q": 3.0, "blocks.0.attn1.to_q.bias": 4.0, "blocks.2.scale_shift_table": 0.0}
    state = AdapterState({
        "blocks.0.attn1.to_q": LoKr({"lokr_w1": torch.eye(4) * 1.5, "lokr_w2": torch.eye(width // 4) / 48**0.5}, None),
        "blocks.0.attn1.to_q.bias": FullDelta(torch.full((width,), 4.0 / width**0.5)),
        "blocks.2.scale_shift_table": FullDelta(torch.zeros(1, 6, width)),
        "blocks.1.attn1.to_q": LowRank(torch.randn(3, width), torch.randn(width, 3), 3.0),
    })
    path = tmp_path / "x_high_noise.safetensors"
    write_lora(path, state)
    document = inspect(path, capsys=capsys, by="projection")
    other = document["other_kinds"]["high"]
    assert {name: kind["modules"] for name, kind in other.items()} == {"LoKr": 1, "full delta": 2}
    got = {path: norm for kind in other.values() for path, norm in kind["delta_norm_of"].items()}
    assert got == pytest.approx(norms, rel=1e-6)
    pair = float(state.entries["blocks.1.attn1.to_q"].delta(torch.float64).norm())
    figures = document["experts"]["high"]
    assert figures["delta_norm"] == pytest.approx(math.hypot(3.0, 4.0, pair), rel=1e-6)
    assert (figures["rank"], figures["dead_modules"]) == (3, 0)
    groups = document["by"]["groups"]
    assert groups["self_attn.q"]["experts"]["high"]["delta_norm"] == pytest.approx(math.hypot(3.0, pair), rel=1e-6)
    assert groups["self_attn.q.bias"]["experts"]["high"]["delta_norm"] == pytest.approx(4.0, rel=1e-6)
    assert groups["modulation"]["experts"]["high"]["modules"] == 1


def test_dora_is_measured_against_its_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = resolve("tiny")
    (weights,) = weight_files(spec.component(NoiseExpert.HIGH))
    weight = load_file(weights)["blocks.0.attn1.to_q.weight"].double()
    pair = LowRank(torch.randn(2, 192) * 0.1, torch.randn(192, 2) * 0.1, 2.0)
    magnitude = torch.rand(192) + 0.5
    path = tmp_path / "x_high_noise.safetensors"
    write_lora(path, AdapterState({"blocks.0.attn1.to_q": DoRA(pair, magnitude)}))
    with pytest.raises(UserError, match=r"'blocks\.0\.attn1\.to_q' is a DoRA, .*give the base with --base MODEL"):
        inspect(path, capsys=capsys)
    document = inspect(path, capsys=capsys, base="tiny")
    moved = weight + pair.up.double() @ pair.down.double()
    want = (magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight).norm()
    assert document["experts"]["high"]["delta_norm"] == pytest.approx(float(want), rel=1e-6)
    assert document["experts"]["high"]["relative_delta"] == pytest.approx(float(want / weight.norm()), rel=1e-6)
