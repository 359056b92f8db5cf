"""What is trained, how one step is taken, and how a course is left and taken up again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora import families
from sdlora.atomic import replacing
from sdlora.diffusion.schedule import Schedule
from tools.pretrain_nano import model, twin
from tools.pretrain_nano.batches import Batch, batch
from tools.pretrain_nano.crew import Crew
from tools.pretrain_nano.latents import Latents
from tools.pretrain_nano.twin import Twin

GAMMA, FLOOR = 5.0, 0.2
LAST_PART = 0.2
"""Share of the samples during which the learning rate falls and the text encoder is frozen."""
EMA_POWER = 6.94
"""Exponent of the moving average; the average then reaches back over about a tenth of all steps so far.

Source: Karras et al. 2024, arXiv:2312.02696, equation 127 and section 3.1 (sigma_rel 0.10)."""


@dataclass(frozen=True)
class Settings:
    """What decides the result. Two runs with the same settings and data agree."""

    samples: int
    size: int = 48
    learning_rate: float = 1.5e-3
    text_learning_rate: float = 5e-4
    warm_up_steps: int = 500
    views: int = 1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of steps in all."""
        return self.samples // self.size

    @property
    def turn(self) -> int:
        """First step of the last part."""
        return round(self.steps * (1 - LAST_PART))

    def pace(self, step: int) -> float:
        """Factor on the learning rates at a step, in [0, 1]."""
        if step < self.turn:
            return min(1.0, (step + 1) / self.warm_up_steps)
        return 1 - (step - self.turn) / (self.steps - self.turn)


def loss_weight(snr: Tensor) -> Tensor:
    """Returns the factor on each sample's squared error of the noise, (B,).

    Measured in the picture instead of the noise, an error counts min(max(snr, 0.2), 5) times. The cap is min-SNR's.
    The floor is what makes words count: what a picture shows is decided while the noise drowns it, and there a plain
    loss in the noise hardly weighs anything.

    Source: Hang et al. 2023, arXiv:2303.09556 (cap); Salimans and Ho 2022, arXiv:2202.00512, section 4 (floor).
    """
    return snr.clamp(FLOOR, GAMMA) / snr


ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
"""What the optimizers remember of each weight."""


HALVES = 2
"""Parts of the matrices, each with a Muon and a thread of its own: its products are too small to be split."""


def _muon(matrices: list[Tensor], top: float) -> torch.optim.Muon:
    groups = [{"params": matrices, "top": top}]
    return torch.optim.Muon(groups, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


class Base(nn.Module):
    """What is trained: the text encoder and the denoiser."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text = model.new_text_encoder()
        self.denoiser = model.new_denoiser()
        self.schedule = Schedule.from_config(json.loads((model.NANO / "scheduler/scheduler_config.json").read_text()))
        self.working: Twin | None = None

    def compute_in_bf16(self, folder: Path) -> None:
        """Lets a bf16 twin do the denoiser's work, where the processor is made for it; see `twin.py`."""
        if twin.supported():
            self.working = Twin(self.denoiser, folder)
            self.text.set_attn_implementation("eager")  # in bf16 a third of the time of the fused one

    def gradients(self, b: Batch, ids: Tensor, share: slice) -> float:
        """Puts the gradients of a part of a batch into the parameters.

        Args:
            b: the whole batch, for its size decides how much a sample counts.
            ids: its captions, (B, 77).
            share: which samples are computed here.

        Returns:
            Their part of the batch's mean loss.
        """
        if self.working:
            self.working.follow()
        self.zero_grad()
        mine = Batch(b.latents[share], b.captions[share], b.noise[share], b.timesteps[share], b.weights[share])
        loss = self.losses(mine, ids[share]).sum() / len(ids)
        loss.backward()
        if self.working:
            self.working.hand_over_gradients()
        return loss.item()

    def losses(self, b: Batch, ids: Tensor) -> Tensor:
        """Returns each sample's weighted loss, (B,)."""
        device = next(self.denoiser.parameters()).device
        t = b.timesteps.to(device)
        clean, noise = b.latents.to(device), b.noise.to(device)
        schedule = self.schedule.to(device)
        seen = schedule.add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or self.working is not None):
            states = self.text(ids.to(device)).last_hidden_state
            guess = (self.working or self.denoiser)(seen, t, states, return_dict=False)[0]
        errors = (guess.float() - noise).square().mean(1) * b.weights.to(device)
        return errors.flatten(1).mean(1) * loss_weight(schedule.snr(t))


class Course:
    """A run: the networks, their moving average, the optimizer, and where it stands."""

    def __init__(self, settings: Settings, work: Path, device: torch.device) -> None:
        self.settings, self.work, self.device = settings, work, device
        self.base = Base(settings.seed).to(device)
        self.average = {name: value.detach().clone() for name, value in self.base.named_parameters()}
        if device.type == "cpu":
            self.base.share_memory()  # before any view of a weight is made
        self.matrices = {
            f"denoiser.{name}": nn.Parameter(p.detach().flatten(1))
            for name, p in self.base.denoiser.named_parameters()
            if p.ndim > 1 and not name.startswith(("conv_in", "conv_out", "time_embedding"))
        }
        others = [p for name, p in self.base.named_parameters() if name not in self.matrices]
        words = list(self.base.text.parameters())
        known = {id(p) for p in words}
        groups = [
            {"params": [p for p in others if id(p) not in known], "top": settings.learning_rate},
            {"params": words, "top": settings.text_learning_rate},
        ]
        matrices = sorted(self.matrices.values(), key=Tensor.numel)
        self.optimizers = (
            *(_muon(matrices[n::HALVES], settings.learning_rate) for n in range(HALVES)),
            torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        )
        self.threads = ThreadPoolExecutor(HALVES, initializer=torch.set_num_threads, initargs=(1,))
        self.step = 0
        self.seconds = 0.0
        self.crew: Crew | None = None

    def advance(self, data: Latents, tokenizer) -> float:
        """Takes one step; returns its mean loss."""
        settings = self.settings
        self.base.text.requires_grad_(self.step < settings.turn)
        b = batch(data, self.step, settings.size, settings.seed, self.base.schedule)
        ids = model.token_ids(tokenizer, b.captions)
        loss = self.crew.gradients(b, ids) if self.crew else self.base.gradients(b, ids, slice(None))
        nn.utils.clip_grad_norm_(self.base.parameters(), 1.0)
        weights = dict(self.base.named_parameters())
        for name, matrix in self.matrices.items():
            matrix.grad = weights[name].grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["top"] * settings.pace(self.step)
        list(self.threads.map(lambda optimizer: optimizer.step(), self.optimizers))
        keep = (1 - 1 / (self.step + 1)) ** (EMA_POWER + 1)
        trained = list(self.base.parameters())
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in trained], 1 - keep)
        self.step += 1
        return loss

    def save(self, name: str) -> None:
        """Writes everything that is needed to go on, in one piece."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.base.named_parameters()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for optimizer in self.optimizers:
            for k, p in self._optimized():
                for kind, value in optimizer.state.get(p, {}).items():
                    tensors[f"{kind}.{k}"] = value
        settings = self.settings
        where = {"step": self.step, "seconds": self.seconds, "size": settings.size}
        where |= {"samples": settings.samples, "seed": settings.seed}
        with replacing(self.work / name) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"where": json.dumps(where)})

    def load(self, name: str) -> int:
        """Takes up a saved state; returns the number of samples that it was trained for.

        Raises:
            SystemExit: it was trained with another seed, whose order of pictures is another one.
        """
        with safe_open(self.work / name, "pt", device=str(self.device)) as file:
            where = json.loads(file.metadata()["where"])
            if where["seed"] != self.settings.seed:
                raise SystemExit(f"{self.work / name} was trained with seed {where['seed']}; use another --work")
            # With another batch size: where as many samples were seen.
            self.step = int(where["step"] * where["size"] // self.settings.size)
            self.seconds = where["seconds"]
            kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        with torch.no_grad():
            for name, p in self.base.named_parameters():
                p.copy_(kept.pop(f"weights.{name}"))
                self.average[name].copy_(kept.pop(f"average.{name}"))
        owner = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, p in self._optimized():
            kinds = MUON if name in self.matrices else ADAMW
            if f"{kinds[0]}.{name}" in kept:
                owner[id(p)].state[p] = {kind: kept[f"{kind}.{name}"] for kind in kinds}
        return where["samples"]

    def _optimized(self) -> list[tuple[str, Tensor]]:
        """Lists what the optimizers hold: a matrix in place of each weight that Muon trains."""
        return [(name, self.matrices.get(name, p)) for name, p in self.base.named_parameters()]

    def begin_with(self, base: Path, samples: int) -> None:
        """Begins with the weights of a finished base; the optimizers begin to remember anew.

        Args:
            base: a diffusers folder as `model.save_base` writes it.
            samples: how many it has seen.
        """
        self.step = samples // self.settings.size
        parts = families.load_parts(families.Base(str(base), base, "given"))
        self.base.text.load_state_dict(parts.text_encoders["text_encoder"].state_dict())
        self.base.denoiser.load_state_dict(parts.denoiser.state_dict())
        for name, p in self.base.named_parameters():
            self.average[name].copy_(p.detach())

    def averaged(self) -> Base:
        """Returns the moving average as networks of their own, for drawing and shipping."""
        copy = Base(self.settings.seed).to(self.device).eval().requires_grad_(False)
        copy.load_state_dict(self.average, strict=False)
        return copy
