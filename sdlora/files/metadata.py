"""What a LoRA file says about itself, in the words of kohya's trainer, for those are what every program looks for.

One function for each group of keys, so that a group can be read beside its row in the format's description. A value
that we do not know is the four letters "None", as kohya writes it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdlora import __version__
from sdlora.config import Config
from sdlora.config_io import to_toml
from sdlora.files.shareable import repository, shareable, without_folders

if TYPE_CHECKING:
    from sdlora.families import Parts


@dataclass(frozen=True)
class Progress:
    """How far a run is when a file is written.

    Attributes:
        step: optimizer steps done.
        total_steps: optimizer steps planned.
        epoch: epochs begun.
        num_epochs: epochs planned.
        started_at: Unix time in seconds.
        finished_at: Unix time in seconds, or `None` while unknown.
        batches_per_epoch: batches, not steps.
        num_train_images: pictures in an epoch, repeats counted.
    """

    step: int
    total_steps: int
    epoch: int
    num_epochs: int
    started_at: float
    finished_at: float | None
    batches_per_epoch: int
    num_train_images: int


def training_metadata(
    config: Config,
    *,
    parts: Parts,
    progress: Progress,
    dataset_dirs: Mapping[str, Mapping[str, int]],
    tag_frequency: Mapping[str, Mapping[str, int]],
    bucket_table: Mapping[tuple[int, int], int],
    aspect_error: float,
    learning_rates: Mapping[str, float],
    output_name: str,
    session_id: int,
    precision: str,
) -> dict[str, str]:
    """Returns the metadata of a LoRA file, hashes excepted: `ss_*`, `modelspec.*` and `sdlora_*`.

    Args:
        config: the settings as the user gave them.
        parts: the base; its family, name, prediction type and resolution are written.
        progress: how far the run is.
        dataset_dirs: by folder name: `n_repeats` and `img_count`.
        tag_frequency: by folder name: how often each tag occurs.
        bucket_table: pictures, repeats counted, by (width, height) in pixels.
        aspect_error: mean difference of width / height between a picture and its bucket.
        learning_rates: full learning rate by component, as resolved; `denoiser` and perhaps text encoders.
        output_name: stem of the file; WebUIs call the LoRA by it.
        session_id: a number that all files of one session share.
        precision: arithmetic used: bf16, fp16 or fp32.

    Source: sd-scripts' `train_network.py` and `sai_model_spec.py`, version 1.0.1 of the latter's specification.
    """
    output_name = output_name.lstrip("{")  # the WebUI would parse it as JSON and then fail to show it
    resolution = config.data.resolution or parts.resolution
    started = {
        "ss_session_id": session_id,
        "ss_training_started_at": float(progress.started_at),
        "ss_training_finished_at": progress.finished_at,
        "ss_output_name": output_name,
        "ss_training_comment": None,
        "ss_sd_scripts_commit_hash": None,
    }
    values: dict[str, Any] = {
        **started,
        **_progress(progress),
        **_learning_rates(config, learning_rates, progress.total_steps),
        **_network(config),
        **_base_model(config, parts),
        **_precision(config, precision),
        **_loss(config),
        **_captions(config),
        **_validation(),
        **_data(config, resolution, bucket_table),
        **_tables(dataset_dirs, tag_frequency, bucket_table, aspect_error),
        **_ours(config, parts),
        **_modelspec(config, parts, progress, output_name, resolution),
    }
    # Names of files may hold bytes that are no text; the header must be UTF-8.
    return {key: str(value).encode("utf-8", "replace").decode("utf-8") for key, value in values.items()}


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "ss_steps": progress.step,
        "ss_max_train_steps": progress.total_steps,
        "ss_epoch": progress.epoch,
        "ss_num_epochs": progress.num_epochs,
        "ss_num_batches_per_epoch": progress.batches_per_epoch,
        "ss_num_train_images": progress.num_train_images,
        "ss_num_reg_images": 0,
        "ss_num_validation_images": 0,
    }


def _learning_rates(config: Config, rates: Mapping[str, float], total_steps: int) -> dict[str, Any]:
    settings = config.optimizer
    encoders = [rate for component, rate in rates.items() if component != "denoiser"]
    warmup = int(settings.warmup * total_steps)
    named = {"constant": "constant_with_warmup"} if warmup else {}
    classes = {"adamw": "torch.optim.adamw.AdamW", "adamw8bit": "sdlora.training.adamw8bit.AdamW8bit"}
    given = f"weight_decay={settings.weight_decay},betas={(settings.beta1, settings.beta2)}"
    return {
        "ss_learning_rate": rates["denoiser"],
        "ss_unet_lr": rates["denoiser"],
        "ss_text_encoder_lr": encoders[0] if len(encoders) == 1 else encoders or None,
        "ss_lr_scheduler": named.get(settings.schedule, settings.schedule),
        "ss_lr_warmup_steps": warmup,
        "ss_optimizer": f"{classes[settings.optimizer]}({given})",
        "ss_max_grad_norm": config.train.max_grad_norm,
    }


def _network(config: Config) -> dict[str, Any]:
    lora = config.lora
    values: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": lora.rank,
        "ss_network_alpha": float(lora.alpha or lora.rank),
        "ss_network_dropout": lora.dropout or None,
    }
    if lora.targets == "conv":
        rank = lora.conv_rank or lora.rank
        alpha = lora.conv_alpha if lora.conv_rank or lora.conv_alpha else lora.alpha
        values["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(alpha or rank))})
    return values


def _base_model(config: Config, parts: Parts) -> dict[str, Any]:
    facts = parts.family.facts(parts.schedule.prediction)
    return {
        "ss_v2": facts["ss_v2"],
        "ss_base_model_version": facts["ss_base_model_version"],
        "ss_sd_model_name": repository(parts.name),
        "ss_sd_model_hash": None,
        "ss_new_sd_model_hash": None,
        "ss_vae_name": None,
        "ss_vae_hash": None,
        "ss_new_vae_hash": None,
        "ss_clip_skip": config.base.clip_skip,
        "ss_max_token_length": config.base.max_tokens if config.base.max_tokens > 75 else None,
    }


def _precision(config: Config, precision: str) -> dict[str, Any]:
    return {
        "ss_mixed_precision": "no" if precision == "fp32" else precision,
        "ss_full_fp16": False,
        "ss_fp8_base": False,
        "ss_fp8_base_unet": False,
        "ss_gradient_checkpointing": config.train.gradient_checkpointing in ("attention", "all"),
        "ss_gradient_accumulation_steps": config.train.accumulation,
        "ss_lowram": False,
        "ss_cache_latents": True,
    }


def _loss(config: Config) -> dict[str, Any]:
    return {
        "ss_seed": config.train.seed,
        "ss_noise_offset": config.train.noise_offset or None,
        "ss_noise_offset_random_strength": False,
        "ss_adaptive_noise_scale": None,
        "ss_multires_noise_iterations": None,
        "ss_multires_noise_discount": None,
        "ss_zero_terminal_snr": False,
        "ss_min_snr_gamma": config.train.min_snr_gamma or None,
        "ss_debiased_estimation": False,
        "ss_ip_noise_gamma": None,
        "ss_ip_noise_gamma_random_strength": False,
        "ss_loss_type": "l2",
        "ss_huber_schedule": None,
        "ss_huber_scale": None,
        "ss_huber_c": None,
        "ss_scale_weight_norms": None,
    }


def _captions(config: Config) -> dict[str, Any]:
    return {
        "ss_caption_dropout_rate": config.data.caption_dropout,
        "ss_caption_dropout_every_n_epochs": 0,
        "ss_caption_tag_dropout_rate": 0.0,
        "ss_face_crop_aug_range": None,
        "ss_prior_loss_weight": 1.0,
        "ss_resize_interpolation": None,
    }


def _validation() -> dict[str, Any]:
    return {
        "ss_validation_seed": None,
        "ss_validation_split": 0.0,
        "ss_max_validation_steps": None,
        "ss_validate_every_n_epochs": None,
        "ss_validate_every_n_steps": None,
    }


def _data(config: Config, resolution: int, bucket_table: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    data = config.data
    sides = [side for size in bucket_table for side in size] if data.buckets else []
    return {
        "ss_batch_size_per_device": data.batch_size,
        "ss_total_batch_size": data.batch_size * config.train.accumulation,
        "ss_resolution": (resolution, resolution),
        "ss_color_aug": False,
        "ss_flip_aug": data.flip,
        "ss_random_crop": data.crop == "random",
        "ss_shuffle_caption": data.shuffle_tags,
        "ss_enable_bucket": data.buckets,
        "ss_bucket_no_upscale": data.max_upscale == 1,
        "ss_min_bucket_reso": min(sides, default=None),
        "ss_max_bucket_reso": max(sides, default=None),
        "ss_keep_tokens": data.keep_tags,
    }


def _tables(
    dataset_dirs: Mapping[str, Mapping[str, int]],
    tag_frequency: Mapping[str, Mapping[str, int]],
    bucket_table: Mapping[tuple[int, int], int],
    aspect_error: float,
) -> dict[str, Any]:
    """The values that are JSON; WebUIs fail on them unless they are objects."""
    buckets = {
        str(i): {"resolution": [width, height], "count": count}
        for i, ((width, height), count) in enumerate(sorted(bucket_table.items()))
    }
    return {
        "ss_dataset_dirs": json.dumps({name: dict(facts) for name, facts in dataset_dirs.items()}),
        "ss_reg_dataset_dirs": json.dumps({}),
        "ss_tag_frequency": json.dumps({name: dict(tags) for name, tags in tag_frequency.items()}),
        "ss_bucket_info": json.dumps({"buckets": buckets, "mean_img_ar_error": aspect_error}),
    }


def _ours(config: Config, parts: Parts) -> dict[str, Any]:
    return {
        "sdlora_version": __version__,
        "sdlora_base": shareable(parts.name),
        "sdlora_config": to_toml(without_folders(config)),
    }


def _modelspec(config: Config, parts: Parts, progress: Progress, output_name: str, resolution: int) -> dict[str, Any]:
    moment = progress.started_at if progress.finished_at is None else progress.finished_at
    date = datetime.datetime.fromtimestamp(moment, datetime.UTC).replace(microsecond=0, tzinfo=None)
    facts = parts.family.facts(parts.schedule.prediction)
    values = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": facts["modelspec.architecture"],
        "modelspec.implementation": facts["modelspec.implementation"],
        "modelspec.title": output_name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": date.isoformat(),
        "modelspec.prediction_type": "v" if parts.schedule.prediction == "v_prediction" else "epsilon",
    }
    if config.data.trigger:
        values["modelspec.trigger_phrase"] = config.data.trigger
    if config.base.clip_skip > 1:
        values["modelspec.encoder_layer"] = str(config.base.clip_skip)
    return values
