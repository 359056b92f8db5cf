"""The reference for pictures: diffusers' own pipelines around modules that sdlora has loaded."""

from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from sdlora.families import Parts


def their_pipeline(parts: Parts, scheduler: Any) -> Any:
    """Builds a diffusers pipeline around these very modules, adapters included."""
    modules = {"unet": parts.denoiser, "vae": parts.vae, "scheduler": scheduler, **parts.text_encoders}
    modules |= {name.replace("text_encoder", "tokenizer"): tokenizer for name, tokenizer in parts.tokenizers.items()}
    if parts.family.name == "sdxl":
        pipe = StableDiffusionXLPipeline(**modules, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
