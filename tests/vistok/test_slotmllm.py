"""Slot-MLLM's tokenizer: slot attention, residual codes with one codebook, companions and pictures."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_renderers import tiny_backbone, tiny_pipeline
from tiny_tokenizers import CASES, SIDE, build, fresh, pictures, shared
from vector_quantize_pytorch import ResidualVQ

from vistok import load
from vistok.models.slotmllm import SlotMLLM, SlotMLLMConfig, SlotReading

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture
def reading():
    torch.manual_seed(0)
    reading = SlotReading(12, 3, 5, iterations=3, half=False).eval()
    with torch.no_grad():
        for parameter in reading.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return reading


def _slots_one_by_one(reading, slots, memory, active):
    """Slot attention of one image in plain loops: slots [S, D], features [N, M]."""
    heads, (count, width) = reading.heads, slots.shape
    part = width // heads
    keys, values = reading.key(memory) / count**0.5, reading.value(memory)
    state = slots.clone()
    for _ in range(reading.iterations):
        queries = reading.query(reading.norm_slots(state))
        context = torch.zeros(active, width)
        weights = torch.zeros(heads, active, len(memory))
        for patch in range(len(memory)):
            logits = torch.stack(
                [
                    queries[slot, head * part : (head + 1) * part]
                    @ keys[patch, head * part : (head + 1) * part]
                    for head in range(heads)
                    for slot in range(active)
                ]
            )
            weights[:, :, patch] = (logits.exp() / logits.exp().sum()).view(heads, active) + 1e-6
        for head in range(heads):
            columns = slice(head * part, (head + 1) * part)
            for slot in range(active):
                share = weights[head, slot] / weights[head, slot].sum()
                context[slot, columns] = (share[:, None] * values[:, columns]).sum(0)
        for slot in range(active):
            state[slot] = reading.gru(context[slot], state[slot])
            state[slot] = state[slot] + reading.mlp(reading.norm_mlp(state[slot]))
    return state


@pytest.mark.parametrize(("half", "active"), [(False, 5), (True, 2)])
@torch.no_grad()
def test_slot_attention_is_that_of_loops(reading, half, active):
    reading.half = half
    slots, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 5)
    expected = [_slots_one_by_one(reading, *pair, active) for pair in zip(slots, memory, strict=True)]
    updated = reading(slots, memory)
    torch.testing.assert_close(updated, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(updated[:, active:], slots[:, active:])


@torch.no_grad()
def test_a_patch_is_shared_out_over_heads_and_slots_and_weights_of_a_slot_sum_to_1(reading):
    queries, keys = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    assert torch.allclose(reading.attention(queries, keys).sum((1, 2)), torch.ones(2, 7), atol=1e-6)
    assert torch.allclose(reading.weights(queries, keys).sum(-1), torch.ones(2, 3, 5), atol=1e-6)


@torch.no_grad()
def test_the_order_of_patches_is_no_matter():
    model = build("slotmllm")
    memory = torch.randn(2, 16, 16)
    permuted = memory[:, torch.randperm(16)]
    torch.testing.assert_close(model.slots(memory), model.slots(permuted), rtol=1e-4, atol=1e-5)


def test_the_gru_computes_in_float32_whatever_the_dtype_of_the_weights(reading, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        torch.nn.GRUCell,
        "forward",
        lambda self, x, h: dtypes.append((x.dtype, h.dtype, self.weight_ih.dtype)) or h,
    )
    with torch.no_grad():
        reading.to(torch.bfloat16)(torch.randn(1, 5, 12).bfloat16(), torch.randn(1, 7, 5).bfloat16())
    assert dtypes == [(torch.float32,) * 3] * 3


# ---- codes -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """The quantizer of a tokenizer and that of vector-quantize-pytorch, with the same weights."""
    model = build("slotmllm")
    config = model.config
    original = ResidualVQ(
        dim=config.hidden,
        num_quantizers=config.rvq,
        codebook_size=config.codes,
        codebook_dim=config.cdim,
        shared_codebook=True,
        rotation_trick=False,
    )
    quantizer = model.quantize
    for side in ("project_in", "project_out"):
        getattr(original, side).load_state_dict(getattr(quantizer, side).state_dict())
    for own, other in zip(quantizer.layers, original.layers, strict=True):
        own._codebook.embed_avg.copy_(own._codebook.embed)
        for name in ("embed", "embed_avg", "cluster_size"):
            getattr(other._codebook, name).copy_(getattr(own._codebook, name))
    return quantizer, original


@torch.no_grad()
def test_codes_are_those_of_vector_quantize_pytorch(pair):
    quantizer, original = pair
    slots = torch.randn(3, 6, 32)
    quantized, codes, _ = original.eval()(slots)
    assert torch.equal(quantizer.encode(slots), codes)
    torch.testing.assert_close(quantizer.decode(codes), quantized, rtol=1e-4, atol=1e-5)
    first = quantizer.project_out(F.embedding(codes[..., 0], quantizer.rows))
    torch.testing.assert_close(quantizer.decode(codes[..., :1]), first)


def test_a_step_of_training_moves_the_codebook_as_vector_quantize_pytorch(pair):
    quantizer, original = pair
    slots = torch.randn(3, 6, 32)
    before = quantizer.rows.clone()
    quantized, codes, losses = original.train()(slots)
    result = quantizer.train()(slots)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.latents, quantized, rtol=1e-4, atol=1e-5)
    assert result.losses["commitment"].item() == pytest.approx(losses.mean().item(), rel=1e-4)
    torch.testing.assert_close(quantizer.rows, original.layers[-1]._codebook.embed[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, quantizer.rows)
    for layer in quantizer.layers:
        assert torch.equal(layer._codebook.embed[0], quantizer.rows)


def test_the_last_depths_table_counts():
    model = build("slotmllm")
    codes = model.encode(pictures(2)).indices
    model.quantize.layers[0]._codebook.embed.normal_()
    assert torch.equal(model.encode(pictures(2)).indices, codes)


def test_codes_are_four_per_slot_and_slots_are_the_features():
    model = shared("slotmllm")
    tokens = model.encode(pictures(1))
    assert tokens.indices.shape == (1, 6, 2) and tokens.codebook_sizes == (64, 64)
    torch.testing.assert_close(model.features(pictures(1)), model.latents(pictures(1)))
    states, embedding = model.embeddings(tokens)
    assert states.shape == (1, 6, 16) and embedding.shape == (1, 16)


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_with_unused_parts_loads(tmp_path):
    model = build("slotmllm")
    root = "image_tokenizer.model.Qformer."
    unused = {f"{root}bert.encoder.layer.{i}.attention.self.gru.weight_ih": torch.zeros(9, 3) for i in (0, 1)}
    unused[f"{root}bert.encoder.layer.0.crossattention.self.key_proj.bias"] = torch.zeros(2)
    unused[f"{root}image_cls.0.bias"] = torch.zeros(2)
    torch.save(model.state_dict() | unused, tmp_path / "slots.pt")
    loaded = load(tmp_path / "slots.pt", config={"family": "slotmllm", "config": CASES["slotmllm"][1]})
    loaded.attach_backbone(tiny_backbone())
    assert torch.equal(loaded.encode(pictures(2)).indices, model.encode(pictures(2)).indices)


@pytest.mark.parametrize("use_slot", [True, False])
def test_sizes_follow_from_the_keys(use_slot):
    model = fresh("slotmllm", use_slot=use_slot, hidden=128, blk_heads=2)
    config = SlotMLLM.recognise({key: value.shape for key, value in model.state_dict().items()}, None)
    built, own = vars(SlotMLLMConfig(**config)), vars(model.config)
    published = ("image_size", "patch", "render_size", "iters")
    assert {k: v for k, v in built.items() if k not in published} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if k not in published
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "hidden is 32; it must be a multiple of heads, 5"),
        ({"blk_heads": 5}, "a multiple of blk_heads, 5"),
        ({"slots": 1, "use_half_slot": True}, "use_half_slot needs slots of 2 or more"),
        ({"iters": 0}, "iters is 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fresh("slotmllm", **change)


# ---- companions --------------------------------------------------------------------------------------------


def test_without_companions_errors_say_how_to_attach_them():
    model = copy.deepcopy(shared("slotmllm"))
    tokens = model.encode(pictures(1))
    model._companions.clear()
    with pytest.raises(ValueError, match=r"attach_backbone\('facebook/dinov2-large'\), or give a folder"):
        model.encode(pictures(1))
    with pytest.raises(ValueError, match=r"attach_renderer\('stabilityai/stable-diffusion-2-1-unclip'\)"):
        model.decode(tokens)


def test_a_backbone_is_read_from_a_folder(tmp_path):
    model = copy.deepcopy(shared("slotmllm"))
    tiny_backbone().save_pretrained(tmp_path)
    model.attach_backbone(tmp_path)
    assert model.encode(pictures(2)) == shared("slotmllm").encode(pictures(2))


def test_backbones_that_do_not_fit_or_are_not_there_are_refused(tmp_path, offline):
    model = copy.deepcopy(shared("slotmllm"))
    with pytest.raises(ValueError, match="width 24 of patches of 8 pixels; slotmllm takes width 16 and 8"):
        model.attach_backbone(tiny_backbone(width=24))
    with pytest.raises(ValueError, match="a Linear was given; the backbone is a transformers Dinov2Model"):
        model.attach_backbone(torch.nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        model.attach_backbone(tmp_path)
    with pytest.raises(FileNotFoundError, match="given as hf://owner/name"):
        model.attach_backbone("owner/name")
    with pytest.raises(FileNotFoundError, match=r"cannot be read or fetched.*give the folder"):
        model.attach_backbone("facebook/dinov2-large")


@torch.no_grad()
def test_a_picture_is_that_of_diffusers_pipeline_with_both_conditions():
    from diffusers import DPMSolverMultistepScheduler

    model = shared("slotmllm")
    tokens = model.encode(pictures(1))
    states, embedding = model.embeddings(tokens)
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    pipeline = copy.deepcopy(tiny_pipeline("unclip", image_width=16))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=states,
        negative_prompt="",
        image_embeds=embedding,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    picture = model.decode(tokens, steps=4, noise=noise, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-5)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets have shape \[2, 5\]; these images decode to \[2, 16\]"):
        shared("slotmllm")(pictures(2), torch.zeros(2, 5))
