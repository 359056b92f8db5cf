"""What Hu et al. claim of LoRA, as tests, and agreement with peft."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from sdlora.adapters import Lora, Target, adapters_in, eject, find_layers, inject, merge, strength


class Block(nn.Module):
    """A Linear, a 1 x 1, a 3 x 3 and a strided convolution in a row."""

    def __init__(self):
        super().__init__()
        self.point = nn.Conv2d(4, 8, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.strided(torch.relu(self.wide(self.point(x))))
        return self.linear(x.permute(0, 2, 3, 1))


def adapted(alpha=3.0, rank=2, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block().to(dtype)
    adapters = inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, rank, alpha))
    return model, adapters


def randomize(adapters):
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.copy_(0.3 * torch.randn(adapter.up.shape, generator=rng))


def state_hash(model):
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def test_at_the_start_the_adapted_model_is_the_base_exactly():
    torch.manual_seed(0)
    base = Block().requires_grad_(False)  # torch may pick another kernel for a weight that trains: 1e-8 apart
    model, _ = adapted()
    assert torch.equal(model(x), base(x))


def test_merging_equals_running_with_the_adapter():
    model, adapters = adapted()
    randomize(adapters)
    running = model(x)
    assert merge(model) == 4
    assert not adapters_in(model)
    difference = (model(x) - running).abs().max() / running.abs().max()
    assert difference <= 1e-5


def test_delta_weight_is_what_forward_adds_at_any_strength():
    model, adapters = adapted()
    randomize(adapters)
    with strength(adapters, 0.5):
        running = model(x)
    plain = copy.deepcopy(model)
    eject(plain)
    with torch.no_grad():
        for path, adapter in adapters.items():
            plain.get_submodule(path).weight += 0.5 * adapter.delta_weight()
    torch.testing.assert_close(plain(x), running)


def test_strength_zero_is_the_base_exactly_and_is_restored():
    model, adapters = adapted()
    randomize(adapters)
    base = copy.deepcopy(model)
    eject(base)
    with strength(adapters, 0.0):
        assert torch.equal(model(x), base(x))
    assert all(a.strength == 1.0 for a in adapters.values())


def test_eject_restores_the_state_dict_bit_for_bit_after_training():
    torch.manual_seed(0)
    before = state_hash(Block())
    model, adapters = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(a.up.abs().max() > 0 for a in adapters.values())
    assert eject(model) == 4
    assert state_hash(model) == before


def test_only_adapters_get_gradients():
    model, _ = adapted()
    model(x).mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"{layer}.{part}" for layer in ("point", "wide", "strided", "linear") for part in ("down", "up")
    }


def test_factors_are_fp32_masters_whatever_the_dtype_of_the_base():
    model, adapters = adapted(dtype=torch.bfloat16)
    assert all(a.down.dtype == a.up.dtype == torch.float32 for a in adapters.values())
    randomize(adapters)
    output = model(x.bfloat16())
    assert output.dtype == torch.bfloat16
    merge(model)
    torch.testing.assert_close(model(x.bfloat16()), output, rtol=0.05, atol=0.05)


def test_several_adapters_on_one_layer_add_up():
    model, first = adapted()
    randomize(first)
    second = inject(model, find_layers(model, [Target(endings=("linear",))]), lambda p, layer: Lora(layer, 1, 4.0))
    randomize(second)
    second["linear"].strength = -0.5
    running = model(x)
    deltas = first["linear"].delta_weight() - 0.5 * second["linear"].delta_weight()
    weight = model.linear.weight.clone()
    merge(model)
    torch.testing.assert_close(model.linear.weight, weight + deltas)
    torch.testing.assert_close(model(x), running)


def test_dropout_acts_in_training_only():
    layer = Lora(nn.Linear(64, 4), 2, dropout=0.5)
    nn.init.ones_(layer.up)
    v = torch.ones(1, 64)
    layer.eval()
    assert torch.equal(layer(v), layer(v))
    layer.train()
    assert not torch.equal(layer(v), layer(v))


def test_start_values_follow_the_generator():
    def make(seed):
        return Lora(nn.Linear(8, 8), 4, generator=torch.Generator().manual_seed(seed)).down

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
    bound = 1 / 8**0.5  # kaiming_uniform with a = sqrt(5): sqrt(6 / (1 + 5)) / sqrt(fan_in)
    assert make(1).abs().max() <= bound


@pytest.mark.parametrize(("rank", "dropout", "match"), [(0, 0.0, "rank must be"), (4, 1.0, "dropout must be")])
def test_impossible_settings_are_refused(rank, dropout, match):
    with pytest.raises(ValueError, match=match):
        Lora(nn.Linear(2, 2), rank, dropout=dropout)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="reflect")]
)
def test_layers_without_a_lora_form_are_refused(layer):
    with pytest.raises(TypeError, match="LoRA"):
        Lora(layer, 2)


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="to_typo"):
        find_layers(Block(), [Target(endings=("to_typo",))])


@pytest.mark.parametrize("rule", [Target(kernels="1x1", layers=("Conv2d",)), Target(endings=("point",))])
def test_rules_select_by_kernel_and_name(rule):
    assert list(find_layers(Block(), [rule])) == ["point"]


def test_rules_select_whole_path_components():
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2), "not_to_q": nn.Linear(2, 2)})
    assert list(find_layers(model, [Target(endings=("to_q",))])) == ["to_q"]


@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_outputs_and_gradients_agree_with_peft(alpha):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(
        Block(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["point", "wide", "strided", "linear"])
    )
    torch.manual_seed(0)
    ours = Block()
    adapters = inject(ours, find_layers(ours, [Target()]), lambda path, layer: Lora(layer, 4, alpha))
    with torch.no_grad():
        for path, adapter in adapters.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(2))
            adapter.down.copy_(layer.lora_A["default"].weight)
            adapter.up.copy_(layer.lora_B["default"].weight)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b)
    a.square().mean().backward()
    b.square().mean().backward()
    for path, adapter in adapters.items():
        layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.down.grad, layer.lora_A["default"].weight.grad, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(adapter.up.grad, layer.lora_B["default"].weight.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_gpt2_classifier_learns_with_our_adapters_and_agrees_with_peft():
    """LoRA is not only for pictures: transformers' transposed Conv1D layers, as in the usual GPT-2 recipe."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=16,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config).eval()
    reference = copy.deepcopy(model)
    layers = find_layers(model, [Target(endings=("c_attn",))])
    adapters = inject(model, layers, lambda path, layer: Lora(layer, 4, 32, dropout=0.1))
    model.score.requires_grad_(True)  # a new task's head is trained whole
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    tokens = torch.randint(1, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    labels = (tokens[:, 0] > 25).long()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    model.train()
    losses = []
    for _ in range(40):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, before)

    peft = get_peft_model(
        reference, LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    ).eval()
    model.eval()
    with torch.no_grad():
        peft.base_model.model.score.modules_to_save["default"].weight.copy_(model.score.weight)
        for path, adapter in adapters.items():
            layer = peft.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_B["default"].weight.copy_(adapter.up)
    running = model(input_ids=tokens).logits
    torch.testing.assert_close(peft(input_ids=tokens).logits, running)
    merge(model)
    torch.testing.assert_close(model(input_ids=tokens).logits, running)
