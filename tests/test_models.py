"""Whole models: who sees whom, equal ways to run them, sizes of known models, memory, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import DECODERS, ENCODER, SMALL, TRANSFORMER, VISION, build, draw

from attnjax import Segments
from attnjax.models import (
    DecoderConfig,
    Encoder,
    EncoderConfig,
    MaskedLM,
    QuestionAnswering,
    SequenceClassifier,
    TokenClassifier,
    VisionConfig,
)
from attnjax.models.checks import restarting
from attnjax.nn import RoPE


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_does_not_see_later_tokens(name):
    model, tokens = build(DECODERS[name]), draw(2, 11)
    run = nnx.jit(lambda model, tokens: model(tokens))
    before = run(model, tokens)
    after = run(model, tokens.at[:, 6:].set((tokens[:, 6:] + 1) % 53))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()
    assert before.shape == (2, 11, 53) and before.dtype == jnp.float32
    if name == "gemma":
        assert abs(before).max() <= 3


def test_an_encoder_sees_later_tokens():
    model, tokens = build(ENCODER), draw(2, 11)
    before, after = model(tokens), model(tokens.at[:, 10].set((tokens[:, 10] + 1) % 53))
    assert (before != after).any(-1).all()


def test_padding_of_an_encoder_does_not_matter():
    model, tokens, lengths = build(ENCODER), draw(2, 11), jnp.array([11, 7])
    padded = model(tokens, lengths=lengths)
    other = model(tokens.at[1, 7:].set(0), lengths=lengths)
    close(padded[1, :7], other[1, :7])
    close(padded[1, :7], model(tokens[1:, :7])[0])


@pytest.mark.parametrize("scan", [False, True])
def test_cross_attention_ignores_padded_source(scan):
    model = build(dataclasses.replace(TRANSFORMER, scan=scan))
    source, target, lengths = draw(2, 9), draw(2, 5, seed=1), jnp.array([9, 4])
    run = nnx.jit(lambda model, source, lengths: model(source, target, source_lengths=lengths))
    padded = run(model, source, lengths)
    np.testing.assert_array_equal(padded, run(model, source.at[1, 4:].set(1), lengths))
    close(padded[1], model(source[1:, :4], target[1:])[0])
    assert abs(padded[1] - run(model, source, jnp.array([9, 9]))[1]).max() > 1e-3


def test_the_target_sees_the_source_and_its_own_past():
    model, source, target = build(TRANSFORMER), draw(1, 9), draw(1, 5, seed=1)
    before = model(source, target)
    assert (before != model(source.at[0, 8].set((source[0, 8] + 1) % 53), target)).any(-1).all()
    after = model(source, target.at[0, 3].set((target[0, 3] + 1) % 53))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


@pytest.mark.parametrize("name", [*DECODERS, "encoder"])
def test_packed_documents_equal_separate_runs(name):
    config = ENCODER if name == "encoder" else DECODERS[name]
    model, tokens = build(config), draw(3, 5)
    segments = jnp.array([[3] * 5 + [0] * 5 + [7] * 5])
    packed = nnx.jit(lambda model: model(tokens.reshape(1, 15), segments=segments))(model)
    separate = nnx.jit(lambda model: model(tokens))(model)
    close(packed[0], separate.reshape(15, -1))


def test_positions_begin_anew_in_each_document():
    segments = jnp.array([[4, 4, 4, 1, 4, 4, 0, 0, 0], [0] * 9])
    want = [[0, 1, 2, 0, 0, 1, 0, 1, 2], list(range(9))]
    np.testing.assert_array_equal(restarting(segments), want)


def stacked(plain, scanned):
    """Gives a scanned model the parameters of one whose layers stand side by side."""
    own = dict(nnx.to_flat_state(nnx.state(plain)))
    state = []
    for path, variable in nnx.to_flat_state(nnx.state(scanned)):
        if "layers" in path:
            i = path.index("layers") + 1
            layers = [own[(*path[:i], n, *path[i:])].get_value() for n in range(2)]
            state.append((path, variable.replace(jnp.stack(layers))))
        else:
            state.append((path, own[path]))
    nnx.update(scanned, nnx.from_flat_state(state))
    return scanned


@nnx.jit
def loss_and_gradient(model, *inputs):
    return nnx.value_and_grad(lambda model: jnp.square(jax.nn.log_softmax(model(*inputs))).mean())(model)


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (dataclasses.replace(DECODERS["llama"], sinks=True), (draw(2, 7),)),
        (TRANSFORMER, (draw(2, 7), draw(2, 5))),
        (VISION, (np.linspace(-1, 1, 144, dtype=np.float32).reshape(2, 6, 4, 3),)),
    ],
    ids=["decoder", "transformer", "vision"],
)
def test_scan_and_remat_change_nothing(config, inputs):
    plain = build(config)
    loss, gradient = loss_and_gradient(plain, *inputs)
    gradient = dict(nnx.to_flat_state(gradient))
    assert all(np.isfinite(g.get_value()).all() and (g.get_value() != 0).any() for g in gradient.values())

    remat = build(dataclasses.replace(config, remat=True))
    other_loss, other = loss_and_gradient(remat, *inputs)
    close(loss, other_loss)
    for path, g in nnx.to_flat_state(other):
        close(g.get_value(), gradient[path].get_value())

    for remat in (False, True):
        scanned = stacked(plain, build(dataclasses.replace(config, scan=True, remat=remat)))
        other_loss, other = loss_and_gradient(scanned, *inputs)
        close(loss, other_loss)
        for path, g in nnx.to_flat_state(other):
            if "layers" in path:
                i = path.index("layers") + 1
                want = jnp.stack([gradient[(*path[:i], n, *path[i:])].get_value() for n in range(2)])
            else:
                want = gradient[path].get_value()
            close(g.get_value(), want)


def test_split_merge_jit_vmap_and_more_batch_axes_give_the_same():
    model, tokens = build(DECODERS["llama"]), draw(2, 3, 7)
    graph, state = nnx.split(model)
    want = model(tokens)
    assert want.shape == (2, 3, 7, 53)
    close(nnx.merge(graph, state)(tokens), want)
    apply = lambda state, tokens: nnx.merge(graph, state)(tokens)
    close(jax.jit(apply)(state, tokens), want)
    close(jax.vmap(apply, (None, 0))(state, tokens), want)
    _, tangent = jax.jvp(lambda state: apply(state, tokens[0, 0]), (state,), (jax.tree.map(jnp.ones_like, state),))
    assert np.isfinite(tangent).all()


def test_dropout_is_for_training_only():
    config = dataclasses.replace(DECODERS["gpt"], dropout=0.3, attention_dropout=0.3)
    model, tokens = build(config), draw(1, 7)
    assert (model(tokens) != model(tokens)).any()
    np.testing.assert_array_equal(model(tokens, rngs=nnx.Rngs(5)), model(tokens, rngs=nnx.Rngs(5)))
    np.testing.assert_array_equal(model(tokens, deterministic=True), build(DECODERS["gpt"])(tokens))
    model.eval()
    np.testing.assert_array_equal(model(tokens), model(tokens))


def test_bfloat16_computes_and_gives_float32_logits():
    config = dataclasses.replace(DECODERS["gemma"], dtype=jnp.bfloat16)
    model, tokens = build(config), draw(1, 7)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms need it
        logits = model(tokens)
        assert model.hidden(tokens).dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, build(DECODERS["gemma"])(tokens), atol=0.1)


def test_the_first_transformer_scales_embeddings_and_adds_sinusoids():
    model, tokens = build(TRANSFORMER), draw(1, 4)
    x = np.asarray(model.embed(tokens, jnp.arange(4)))
    table = np.asarray(model.embed.tokens.embedding[...])
    angle = np.arange(4)[:, None] / 10000 ** (np.arange(0, 24, 2) / 24)
    close(x[0, :, 0::2], np.sqrt(24) * table[np.asarray(tokens[0])][:, 0::2] + np.sin(angle))
    close(x[0, :, 1::2], np.sqrt(24) * table[np.asarray(tokens[0])][:, 1::2] + np.cos(angle))
    close(model.logits(jnp.eye(24)), table.T)


def parameters(make):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


# The numbers that the authors' own weights have.
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DecoderConfig(50257, features=768, num_heads=12, num_layers=12, max_length=1024), 124_439_808),
        (
            DecoderConfig(
                128256,
                features=4096,
                num_heads=32,
                key_heads=8,
                num_layers=32,
                hidden=14336,
                positions=RoPE(500000.0),
                norm="rms",
                activation="swiglu",
                use_bias=False,
                tie_embeddings=False,
                scan=True,
            ),
            8_030_261_248,
        ),
        (
            DecoderConfig(
                256000,
                features=2304,
                num_heads=8,
                key_heads=4,
                head_size=256,
                num_layers=26,
                hidden=9216,
                positions=RoPE(),
                norm="rms",
                output_norm=True,
                activation="geglu",
                use_bias=False,
                windows=(4095, None),
            ),
            2_614_341_888,
        ),
        (VisionConfig((224, 224), (16, 16), 1000, features=768, num_heads=12, num_layers=12), 86_567_656),
    ],
    ids=["GPT-2", "Llama 3 8B", "Gemma 2 2B", "ViT-B/16"],
)
def test_known_models_have_their_number_of_parameters(config, count):
    assert parameters(lambda: build(config)) == count


def test_bert_has_its_number_of_parameters():
    bert = EncoderConfig(30522, features=768, num_heads=12, num_layers=12, max_length=512, num_types=2)
    head = 2 * 768 + 2
    made = parameters(lambda: SequenceClassifier(bert, 2, rngs=nnx.Rngs(0)))
    assert made == 109_482_240 + head


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_classes_of_rows_do_not_depend_on_padding(pool):
    model = SequenceClassifier(ENCODER, 3, pool=pool, rngs=nnx.Rngs(0))
    tokens, lengths = draw(2, 11), jnp.array([11, 7])
    logits = model(tokens, lengths=lengths)
    assert logits.shape == (2, 3)
    close(logits[1], model(tokens[1:, :7])[0])


def test_heads_of_the_encoder():
    tokens, lengths, rngs = draw(2, 11), jnp.array([11, 7]), nnx.Rngs(0)
    masked = MaskedLM(ENCODER, rngs=rngs)
    assert masked(tokens, lengths=lengths).shape == (2, 11, 53)
    assert TokenClassifier(ENCODER, 3, rngs=rngs)(tokens, lengths=lengths).shape == (2, 11, 3)
    start, end = QuestionAnswering(ENCODER, rngs=rngs)(tokens, lengths=lengths)
    for logits in (start, end):
        np.testing.assert_array_equal(np.isfinite(logits), np.arange(11) < np.array([[11], [7]]))
    with_types = Encoder(dataclasses.replace(ENCODER, num_types=2), rngs=rngs)
    assert (with_types(tokens) != with_types(tokens, types=jnp.ones_like(tokens))).any(-1).all()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_images_become_classes(pool):
    model = build(dataclasses.replace(VISION, pool=pool))
    images = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    assert model(images).shape == (2, 5)
    assert model.hidden(images).shape == (2, 6 + (pool == "token"), 24)
    assert abs(model(images) - model(images[:, ::-1])).max() > 1e-3  # patches have places


def test_a_training_step_has_no_matrix_of_all_pairs():
    """Temporaries of forward and backward at S = 8192; a single T x S matrix of booleans would be 64 MiB."""
    small = DecoderConfig(64, features=32, num_heads=4, num_layers=2, hidden=32, positions=RoPE(), remat=True)

    def temporaries(length):
        graph, state = nnx.split(build(small))

        def loss(state, tokens):
            logits = nnx.merge(graph, state)(tokens)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

        step = jax.jit(jax.value_and_grad(loss)).lower(state, jax.ShapeDtypeStruct((1, length), jnp.int32))
        return step.compile().memory_analysis().temp_size_in_bytes

    half, full = temporaries(4096), temporaries(8192)
    print(f"temporaries of a training step at S = 8192: {full / 2**20:.1f} MiB")
    assert full < 8192 * 8192
    assert full < 2.1 * half


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (DecoderConfig, {"num_heads": 5}, "DecoderConfig: features = 24 must be a multiple of num_heads = 5, unless"),
        (DecoderConfig, {"key_heads": 3}, "num_heads = 4 must be a multiple of key_heads = 3"),
        (DecoderConfig, {"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        (DecoderConfig, {"num_layers": 2.0}, "num_layers must be an integer of at least 1, got 2.0"),
        (DecoderConfig, {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        (DecoderConfig, {"positions": "rope"}, "positions must be one of 'learned', .* got 'rope'"),
        (DecoderConfig, {"max_length": None}, "positions='learned' needs max_length"),
        (DecoderConfig, {"windows": 3}, "windows must be a tuple of integers"),
        (DecoderConfig, {"windows": (3, None), "scan": True}, "scan=True needs equal layers"),
        (DecoderConfig, {"attention_cap": 0.0}, "attention_cap must be positive or None, got 0.0"),
        (EncoderConfig, {"num_types": -1}, "EncoderConfig: num_types must be an integer of at least 0, got -1"),
        (EncoderConfig, {"num_heads": 7}, "features = 24 must be a multiple of num_heads = 7"),
    ],
)
def test_configs_that_do_not_fit_are_refused(kind, change, says):
    with pytest.raises(ValueError, match=says):
        kind(**{**SMALL, "max_length": 19, **change})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dataclasses.replace(TRANSFORMER, num_heads=5), "TransformerConfig: features = 24 must be a multiple"),
        (lambda: dataclasses.replace(TRANSFORMER, features=9, num_heads=3), "must be even for sinusoidal"),
        (lambda: dataclasses.replace(VISION, image_size=(6, 5)), r"\(6, 5\) must be a multiple of patch_size = \(2, 2"),
        (lambda: dataclasses.replace(VISION, patch_size=2), r"patch_size must be \(height, width\)"),
        (lambda: dataclasses.replace(VISION, pool="max"), "pool must be one of 'token', 'mean', got 'max'"),
        (lambda: SequenceClassifier(ENCODER, 0, rngs=nnx.Rngs(0)), "num_classes must be an integer of at least 1"),
        (lambda: SequenceClassifier(ENCODER, 2, pool="cls", rngs=nnx.Rngs(0)), "pool must be one of 'first', 'mean'"),
    ],
)
def test_other_configs_that_do_not_fit_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("config", "call", "error", "says"),
    [
        (DECODERS["gpt"], lambda m: m(jnp.ones((1, 3))), TypeError, "DecoderLM: tokens must be an array of integers"),
        (DECODERS["gpt"], lambda m: m([[1, 2]]), TypeError, "DecoderLM: tokens must be .* got list"),
        (DECODERS["gpt"], lambda m: m(draw(1, 20)), ValueError, "longer than max_length = 19"),
        (DECODERS["gpt"], lambda m: m(jnp.int32(3)), ValueError, r"tokens must be \[\*B, T\]"),
        (
            DECODERS["gpt"],
            lambda m: m(draw(1, 3), segments=draw(1, 3), caches=m.create_caches(1, 5)),
            ValueError,
            "with caches, segments must be attnjax.Segments",
        ),
        (
            DECODERS["gpt"],
            lambda m: m(draw(1, 3), caches=m.create_caches(1, 5)[:1]),
            ValueError,
            "caches must have one entry for each of 2 layers",
        ),
        (
            DECODERS["gpt"],
            lambda m: m(draw(2, 6), caches=m.create_caches(2, 5)),
            ValueError,
            "6 tokens are more than its",
        ),
        (
            DECODERS["gpt"],
            lambda m: m(draw(2, 3), caches=m.create_caches(3, 5)),
            ValueError,
            r"DecoderLM: caches have the batch axes \[3\], and those of tokens int32\[2, 3\] are \[2\]",
        ),
        (
            DECODERS["gpt"],
            lambda m: m(draw(1, 3), caches=m.create_caches(1, 5)[0]),
            TypeError,
            "caches must be those of create_caches, one attnjax.KVCache for each layer, got KVCache",
        ),
        (
            DECODERS["gpt"],
            lambda m: m(draw(1, 3), positions=jnp.arange(4)),
            ValueError,
            r"DecoderLM: positions must be integers \[T\] or \[\*B, T\], .* tokens int32\[1, 3\], got int32\[4\]",
        ),
        (DECODERS["gpt"], lambda m: m(draw(1, 3), segments=[0, 0, 1]), TypeError, "segments must be .* got list"),
        (ENCODER, lambda m: m(draw(1, 3), segments=draw(2, 3)), ValueError, r"Encoder: segments .* got int32\[2, 3\]"),
        (
            TRANSFORMER,
            lambda m: m(draw(1, 3), draw(2, 3)),
            ValueError,
            r"target int32\[2, 3\] has the batch axes \[2\], and the source's vectors are float32\[1, 3, 24\]",
        ),
        (
            TRANSFORMER,
            lambda m: m.hidden(draw(1, 3), memory=jnp.ones((1, 3, 24))),
            TypeError,
            r"memory must be model.encode\(source\), got ArrayImpl",
        ),
        (ENCODER, lambda m: m(draw(1, 3), types=draw(1, 3)), ValueError, "types were given to a model without"),
        (ENCODER, lambda m: m(draw(1, 20)), ValueError, "Encoder: tokens is .* longer than max_length = 19"),
        (TRANSFORMER, lambda m: m(jnp.ones((1, 3)), draw(1, 3)), TypeError, "source must be an array of integers"),
        (TRANSFORMER, lambda m: m(draw(1, 3), jnp.ones((1, 3))), TypeError, "target must be an array of integers"),
        (VISION, lambda m: m(jnp.ones((6, 5, 3))), ValueError, r"images must be \[\*B, 6, 4, 3\], got float32\[6, 5"),
        (VISION, lambda m: m(jnp.ones((6, 4, 3), int)), TypeError, "images must be an array of floats"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(config, call, error, says):
    with pytest.raises(error, match=says):
        call(build(config))


def test_max_length_counts_what_caches_hold():
    """Also where nothing else would tell, as with RoPE; with learned positions all logits would be NaN."""
    for positions in (RoPE(), "learned"):
        config = DecoderConfig(53, features=8, num_heads=2, num_layers=1, max_length=8, positions=positions)
        model, tokens = build(config), draw(2, 5)
        _, caches = model(tokens, caches=model.create_caches(2, 32))
        with pytest.raises(ValueError, match="DecoderLM: with what the caches hold, a row has 10 tokens, more"):
            model(tokens, caches=caches)
        logits, _ = model(tokens, caches=caches, lengths=jnp.array([3, 0]))  # the others are padding
        assert jnp.isfinite(logits[0, :3]).all()
        with pytest.raises(ValueError, match="a row has 9 tokens, more than max_length = 8"):
            model(tokens, caches=caches, lengths=jnp.array([3, 4]))
        logits, caches = model(tokens[:, :3], caches=caches)
        assert jnp.isfinite(logits).all() and caches[0].length.tolist() == [8, 8]
    config = dataclasses.replace(TRANSFORMER, max_length=4)
    model = build(config)
    memory = model.encode(draw(2, 4))
    _, caches = model.hidden(draw(2, 4), memory=memory, caches=model.create_caches(2, 9))
    with pytest.raises(ValueError, match="Transformer: with what the caches hold, a row has 5 tokens"):
        model.hidden(draw(2, 1), memory=memory, caches=caches)


@pytest.mark.parametrize("rates", [dict(dropout=0.1), dict(attention_dropout=0.1)], ids=lambda rates: "".join(rates))
@pytest.mark.parametrize("scan", [False, True])
def test_nothing_is_dropped_with_caches(rates, scan):
    """A model that is being trained says so, whichever of its rates it is."""
    decoder = build(dataclasses.replace(DECODERS["llama"], num_layers=1, scan=scan, **rates))
    transformer = build(dataclasses.replace(TRANSFORMER, encoder_layers=1, decoder_layers=1, scan=scan, **rates))
    memory = transformer.encode(draw(2, 4))
    for model, options in ((decoder, {}), (transformer, dict(memory=memory))):
        run = lambda model=model, options=options, **more: model.hidden(
            draw(2, 3), caches=model.create_caches(2, 8), **options, **more
        )[0]
        with pytest.raises(ValueError, match="a call with a cache has no dropout: call eval.. or pass determ"):
            run()
        expected = run(deterministic=True)
        model.eval()
        np.testing.assert_array_equal(run(), expected)


def test_documents_and_caches():
    """Segments by the ids of tokens and of the caches' slots: in pieces as in one call."""
    tokens, ids = draw(2, 11), jnp.asarray(np.array([[0] * 4 + [1] * 7, [3] * 8 + [1] * 3]))
    places = jnp.asarray(np.array([[*range(4), *range(7)], [*range(8), *range(3)]]))
    for name in ("gpt", "alibi"):
        model = build(DECODERS[name])
        want = model(tokens, segments=ids)

        @nnx.jit
        def run(model, tokens):
            caches, outs = model.create_caches(2, 11), []
            for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
                rules = dict(segments=Segments(ids[:, part], ids), positions=places[:, part])
                out, caches = model(tokens[:, part], caches=caches, **rules)
                outs.append(out)
            return jnp.concatenate(outs, 1)

        np.testing.assert_allclose(run(model, tokens), want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"with caches, segments must be attnjax.Segments\(ids, held\)"):
        model(tokens, segments=ids, caches=model.create_caches(2, 11))
