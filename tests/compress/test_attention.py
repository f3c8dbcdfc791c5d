"""Rows and column sums of attention maps against the whole map, and models that report to probes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlms import tiny_vlm

from vistok.compress.attention import (
    Seen,
    attention_rows,
    column_sums,
    mask_rows,
    probing,
    watched,
)


def whole_map(query, key, mask=None):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 130),
    st.integers(0, 2**31 - 1),
)
def test_rows_and_sums_are_those_of_the_whole_map(batch, heads, tokens, seed):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], tokens, 8, generator=random)
    key = torch.randn(batch, heads[1], tokens, 8, generator=random)
    full = whole_map(query, key)
    places = torch.randint(0, tokens, (3,), generator=random)
    assert torch.allclose(attention_rows(query[:, :, places], key), full[:, :, places], atol=1e-6)
    assert torch.allclose(column_sums(query, key, block=17), full.sum(2), atol=1e-5)
    causal = torch.ones(tokens, tokens).tril().bool()
    masked = whole_map(query, key, causal)
    assert torch.allclose(
        column_sums(query, key, mask=causal[None, None], block=17), masked.sum(2), atol=1e-5
    )
    index = places.expand(batch, -1)
    rows = attention_rows(query[:, :, places], key, mask=mask_rows(None, index, tokens, 0))
    assert torch.allclose(rows, masked[:, :, places], atol=1e-6)


def test_masks_of_every_kind_give_the_same_rows():
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 9, 8, generator=random) for _ in range(2))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    allowed = torch.ones(9, 9).tril().bool() & real[:, None, None]
    index = torch.tensor([[8, 5], [4, 8]])
    rows = query.gather(2, index[:, None, :, None].expand(-1, 4, -1, 8))
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, -torch.inf)
    expected = whole_map(query, key, allowed).gather(2, index[:, None, :, None].expand(-1, 4, -1, 9))
    for mask in (real, allowed, additive):
        ours = attention_rows(rows, key, mask=mask_rows(mask, index, 9, 0))
        assert torch.allclose(ours, expected, atol=1e-6)


def test_logits_are_what_the_soft_max_is_of():
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    logits = attention_rows(query, key, softmax=False)
    assert torch.allclose(logits.softmax(-1), attention_rows(query, key))
    assert logits.dtype == attention_rows(query.half(), key.half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_probes_see_what_eager_attention_computes(name):
    model, _, inputs = tiny_vlm(name, "eager")
    inputs = inputs(2)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        stock = model(**inputs).logits
        model.set_attn_implementation({"text_config": watched("sdpa")})
        layers, seen = model.model.language_model.layers, {}

        def probe(i):
            def report(module, query, key, mask, scaling):
                length = query.shape[2]
                index = torch.arange(length).expand(len(query), -1)
                seen[i] = attention_rows(
                    query, key, scaling=scaling, mask=mask_rows(mask, index, length, key.shape[2] - length)
                )

            return report

        with probing({layer.self_attn: probe(i) for i, layer in enumerate(layers)}):
            watching = model(**inputs).logits
    assert torch.equal(watching, stock)
    real = inputs["attention_mask"].bool()
    for i, expected in enumerate(maps):
        for row in range(2):
            assert torch.allclose(seen[i][row][:, real[row]], expected[row][:, real[row]], atol=1e-5)


def test_a_probe_can_leave_the_attention_early():
    model, _, inputs = tiny_vlm("llava")
    model.set_attn_implementation({"text_config": watched("sdpa")})

    def leave(*_):
        raise Seen

    with pytest.raises(Seen), probing({model.model.language_model.layers[0].self_attn: leave}):
        model(**inputs(1))
    assert torch.isfinite(model(**inputs(1)).logits).all()


def test_watching_twice_names_the_same_implementation():
    assert watched(watched("eager")) == watched("eager") == "vistok_eager"
