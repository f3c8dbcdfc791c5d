"""LazyLLM: against a decoder that runs token by token, and on models of several families."""

import pytest
import reducer_matrix as matrix
import torch
from cache_oracle import prompts
from oracles import decoder, the_cache
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, LazyLLM
from vistok.compress.hosts import with_cache

LAZY = LazyLLM(prune_layers=(1, 3), prune_ratios=(0.5, 0.4))
STEPS = 6


class LazyLoop:
    """One prompt and its greedy answer, token by token and layer by layer, as the paper describes it.

    It uses the weights of a stock Llama and nothing of `vistok.compress`. `left[layer]` is what a visual
    token enters that layer with once it is selected there, `kv[layer]` what each token has computed.
    """

    def __init__(self, model, cuts):
        self.model, self.lm, self.cuts = model, decoder(model), cuts
        config = self.lm.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.kv = [{} for _ in self.lm.layers]
        self.left, self.entry, self.rows, self.returned = {}, {}, {}, []

    @torch.no_grad()
    def run(self, embeds, visual, steps):
        self.visual = {place for place, is_visual in enumerate(visual) if is_visual}
        self.prompt = range(len(embeds))
        hidden = self._pass(dict(enumerate(embeds)))
        tokens, logits = [], []
        for step in range(steps):
            logits.append(self.model.lm_head(self.lm.norm(hidden)))
            allowed = logits[-1].clone()
            allowed[matrix.placeholders(self.model)] = -torch.inf
            tokens.append(int(allowed.argmax()))
            embedded = self.model.get_input_embeddings()(torch.tensor(tokens[-1]))
            if step + 1 < steps:
                hidden = self._pass({len(embeds) + step: embedded})
        return tokens, torch.stack(logits)

    def _pass(self, running):
        """Run tokens (place → state) through all layers; returns the states of the last one."""
        last, alive = max(running), set(self.visual)
        for number, layer in enumerate(self.lm.layers):
            if number in self.cuts:
                order = sorted(alive, key=lambda place: (-self.attention[place], place))
                alive = set(order[: len(order) - int(len(order) * self.cuts[number])])
                for place in [p for p in running if p in self.visual and p not in alive]:
                    self.left[place], self.entry[place] = running.pop(place), number
                for place in sorted(alive):
                    if self.entry.get(place) == number and place not in running:
                        running[place] = self.left.pop(place)
                        del self.entry[place]
                if last not in self.prompt:
                    self.returned.append(len(running) - 1)
            for place, state in running.items():
                assert place not in self.kv[number], "a layer computes a token once"
                normed = layer.input_layernorm(state)
                key = self._rotated(layer.self_attn.k_proj(normed).view(self.key_heads, -1), place)
                self.kv[number][place] = key, layer.self_attn.v_proj(normed).view(self.key_heads, -1)
            running = {place: self._layer(layer, number, place, x, alive) for place, x in running.items()}
            self.attention = self.rows[last]
        return running[last]

    def _layer(self, layer, number, place, state, alive):
        module, normed = layer.self_attn, layer.input_layernorm(state)
        query = self._rotated(module.q_proj(normed).view(self.heads, -1), place)
        places = sorted(p for p in self.kv[number] if p <= place and (p in alive or p not in self.visual))
        outputs, mean = [], 0
        for head in range(self.heads):
            of = head // (self.heads // self.key_heads)
            keys = torch.stack([self.kv[number][p][0][of] for p in places])
            values = torch.stack([self.kv[number][p][1][of] for p in places])
            row = (keys @ query[head] * module.scaling).softmax(0)
            outputs.append(row @ values)
            mean = mean + row / self.heads
        self.rows[place] = dict(zip(places, mean.tolist(), strict=True))
        state = state + module.o_proj(torch.cat(outputs))
        return state + layer.mlp(layer.post_attention_layernorm(state))

    def _rotated(self, x, place):
        cos, sin = self.lm.rotary_emb(x, torch.tensor([[place]]))
        half = x.shape[-1] // 2
        turned = torch.cat([-x[:, half:], x[:, :half]], 1)
        return x * cos[0] + turned * sin[0]


def generated(model, inputs, **options):
    """New tokens and the logits of each step [steps, B, V]."""
    settings = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": matrix.placeholders(model)}
    settings["min_new_tokens"] = STEPS
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_step_equals_a_decoder_that_runs_token_by_token(attention, seed):
    model, _, inputs = tiny_vlm("llava", attention, seed=seed)
    inputs = inputs(batch=1)
    (prompt,) = prompts(model, inputs)
    with compress.attach(model, LAZY) as session:
        session.trace = {}
        tokens, logits = generated(model, inputs)
    loop = LazyLoop(model, {1: 0.5, 3: 0.4})
    expected, expected_logits = loop.run(*prompt, STEPS)
    assert tokens[0].tolist() == expected
    torch.testing.assert_close(logits[:, 0], expected_logits, rtol=1e-4, atol=2e-5)
    computed = [session.trace[f"step.computed.{cut}"] for cut in (1, 3)]
    assert [int(x) for step in zip(*computed, strict=True) for x in step] == loop.returned
    assert any(loop.returned)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_gets_the_same_answer_beside_others_as_alone(name, attention):
    model, _, inputs = tiny_vlm(name, attention)
    batch = inputs(images=(2, 1, 0))
    with compress.attach(model, LAZY, keep=0.4):
        tokens, logits = generated(model, batch)
        for row in range(3):
            alone, own_logits = generated(model, inputs(images=(2, 1, 0), rows=(row,)))
            assert torch.equal(tokens[row], alone[0])
            torch.testing.assert_close(logits[:, row], own_logits[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_beams_score_what_they_would_alone(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(batch=1)
    settings = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": matrix.placeholders(model)}
    with torch.no_grad(), compress.attach(model, LAZY):
        beams = model.generate(
            **inputs, **settings, num_beams=3, return_dict_in_generate=True, output_scores=True
        )
        length = inputs["input_ids"].shape[1]
        answer = beams.sequences[0, length:]
        out, total = model(**inputs, use_cache=True), 0.0
        for number, token in enumerate(answer):
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            if number + 1 < len(answer):
                mask = torch.ones(1, length + number + 1, dtype=torch.long)
                out = model(
                    input_ids=token[None, None], attention_mask=mask, **with_cache(model, the_cache(out))
                )
    # Suppressed tokens leave their probability to the others.
    assert total / len(answer) <= float(beams.sequences_scores[0]) + 1e-4
    transition = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    torch.testing.assert_close(float(transition.sum()), float(beams.sequences_scores[0]) * len(answer))
    assert abs(total - float(transition.sum())) < 0.2


def test_tokens_that_were_dropped_for_the_prompt_are_attended_to_later():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=1)
    with compress.attach(model, LAZY) as session:
        session.trace = {}
        generated(model, inputs)
        entries = [layer.keys.shape[2] for layer in the_cache(model(**inputs)).layers]
    first, *later = session.trace["kept.1"][:1] + session.trace["step.kept.1"]
    assert any(set(step.tolist()) - set(first.tolist()) for step in later)
    assert entries[0] > entries[1] >= entries[-1]


def test_a_second_turn_of_text_goes_on_from_the_cache():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=1)
    more = torch.tensor([[5, 9, 11]])
    with torch.no_grad(), compress.attach(model, LAZY):
        out = model(**inputs, use_cache=True)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        out = model(input_ids=more, attention_mask=mask, **with_cache(model, the_cache(out)))
        cache = the_cache(out)
    assert bool(out.logits.isfinite().all()) and out.logits.shape[1] == 3
    assert cache.get_seq_length() == mask.shape[1] == cache.get_seq_length(3)


def test_what_cannot_return_is_refused():
    model, _, inputs = tiny_vlm("llava")
    both = inputs(batch=1)
    with pytest.raises(ValueError, match="alone"):
        compress.attach(model, [LAZY, FastV(k=2)])
    with pytest.raises(ValueError, match="alone"):
        compress.attach(model, [LAZY, KeyNorm()])
    with pytest.raises(ValueError, match="positions='keep'"):
        compress.attach(model, LAZY, positions="compact")
    with pytest.raises(ValueError, match=r"prune_ratios holds 1.0"):
        LazyLLM(prune_ratios=(0.3, 0.3, 1.0))
    with pytest.raises(ValueError, match="2 layers and prune_ratios 3"):
        LazyLLM(prune_layers=(3, 4))
    labels = both["input_ids"].clone()
    labels[:, :-2] = -100
    with (
        compress.attach(model, LAZY),
        pytest.raises(NotImplementedError, match="answers beside their prompt"),
    ):
        model(**both, labels=labels)
    with compress.attach(model, LAZY), torch.no_grad():
        cache = the_cache(model(**both, use_cache=True))
        with pytest.raises(NotImplementedError, match="without drafts"):
            cache.crop(-1)


def test_after_a_reducer_of_features_only_what_it_left_returns():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=2)
    with compress.attach(model, [DivPrune(keep=0.5), LAZY]) as session:
        session.trace = {}
        generated(model, inputs)
        left = session.report().images[0].layers[0]
    assert max(int(step.max()) for step in session.trace["step.kept.1"]) < left
