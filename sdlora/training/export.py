"""Writing the LoRA file of a run: tensors, metadata, side files, and the certificate that what was written is right."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sdlora.adapters import Lora
from sdlora.atomic import replacing
from sdlora.config import Config
from sdlora.data.captions import tag_frequency
from sdlora.data.dataset import Dataset
from sdlora.families import Parts
from sdlora.files import loaders
from sdlora.files.certify import Certificate, certify
from sdlora.files.kohya import write_lora
from sdlora.files.loaders import require_loadable, write_certificate
from sdlora.files.metadata import Progress, training_metadata
from sdlora.files.sidecars import write_sidecars
from sdlora.training.device import DTYPES
from sdlora.training.plan import Plan


@dataclass
class Exporter:
    """Everything that goes into the file besides the tensors' values.

    Attributes:
        config: settings of the run.
        parts: the base, adapters in place.
        adapters: component -> path -> adapter.
        dataset: what was trained on.
        plan: length of the run.
        rates: full learning rate of each component.
        precision: the arithmetic used, e.g. `bf16`.
        session: a number that all files of this session share.
        started: Unix time.
    """

    config: Config
    parts: Parts
    adapters: Mapping[str, Mapping[str, Lora]]
    dataset: Dataset
    plan: Plan
    rates: Mapping[str, float]
    precision: str
    session: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    started: float = field(default_factory=time.time)

    def export(self, path: Path, step: int) -> Certificate:
        """Writes the adapters as they are after `step` steps, reads the file back and certifies it.

        Raises:
            LoraFileError: if the values do not fit the file's number format, the file is not what was trained, or a
                program would lose a part of it.
            TrainingError: if it cannot be written.
        """
        # The final name is given only to a file that has been certified.
        with replacing(path) as temporary:
            write_lora(
                temporary,
                self.adapters,
                self.parts.family,
                self._metadata(path.stem, step),
                DTYPES[self.config.output.save_dtype],
            )
            require_loadable(loaders.certificate(temporary, loaders.layout_of(self.parts)))
            return certify(temporary, self.adapters, self.parts)

    def sidecars(self, path: Path, preview: Image.Image | None) -> None:
        """Writes what lies beside a LoRA: activation text and preview for WebUIs, and what those make of the file."""
        write_certificate(path, loaders.layout_of(self.parts))
        write_sidecars(
            path,
            trigger=self.config.data.trigger,
            description=f"{self.plan.num_pictures} pictures, {self.plan.total_steps} steps, base {self.parts.name}",
            preview=preview,
            family=self.parts.family,
        )

    def _metadata(self, name: str, step: int) -> dict[str, str]:
        plan, examples = self.plan, self.dataset.examples
        dirs: dict[str, dict[str, int]] = {}
        for example in examples:
            entry = dirs.setdefault(example.group, {"n_repeats": example.repeats, "img_count": 0})
            entry["img_count"] += 1
        return training_metadata(
            self.config,
            parts=self.parts,
            progress=Progress(
                step=step,
                total_steps=plan.total_steps,
                epoch=-(-step // plan.steps_per_epoch),
                num_epochs=plan.num_epochs,
                started_at=self.started,
                finished_at=time.time(),
                batches_per_epoch=self.dataset.steps_per_epoch(plan.batch_size),
                num_train_images=plan.samples_per_epoch,
            ),
            dataset_dirs=dirs,
            tag_frequency=tag_frequency(examples),
            bucket_table=self.dataset.bucket_table(),
            aspect_error=self.dataset.aspect_error(),
            learning_rates=self.rates,
            output_name=name,
            session_id=self.session,
            precision=self.precision,
        )
