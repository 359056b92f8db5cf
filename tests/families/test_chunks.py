"""Texts are cut, filled up and weighed as the WebUI does it, and short plain ones as the tokenizer alone does it."""

import math
import random
from itertools import chain

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.errors import ModelError
from sdlora.families.chunks import chunk, encode_chunks, num_tokens
from sdlora.families.emphasis import BREAK, parse_emphasis
from sdlora.families.loading import NANO
from sdlora.families.tokenizers import clip_tokenizer

WORD = "a "  # one token
TEXTS = ["", "a castle", "a castle on a hill, red (roof:1.2) [x] BREAK \\( snow", "ünïcode 😀, a\n b", WORD * 75]


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["pads with the end token", "pads with 0"])
def tokenizer(request):
    tokenizer = CLIPTokenizer.from_pretrained(NANO / "tokenizer")
    tokenizer.pad_token = request.param
    return tokenizer


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def tokens_of(tokenizer, chunked):
    """The tokens of each chunk without marks and padding; holds for texts that name no special token."""
    return [list(row[1 : row.index(tokenizer.eos_token_id)]) for row in chunked.ids]


def plain(tokenizer, text, max_chunks=None):
    return chunk(tokenizer, text, emphasis=False, max_chunks=max_chunks)


def weighed(tokenizer, text, max_chunks=None):
    return chunk(tokenizer, text, emphasis=True, max_chunks=max_chunks)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_chunks", [None, 1, 3])
def test_a_short_caption_has_the_ids_that_the_tokenizer_gives(tokenizer, text, max_chunks):
    theirs = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    chunked = plain(tokenizer, text, max_chunks)
    assert chunked.ids == (tuple(theirs),)
    assert chunked.weights == ((1.0,) * 77,)
    assert chunked.unseen == ""


@pytest.mark.parametrize("text", [WORD * 200, WORD * 60 + ", " + WORD * 100])
def test_with_one_chunk_a_long_caption_is_cut_where_the_tokenizer_cuts_it(tokenizer, text):
    theirs = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert plain(tokenizer, text, 1).ids == (tuple(theirs),)


def test_after_the_end_mark_comes_the_padding_token(tokenizer):
    chunked = weighed(tokenizer, "(a:1.5) BREAK")
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert chunked.ids == ((start, *plain_ids(tokenizer, "a"), end, *[pad] * 74),)
    assert chunked.weights == ((1.0, 1.5, *[1.0] * 75),)
    assert chunked.empty == (start, end, *[pad] * 75)
    assert weighed(tokenizer, "").ids == (chunked.empty,)


@pytest.mark.parametrize(("words", "sizes"), [(75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])])
def test_a_chunk_holds_75_tokens(tokenizer, words, sizes):
    for chunked in (plain(tokenizer, WORD * words), weighed(tokenizer, WORD * words)):
        assert [len(row) for row in tokens_of(tokenizer, chunked)] == sizes


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        (60, 20, [61, 20]),  # the comma is the 61st of 75 tokens: what follows it moves on
        (55, 30, [56, 30]),  # twenty tokens from the end, the farthest that counts
        (54, 30, [75, 10]),  # too far back
        (74, 5, [75, 5]),  # the comma itself is the last that fits
        (75, 5, [75, 6]),  # a comma that does not fit moves nothing
        (60, 14, [75]),  # all fits
        (60, 100, [61, 75, 25]),  # a comma counts in its own chunk only
    ],
)
def test_a_full_chunk_ends_at_a_comma_that_is_near(tokenizer, before, after, sizes):
    for make in (plain, weighed):
        chunked = make(tokenizer, WORD * before + ", " + WORD * after)
        assert [len(row) for row in tokens_of(tokenizer, chunked)] == sizes


def test_the_last_of_several_commas_counts_and_weights_move_with_their_words(tokenizer):
    chunked = weighed(tokenizer, WORD * 57 + ", " + WORD * 3 + ", (" + WORD * 20 + ":1.5)")
    assert [len(row) for row in tokens_of(tokenizer, chunked)] == [62, 20]
    assert chunked.weights == ((1.0,) * 77, (1.0, *[1.5] * 20, *[1.0] * 56))


def test_a_second_comma_that_does_not_fit_leaves_the_chunk_full(tokenizer):
    chunked = weighed(tokenizer, WORD * 60 + ", " + WORD * 14 + ", " + WORD * 5)
    assert [len(row) for row in tokens_of(tokenizer, chunked)] == [75, 6]


def test_a_break_forgets_the_comma_before_it(tokenizer):
    chunked = weighed(tokenizer, WORD * 60 + ", BREAK " + WORD * 76)
    assert [len(row) for row in tokens_of(tokenizer, chunked)] == [61, 75, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a BREAK b", ["a", "b"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK", ["a"]),
        ("BREAK", [""]),
        ("BREAK BREAK", ["", ""]),
        ("BREAKFAST", ["breakfast"]),
        ("(a BREAK b)", ["a break b"]),  # as in the WebUI, where brackets make it a word
    ],
)
def test_break_begins_a_chunk(tokenizer, text, words):
    expected = [plain_ids(tokenizer, word) for word in words]
    assert tokens_of(tokenizer, weighed(tokenizer, text)) == expected


def test_in_captions_brackets_and_break_are_words(tokenizer):
    text = "a (castle:1.3) BREAK [hill]"
    chunked = plain(tokenizer, text)
    assert tokens_of(tokenizer, chunked) == [plain_ids(tokenizer, text)]
    assert chunked.weights == ((1.0,) * 77,)


@pytest.mark.parametrize(
    ("text", "max_chunks", "kept", "unseen"),
    [
        (WORD * 74 + "Castle Tree, snow", 1, 75, "Tree, snow"),
        (WORD * 60 + ", " + WORD * 14 + "Tree", 1, 75, "Tree"),  # nothing is left free for a comma in the last chunk
        (WORD * 76, 1, 75, "a"),
        (WORD * 150 + "Tree", 2, 150, "Tree"),
        (WORD * 150 + "Tree", 3, 151, ""),
        (WORD * 150 + "Tree", None, 151, ""),
    ],
)
def test_what_finds_no_chunk_is_told(tokenizer, text, max_chunks, kept, unseen):
    for make in (plain, weighed):
        chunked = make(tokenizer, text, max_chunks)
        assert sum(len(row) for row in tokens_of(tokenizer, chunked)) == kept
        assert chunked.unseen == unseen


def test_unseen_text_has_no_marks(tokenizer):
    assert weighed(tokenizer, "a BREAK b (Red:1.2) [old] BREAK\ncastle", 1).unseen == "b Red old castle"
    assert weighed(tokenizer, "a BREAK BREAK", 1).unseen == ""
    assert weighed(tokenizer, WORD * 70 + "(" + WORD * 5 + "red Tree:1.2)", 1).unseen == "red Tree"


def test_tokens_are_counted_without_marks(tokenizer):
    assert [num_tokens(tokenizer, text) for text in ("", "a, a", WORD * 300)] == [0, 3, 300]


def test_any_text_is_cut_without_loss(tokenizer):
    rng = random.Random(0)
    atoms = [
        "(",
        ")",
        "[",
        "]",
        ":",
        "\\",
        ":1.2)",
        ":-3)",
        ":1..2)",
        " BREAK ",
        ", ",
        "red ",
        "ü",
        "😀",
        "\n",
        "castle ",
    ]
    longest = 0
    for _ in range(300):
        text = "".join(rng.choice(atoms) for _ in range(rng.choice([0, 3, 10, 60, 250])))
        for make, parts in ((plain, [text]), (weighed, [t for t, w in parse_emphasis(text) if (t, w) != BREAK])):
            chunked = make(tokenizer, text)
            assert all(len(row) == 77 for row in (*chunked.ids, *chunked.weights)), text
            assert all(math.isfinite(weight) for row in chunked.weights for weight in row), text
            found = list(chain.from_iterable(tokens_of(tokenizer, chunked)))
            assert found == [token for part in parts for token in plain_ids(tokenizer, part)], text
            longest = max(longest, len(chunked.ids))
            assert make(tokenizer, text, 2).ids[:1] == chunked.ids[:1], text
    assert longest > 3


@pytest.fixture(scope="module")
def encoder():
    return build(CLIPTextModel)


def build(kind, eos=2047):
    torch.manual_seed(2)
    model = kind(
        CLIPTextConfig(
            vocab_size=2048,
            hidden_size=16,
            intermediate_size=32,
            projection_dim=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            bos_token_id=2046,
            eos_token_id=eos,
            pad_token_id=2047,
        )
    ).eval()
    with torch.no_grad():  # fresh norms have mean 0, which no weight can move
        norm = getattr(model, "text_model", model).final_layer_norm
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0.5, 0.3)
    return model


def encode(model, chunked, layer=1, normed=True, pooled=False):
    with torch.no_grad():
        return encode_chunks(model, chunked, layer=layer, normed=normed, pooled=pooled, device="cpu")


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("normed", [True, False])
def test_one_chunk_without_weights_is_the_encoders_own_result_bit_for_bit(tokenizer, encoder, layer, normed):
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
        expected = output.hidden_states[-layer]
        if normed:
            expected = encoder.final_layer_norm(expected)
    if layer == 1 and normed:
        assert torch.equal(expected, output.last_hidden_state)
    states, pooled = encode(encoder, [plain(tokenizer, text) for text in TEXTS], layer, normed)
    assert torch.equal(states, expected)
    assert pooled is None


@pytest.mark.parametrize("layer", [1, 2])
def test_a_short_caption_has_the_states_that_the_family_gives(nano_parts, layer):
    model, tokenizer = (parts["text_encoder"] for parts in (nano_parts.text_encoders, nano_parts.tokenizers))
    with torch.no_grad():
        theirs = nano_parts.family.encode_prompts(nano_parts, ["a castle, a hill", ""], layer)["states"]
    states, _ = encode(model, [plain(tokenizer, text) for text in ("a castle, a hill", "")], layer)
    assert torch.equal(states, theirs)


def by_the_webui(model, chunked):
    """`process_tokens` and `EmphasisOriginal` of the WebUI, one chunk of one text at a time."""
    states = []
    for ids, weights in zip(chunked.ids, chunked.weights, strict=True):
        with torch.no_grad():
            z = model(torch.tensor([ids])).last_hidden_state
        mean = z.mean()
        z = z * torch.tensor([weights])[..., None]
        states.append(z * (mean / z.mean()))
    return torch.cat(states, dim=1)[0]


def test_weights_multiply_the_states_and_each_chunk_keeps_its_mean(tokenizer, encoder):
    texts = ["a (castle:1.5) on a hill BREAK [snow]", "(red:0.3)", "a plain castle", "(" + "a, " * 60 + ":1.4)"]
    chunked = [weighed(tokenizer, text) for text in texts]
    assert [len(c.ids) for c in chunked] == [2, 1, 1, 2]
    states, _ = encode(encoder, chunked)
    empty = by_the_webui(encoder, weighed(tokenizer, ""))
    for found, one in zip(states, chunked, strict=True):
        expected = by_the_webui(encoder, one)
        torch.testing.assert_close(found[: len(expected)], expected)
        torch.testing.assert_close(found[len(expected) :], empty[: 154 - len(expected)])
    unweighed, _ = encode(encoder, [plain(tokenizer, "a castle on a hill")])
    assert (states[0, :77] - unweighed[0]).abs().max() > 0.01  # the weights do something


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_without_weights_is_untouched_by_its_neighbours_weights(tokenizer, dtype):
    model = build(CLIPTextModel).to(dtype)
    alone, _ = encode(model, [weighed(tokenizer, "a castle"), weighed(tokenizer, "red")])
    beside, _ = encode(model, [weighed(tokenizer, "a castle"), weighed(tokenizer, "(red:1.4)")])
    assert torch.equal(alone[0], beside[0])
    assert not torch.equal(alone[1], beside[1])


def test_states_of_mean_zero_stay_finite(tokenizer):
    model = build(CLIPTextModel)
    with torch.no_grad():
        model.final_layer_norm.weight.zero_()
        model.final_layer_norm.bias.zero_()
    states, _ = encode(model, [weighed(tokenizer, "(red:1.4)")])
    assert torch.equal(states, torch.zeros(1, 77, 16))


def test_half_precision_states_are_weighed_in_fp32_and_stay_half(tokenizer, encoder):
    chunked = [weighed(tokenizer, "a (castle:1.5)")]
    half, _ = encode(build(CLIPTextModel).to(torch.bfloat16), chunked)
    full, _ = encode(encoder, chunked)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)


def test_a_batch_is_one_call_and_each_row_is_what_it_is_alone(tokenizer, encoder):
    texts = ["a castle", WORD * 80 + "(red:1.2)", "(snow:0.7), hill"]
    chunked = [weighed(tokenizer, text) for text in texts]
    calls = []
    handle = encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    together, _ = encode(encoder, chunked, 2)
    handle.remove()
    assert calls == [(6, 77)]
    assert together.shape == (3, 154, 16)
    for row, one in zip(together, chunked, strict=True):
        alone, _ = encode(encoder, [one], 2)
        torch.testing.assert_close(row[: alone.shape[1]], alone[0])


@pytest.mark.parametrize("eos", [2, 2047], ids=["by the largest id", "by the end token's id"])
def test_the_pooled_state_is_the_first_chunks_first_end_mark(tokenizer, eos):
    model = build(CLIPTextModelWithProjection, eos)
    texts = ["a castle", "a (castle:1.5) BREAK red", WORD * 75, ""]
    chunked = [weighed(tokenizer, text) for text in texts]
    states, pooled = encode(model, chunked, 1, True, pooled=True)
    assert pooled.shape == (4, 12)
    unweighed, _ = encode(model, [plain(tokenizer, text) for text in ("a castle", "a castle", WORD * 75, "")])
    with torch.no_grad():  # "a (castle:1.5)": the pooled state knows no weights
        lengths = [2 + num_tokens(tokenizer, "castle")] * 2 + [76, 1]
        ends = unweighed[torch.arange(4), torch.tensor(lengths)]
        torch.testing.assert_close(pooled, model.text_projection(ends))
    hidden, same = encode(model, chunked, 2, False, pooled=True)
    torch.testing.assert_close(same, pooled)
    assert hidden.shape == states.shape and not torch.equal(hidden, states)


def test_gradients_flow_into_the_encoder(tokenizer):
    model = build(CLIPTextModelWithProjection)
    chunked = [weighed(tokenizer, "a (castle:1.5)"), plain(tokenizer, WORD * 80)]
    states, pooled = encode_chunks(model, chunked, layer=2, normed=False, pooled=True, device="cpu")
    (states.square().mean() + pooled.square().mean()).backward()
    gradient = model.text_model.embeddings.token_embedding.weight.grad
    assert gradient.isfinite().all() and gradient[plain_ids(tokenizer, "castle")].abs().sum() > 0


def test_a_layer_that_the_encoder_lacks_is_refused(tokenizer, encoder):
    with pytest.raises(ModelError, match="clip skip 4 is too deep: the text encoder has 3 layers"):
        encode(encoder, [plain(tokenizer, "a")], 4)


def test_an_exclamation_mark_is_one_even_where_it_is_the_padding_too():
    ids = chunk(clip_tokenizer("!"), "wow!", emphasis=False, max_chunks=1).ids[0]
    assert ids[:4] == (49406, 2781, 256, 49407) and set(ids[4:]) == {0}
    assert chunk(clip_tokenizer("<|endoftext|>"), "wow!", emphasis=False, max_chunks=1).ids[0][:4] == ids[:4]
