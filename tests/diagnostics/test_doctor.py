"""`lapwan doctor`: what it finds on this machine, and the memory plans of the released model without its weights."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run_lapwan, run_successfully

from lapwan.diagnostics import doctor
from lapwan.memory.plan import GIB
from lapwan.memory.what_fits import DTYPES, NOMINAL, SIZES, WORKS, gib, what_fits

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for the GPU of this machine")


@without_gpu
def test_without_a_gpu_it_names_what_is_here_and_ends_well(tmp_path):
    done = run_successfully("doctor", "--folder", tmp_path / "disk")
    lines = done.out.splitlines()
    assert len(lines) < 24 and "broken" not in done.out
    for name in ("system", "torch", "device", "host memory", "disk", "packages", "bitsandbytes", "video", "fonts"):
        [line] = [line for line in lines if line[8:].startswith(f"{name} ")]
        assert line.split()[0] in ("ok", "note", "warn")
    assert torch.__version__ in done.out and "no GPU here; lapwan doctor --memory 24" in lines[-1]
    assert not list((tmp_path / "disk").iterdir())


@without_gpu
def test_json(tmp_path):
    document = json.loads(run_successfully("doctor", "--json", "--folder", tmp_path).out)
    assert {item["name"] for item in document["findings"]} >= {"torch", "disk", "video"}
    assert document["memory_gib"] is None and document["wan22_t2v_a14b"] == []


def test_gpus_hidden_on_purpose_are_a_note(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = doctor.no_gpu("570.86.10")
    assert finding.status == "note" and "hidden by CUDA_VISIBLE_DEVICES" in finding.text


def test_a_driver_without_a_gpu_in_torch_is_broken(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Release Build\n")
    finding = doctor.no_gpu(doctor.driver_version(tmp_path / "version"))
    assert finding.name == "device" and finding.status == "broken" and "NVIDIA driver 570.86.10" in finding.text
    assert doctor.driver_version(tmp_path / "none") is None and doctor.no_gpu(None).status == "note"


def test_a_needed_package_that_is_missing_is_broken():
    found, missing, *_ = doctor.packages(("diffusers", "no-such-package"))
    assert (found.status, missing.name, missing.status) == ("ok", "no-such-package", "broken")
    assert "None" not in found.text and "pip install no-such-package" in missing.text


def test_a_disk_that_cannot_be_written_is_broken(tmp_path):
    (tmp_path / "file").write_text("")
    [finding] = list(doctor._disk(tmp_path / "file" / "folder"))
    assert finding.status == "broken" and "LAPWAN_CACHE_DIR" in finding.text
    done = run_lapwan("doctor", "--folder", tmp_path / "file" / "folder")
    assert done.code == 2 and "broken: disk" in done.err and finding.text in " ".join(done.out.split())


def test_the_speed_of_a_disk_is_measured_and_nothing_stays(tmp_path):
    written, read = doctor.disk_speed(tmp_path, 32 << 20)
    assert written > 1e6 and read > 1e6 and not list(tmp_path.iterdir())


def test_plans_of_the_released_model_are_those_of_its_folder():
    """Both noise experts resident: 2 x 14.288 B numbers in bf16, and what an H200 measured beside them (facts of 2026:
    62.6 GiB measured, 63.7 predicted for rank 16 in the last 8 blocks at 256x256x81)."""
    fits = what_fits(140 * GIB, None, NOMINAL)
    first = next(fits)
    assert (first.work, first.size, first.dtype) == (WORKS[0], SIZES[0], DTYPES[0])
    assert first.fits and first.where == "both resident" and first.plan.host == 0
    assert gib(first.plan.parts["weights"]) == pytest.approx(2 * 14.288e9 * 2 / GIB, rel=0.01)
    assert 60 < gib(first.plan.peak) < 66
    fits.close()


def test_too_little_memory_does_not_fit():
    fits = what_fits(6 * GIB, None, NOMINAL)
    first = next(fits)
    assert not first.fits and first.needed > 6 * GIB and first.plan.streamed
    fits.close()


@without_gpu
def test_the_table_of_a_given_memory_is_one_screen(tmp_path):
    done = run_successfully("doctor", "--memory", "16", "--folder", tmp_path, environment={"COLUMNS": "80"})
    assert len(done.out.splitlines()) < 40
    for work in WORKS:
        assert work in done.out
    assert "fits" in done.out and "does not fit" in done.out and "this machine has none" in done.out
    again = json.loads(run_successfully("doctor", "--memory", "16", "--json", "--folder", tmp_path).out)
    assert len(again["wan22_t2v_a14b"]) == len(WORKS) * len(SIZES) * len(DTYPES)
    assert all(row["fits"] == (row["gib"] <= 16) and row["seconds_a_step"] is None for row in again["wan22_t2v_a14b"])
