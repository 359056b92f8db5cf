"""The SD 1.x family agrees with diffusers, for both kinds of VAE."""

import pytest
import torch
from diffusers import DDIMScheduler
from pipelines import their_pipeline

from sdlora.adapters import Lora, find_layers, inject


def test_prompts_are_encoded_as_the_pipeline_does(tiny_parts):
    parts = tiny_parts
    pipe = their_pipeline(parts, DDIMScheduler(steps_offset=1, clip_sample=False))
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt("a castle on a hill", "cpu", 1, False)
        torch.testing.assert_close(parts.family.encode_prompts(parts, ["a castle on a hill"], 1)["states"], theirs)


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(tiny_parts):
    # diffusers' own clip_skip looks for a module that transformers 5 no longer has, so the layers are run here.
    encoder, tokenizer = tiny_parts.text_encoders["text_encoder"], tiny_parts.tokenizers["text_encoder"]
    tokens = tokenizer(["a castle"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        two = tiny_parts.family.encode_prompts(tiny_parts, ["a castle"], 2)["states"]
        penultimate = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(two, encoder.final_layer_norm(penultimate))
        encoder.encoder.layers = encoder.encoder.layers[:-1]
        torch.testing.assert_close(two, tiny_parts.family.encode_prompts(tiny_parts, ["a castle"], 1)["states"])


def test_latents_are_scaled_and_come_back(tiny_parts, nano_parts):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = tiny_parts.family.encode_images(tiny_parts, pixels)
        posterior = tiny_parts.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.18215)
        torch.testing.assert_close(std, posterior.std * 0.18215)
        expected = tiny_parts.vae.decode(posterior.mean).sample.clamp(-1, 1)
        torch.testing.assert_close(tiny_parts.family.decode_latents(tiny_parts, mean), expected, atol=1e-4, rtol=1e-4)
        mean, std = nano_parts.family.encode_images(nano_parts, pixels)
    assert mean.shape == (2, 4, 8, 8)
    assert std is None


def test_nano_vae_keeps_a_picture(nano_parts):
    ramp = torch.linspace(-1, 1, 128)
    picture = torch.stack([ramp.expand(128, 128), ramp.expand(128, 128).T, torch.zeros(128, 128)])[None]
    with torch.no_grad():
        mean, _ = nano_parts.family.encode_images(nano_parts, picture)
        back = nano_parts.family.decode_latents(nano_parts, mean)
    assert (back - picture).square().mean().sqrt() < 0.15


@pytest.mark.parametrize(("word", "count"), [("attention", 128), ("attention+ff", 192), ("conv", 278)])
def test_target_words_select_kohyas_layers(tiny_parts, word, count):
    assert len(find_layers(tiny_parts.denoiser, tiny_parts.family.targets[word])) == count


def test_text_encoder_targets_are_six_a_layer(tiny_parts):
    encoder = tiny_parts.text_encoders["text_encoder"]
    layers = find_layers(encoder, tiny_parts.family.text_encoder_targets)
    assert len(layers) == 3 * 6
    keys = {tiny_parts.family.lora_key("text_encoder", path) for path in layers}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in keys
    assert tiny_parts.family.lora_key("text_encoder", "text_model.encoder.layers.0.mlp.fc1") in keys


def test_gradient_checkpointing_changes_no_gradient(tiny_parts):
    parts = tiny_parts
    layers = find_layers(parts.denoiser, parts.family.targets["attention+ff"])
    adapters = inject(parts.denoiser, layers, lambda path, layer: Lora(layer, 2))
    parts.denoiser.train()
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 800])
    condition = {"states": torch.randn(2, 77, 16)}

    def gradients():
        for adapter in adapters.values():
            adapter.up.grad = None
        parts.family.denoise(parts, noisy, t, condition).square().mean().backward()
        return {path: a.up.grad.clone() for path, a in adapters.items()}

    plain = gradients()
    parts.denoiser.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)
