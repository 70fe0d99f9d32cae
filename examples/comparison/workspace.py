"""Where the parts of a comparison are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.comparison.settings import ComparisonSettings, TaskName
from lapwan.names import NoiseExpert


@dataclass(frozen=True)
class Workspace:
    """The folder of a comparison with the paths in it, its settings and its device."""

    root: Path
    settings: ComparisonSettings
    device: str = "auto"

    @property
    def data(self) -> Path:
        """Scenes, labels and caches."""
        return self.root / "data"

    def clips(self, part: str) -> Path:
        """A part's clips."""
        return self.data / part / "clips.jsonl"

    def labels(self, taxonomy: str) -> Path:
        """The training clips' labels in a taxonomy."""
        return self.data / "train" / f"labels_{taxonomy}.jsonl"

    def taxonomy(self, name: str) -> str:
        """A taxonomy's name, or the file of one with merged families."""
        return str(self.data / f"{name}.toml") if name in self.settings.merged else name

    def cache(self, task: TaskName) -> Path:
        """The training clips' cache for a task."""
        return self.data / f"cache_{task}"

    def stage1(self, task: TaskName) -> dict[NoiseExpert, Path]:
        """Stage 1's LoRA files."""
        folder = self.root / "rows" / f"stage1 {task}" / "run"
        return {e: folder / f"lapwan_{e.file_suffix}.safetensors" for e in NoiseExpert}
