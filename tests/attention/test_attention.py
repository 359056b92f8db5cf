import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from sdlora.attention import products
from sdlora.attention.choose import CPU_KERNELS, Fastest
from sdlora.data.cache import Cache
from sdlora.training.kernels import install_attention

SHAPES = [(1, 2, 64, 64, 40), (2, 3, 50, 77, 24), (1, 2, 33, 5, 80), (2, 1, 7, 1, 160)]


def inputs(batch, heads, n, m, d, spread=1.0):
    rng = torch.Generator().manual_seed(0)

    def one(tokens):
        x = torch.randn(batch, tokens, heads, d, generator=rng) * spread
        return x.bfloat16().transpose(1, 2).requires_grad_()

    return [one(n), one(m), one(m)], torch.randn(batch, heads, n, d, generator=rng).bfloat16()


def results(kernel, tensors, pull):
    output = kernel(*tensors)
    return [output, *torch.autograd.grad(output, tensors, pull)]


@pytest.mark.parametrize("block", [1 << 10, 4 << 20])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_in_products_points_where_fp32_does(monkeypatch, shape, spread, block):
    monkeypatch.setattr(products, "BLOCK_BYTES", block)
    tensors, pull = inputs(*shape, spread=spread)
    exact = results(
        F.scaled_dot_product_attention, [t.detach().float().requires_grad_() for t in tensors], pull.float()
    )
    torchs = results(F.scaled_dot_product_attention, tensors, pull)
    ours = results(products.attention, tensors, pull)
    for name, a, b, c in zip(("output", "query", "key", "value"), ours, torchs, exact, strict=True):
        if c.norm() < 1e-3:  # one key: nothing flows to the scores
            continue
        error, usual = ((x.float() - c).norm() / c.norm() for x in (a, b))
        # 0.02 is a cosine of 0.9998; a spread of 2.5 means scores that differ by 6 and more.
        assert error <= 0.02 and error <= 3.5 * max(usual, 0.003), (name, float(error), float(usual))


def test_scores_too_far_apart_are_refused_and_left_to_torch():
    tensors, pull = inputs(1, 1, 40, 40, 16, spread=1.0)
    with torch.no_grad():
        tensors[0] *= 30
        tensors[1] *= 30
        tensors[1][0, 0, 1] = 60 * tensors[0][0, 0, 0]  # a key that the guess does not look at
    with pytest.raises(OverflowError, match="too far apart"):
        products.attention(*tensors)
    choice = Fastest(CPU_KERNELS)
    choice.restore({"40 40 1 16": "products"})
    got = results(choice, tensors, pull)
    torch.testing.assert_close(got, results(F.scaled_dot_product_attention, tensors, pull))
    assert choice.choices() == {"40 40 1 16": "sdpa"}


def test_a_second_backward_pass_is_refused():
    tensors, pull = inputs(*SHAPES[0])
    output = products.attention(*tensors)
    torch.autograd.grad(output, tensors, pull, retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        torch.autograd.grad(output, tensors, pull)


def test_the_choice_is_made_once_a_shape_and_can_be_carried_over():
    calls = []

    def slow(query, key, value):
        calls.append("slow")
        for _ in range(40):
            F.scaled_dot_product_attention(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    def quick(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    def wrong(query, key, value):
        return query * 0.5

    choice = Fastest({"slow": slow, "wrong": wrong, "quick": quick})
    tensors, _ = inputs(1, 2, 256, 256, 40)
    choice(*tensors)
    assert choice.choices() == {"256 256 2 40": "quick"}
    count = len(calls)
    choice(*tensors)
    assert len(calls) == count
    with torch.no_grad():
        choice(*tensors)
    assert len(calls) == count + 1  # pictures are drawn by the standard
    other = Fastest({"slow": slow, "quick": quick})
    other.restore(choice.choices() | {"1 1 1 1": "gone"})
    assert other.choices() == choice.choices()


@pytest.mark.parametrize("linear", [False, True])
def test_the_processor_agrees_with_diffusers(linear):
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        use_linear_projection=linear,
        layers_per_block=1,
    )
    x, states = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 7, 16)

    def run():
        y = denoiser(x, torch.tensor([3, 500]), encoder_hidden_states=states, return_dict=False)[0]
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    before = run()
    assert install_attention(denoiser, torch.float32) is None
    kinds = {type(p).__name__ for p in denoiser.attn_processors.values()}
    assert kinds == {"Processor"}
    torch.testing.assert_close(run(), before)


def test_what_was_chosen_once_is_chosen_again_by_the_next_run_on_this_machine(tmp_path, monkeypatch):
    def unet():
        return UNet2DConditionModel(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=4,
            layers_per_block=1,
        ).to(torch.bfloat16)

    first = install_attention(unet(), torch.bfloat16, Cache(tmp_path))
    qkv = [torch.randn(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    monkeypatch.setattr(Fastest, "_measure", lambda self, *x: "products")
    first(*qkv)
    assert first.choices() == {"8 8 2 4": "products"}
    monkeypatch.setattr(Fastest, "_measure", lambda self, *x: "sdpa")
    second = install_attention(unet(), torch.bfloat16, Cache(tmp_path))
    second(*qkv)
    assert second.choices() == first.choices()
    torch.set_num_threads(torch.get_num_threads() + 1)  # with which other kernels may be quicker
    try:
        third = install_attention(unet(), torch.bfloat16, Cache(tmp_path))
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert third.choices() == {}
    assert install_attention(unet(), torch.bfloat16, Cache(tmp_path), choose=False) is None


def test_a_choice_within_a_checkpointed_block_is_no_part_of_the_block():
    choice = Fastest({"sdpa": CPU_KERNELS["sdpa"], "products": CPU_KERNELS["products"]})
    tensors, _ = inputs(1, 2, 64, 64, 40)
    expected = torch.autograd.grad(CPU_KERNELS["sdpa"](*tensors).square().sum(), tensors)
    y = checkpoint(choice, *tensors, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), tensors)
    assert len(choice.chosen) == 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
