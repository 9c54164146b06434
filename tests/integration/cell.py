"""One data set in one configuration: where its files lie, and the commands that work on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from integration.commands import Runner
from integration.schemes import Scheme

E2ENET, STOCK = "nnUNetTrainerE2ENet_smoke", "nnUNetTrainer_smoke"
PLANS = "nnUNetPlans"
FIVE_FOLDS = (0, 1, 2, 3, 4)
PLANNING = {"nnUNet_n_proc_DA": "1"}  # planning takes as many threads as there are processes for data augmentation: not 0
ONE_PROCESS = ("-npp", "1", "-nps", "1")


@dataclass(frozen=True)
class Workspace:
    """A folder for everything that the workflow writes, nnU-Net's three folders among it."""

    folder: Path

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.folder / "nnUNet_results"

    def environment(self) -> dict[str, str]:
        return {path.name: str(path) for path in (self.raw, self.preprocessed, self.results)}

    def log(self, scheme: Scheme, configuration: str, step: str) -> Path:
        names = (part.replace(" ", "_").replace(",", "").lstrip("-") for part in (scheme.name, configuration, step))
        return self.folder.joinpath("logs", *names).with_suffix(".log")


@dataclass(frozen=True)
class Cell:
    """A cell of the table, as one step of the workflow sees it.

    Attributes:
        folds: of the cross-validation.
        log: where the output of the step's commands goes.
    """

    work: Workspace
    scheme: Scheme
    configuration: str
    folds: tuple[int, ...]
    runner: Runner
    log: Path

    @property
    def number(self) -> str:
        return str(self.scheme.number)

    @property
    def raw(self) -> Path:
        return self.work.raw / self.scheme.dataset

    @property
    def is_cascade(self) -> bool:
        return self.configuration == "3d_cascade_fullres"

    def model(self, trainer: str, results: Path | None = None) -> Path:
        return (results or self.work.results) / self.scheme.dataset / f"{trainer}__{PLANS}__{self.configuration}"

    def fold(self, number: int | str, trainer: str = E2ENET) -> Path:
        return self.model(trainer) / f"fold_{number}"

    def predictions(self, name: str, configuration: str | None = None) -> Path:
        return self.work.folder / "predictions" / self.scheme.dataset / (configuration or self.configuration) / name

    def run(self, *command: str | Path, environment: dict[str, str] | None = None, killed_by: Path | None = None) -> None:
        self.runner.run(
            self.log, *command, environment={**self.work.environment(), **(environment or {})}, killed_by=killed_by
        )

    def train(self, fold: int | str, *options: str | Path, trainer: str = E2ENET, killed_by: Path | None = None) -> None:
        what = (self.number, self.configuration, str(fold), "-tr", trainer, "-device", "cpu")
        self.run("nnUNetv2_train", *what, *options, killed_by=killed_by)

    def predict(
        self, name: str, *options: str, folds: tuple[int | str, ...] = (0,), trainer: str = E2ENET, results: Path | None = None
    ) -> Path:
        """``nnUNetv2_predict`` on the test images; where the results are those of a model in another results folder, from it.

        Returns:
            The folder of the segmentations.
        """
        model = ("-d", self.number, "-c", self.configuration, "-tr", trainer, "-f", *map(str, folds))
        other = {"nnUNet_results": str(results)} if results else None
        self.run("nnUNetv2_predict", *model, *self.images(name), *options, environment=other)
        return self.predictions(name)

    def images(self, name: str) -> tuple[str | Path, ...]:
        """Options of the commands that predict: input, output, what the previous stage predicted."""
        images = ("-i", self.raw / "imagesTs", "-o", self.predictions(name))
        previous = ("-prev_stage_predictions", self.predictions("one fold", "3d_lowres")) if self.is_cascade else ()
        return (*images, *previous, "-device", "cpu", *ONE_PROCESS, "--disable_progress_bar")
