"""RoPE with its scalings and sinusoidal positions, against NumPy in float64 and against Hugging Face's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import attention
from attnjax.nn import LearnedPositions
from attnjax.positions import LinearScaling, Llama3Scaling, NTKScaling, RoPE, YaRN, sinusoidal

SCALINGS = {
    "none": None,
    "linear": LinearScaling(4.0),
    "ntk": NTKScaling(5.0),
    "yarn": YaRN(8.0, original_length=256),
    "yarn_factor": YaRN(8.0, original_length=256, beta_fast=16.0, beta_slow=2.0, attention_factor=0.7),
    "yarn_untruncated": YaRN(8.0, original_length=256, truncate=False),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, original_length=512),
}


def frequencies(rotated, theta, name):
    """The frequencies one by one, from the text of the papers; and the factor of YaRN."""
    found, scaling = [], SCALINGS[name]
    for i in range(rotated // 2):
        frequency = theta ** (-2 * i / rotated)
        if name == "linear":
            frequency /= scaling.factor
        elif name == "ntk":
            frequency = (theta * scaling.factor ** (rotated / (rotated - 2))) ** (-2 * i / rotated)
        elif name.startswith("yarn"):
            where = lambda r: rotated * math.log(scaling.original_length / (2 * math.pi * r)) / (2 * math.log(theta))
            low, high = where(scaling.beta_fast), where(scaling.beta_slow)
            if name != "yarn_untruncated":
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotated - 1)
            keep = 1 - min(max((i - low) / (high - low), 0), 1)
            frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
        elif name == "llama3":
            wavelength = 2 * math.pi / frequency
            if wavelength > scaling.original_length / scaling.low_frequency_factor:
                frequency /= scaling.factor
            elif wavelength > scaling.original_length / scaling.high_frequency_factor:
                smooth = scaling.original_length / wavelength - scaling.low_frequency_factor
                smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    factor = 1.0
    if name.startswith("yarn"):
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return np.array(found), factor


def rotate(x, positions, found, factor, interleaved):
    """Pair by pair, as a product with a complex number."""
    count = len(found)
    out = np.array(x, np.float64)
    for i, frequency in enumerate(found):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + count)
        turned = (x[..., a] + 1j * x[..., b]) * factor * np.exp(1j * positions * frequency)[..., None]
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_is_the_formula(name, fraction, interleaved, rng):
    rope = RoPE(theta=5000.0, fraction=fraction, scaling=SCALINGS[name], interleaved=interleaved)
    x = rng.normal(size=(2, 7, 3, 32)).astype(np.float32)
    positions = rng.integers(0, 600, (2, 7)).astype(np.int32)
    found, factor = frequencies(int(32 * fraction), 5000.0, name)
    np.testing.assert_allclose(rope.frequencies(32), found, rtol=3e-7)
    expected = rotate(x.astype(np.float64), positions, found, factor, interleaved)
    # An angle of up to 600 radians has an error of half a unit in the last place of float32.
    np.testing.assert_allclose(rope(jnp.asarray(x), jnp.asarray(positions)), expected, atol=600 * 2**-23)
    assert rope(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions)).dtype == jnp.bfloat16
    shared = rope(jnp.asarray(x), jnp.asarray(positions[0]))
    np.testing.assert_array_equal(shared[1], rope(jnp.asarray(x[1]), jnp.asarray(positions[0])))


def test_rope_in_float64(rng):
    with jax.enable_x64(True):
        x, positions = rng.normal(size=(5, 2, 8)), np.arange(5) * 1000
        found, factor = frequencies(8, 10000.0, "none")
        np.testing.assert_allclose(RoPE()(jnp.asarray(x), positions), rotate(x, positions, found, factor, False))


def test_logits_depend_on_distances(rng):
    query, key, value = jnp.asarray(rng.normal(size=(3, 11, 2, 8)), jnp.float32)
    rope, positions = RoPE(), jnp.arange(11)
    near = attention(rope(query, positions), rope(key, positions), value)
    far = attention(rope(query, positions + 100), rope(key, positions + 100), value)
    np.testing.assert_allclose(near, far, atol=3e-5)


def test_rope_under_transforms(rng):
    x, positions = jnp.asarray(rng.normal(size=(3, 5, 2, 8)), jnp.float32), jnp.asarray(rng.integers(0, 9, (3, 5)))
    rope = RoPE(fraction=0.5, scaling=YaRN(4.0, 64))
    np.testing.assert_allclose(jax.jit(rope)(x, positions), rope(x, positions), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(rope)(x, positions), rope(x, positions), atol=1e-6)
    out, tangent = jax.jvp(lambda x: rope(x, positions), (x,), (x,))  # a linear map
    np.testing.assert_allclose(out, tangent, atol=1e-6)
    assert {rope: 1}[RoPE(fraction=0.5, scaling=YaRN(4.0, 64))] == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_no_tokens(interleaved):
    rope = RoPE(fraction=0.5, interleaved=interleaved)
    assert rope(jnp.ones((2, 0, 3, 8)), jnp.arange(0)).shape == (2, 0, 3, 8)


HUGGING_FACE = {
    "default": (None, {}),
    "linear": (LinearScaling(4.0), dict(factor=4.0)),
    "yarn": (YaRN(8.0, 256), dict(factor=8.0, original_max_position_embeddings=256)),
    "llama3": (
        Llama3Scaling(8.0, 1.0, 4.0, 512),
        dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512),
    ),
    "dynamic": (NTKScaling(5.0), dict(factor=4.0)),  # at twice the length, which is a factor of 4 * 2 - 3
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_rope_is_that_of_hugging_face(kind, rng):
    reason = "transformers is not installed: Hugging Face's RoPE is not compared with"
    pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling, more = HUGGING_FACE[kind]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=1024,
        rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **more),
    )
    x = rng.normal(size=(1, 5, 2, 32)).astype(np.float32)
    positions = np.array([[0, 1, 17, 1023, 2047]] if kind == "dynamic" else [[0, 1, 17, 200, 900]])
    theirs = torch.from_numpy(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(theirs, torch.from_numpy(positions))
    expected, _ = apply_rotary_pos_emb(theirs, theirs, cos, sin)
    got = RoPE(scaling=scaling)(jnp.asarray(x), jnp.asarray(positions, jnp.int32))
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), atol=float(positions.max()) * 2**-22)


def test_sinusoidal_is_the_formula():
    table = sinusoidal(50, 6)
    for p in (0, 1, 49):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(table[p, 2 * i : 2 * i + 2], [math.sin(angle), math.cos(angle)], atol=1e-7)
    assert table.shape == (50, 6) and table.dtype == jnp.float32


def test_bad_input():
    x = jnp.ones((2, 5, 3, 8))
    for positions in (jnp.arange(4), jnp.zeros((3, 5), jnp.int32), jnp.int32(1), jnp.zeros((1, 1, 5), jnp.int32)):
        with pytest.raises(ValueError, match=r"RoPE: positions have shape .* must be \[T\] or \[\*B, T\]"):
            RoPE()(x, positions)
    with pytest.raises(TypeError, match="RoPE: positions must be integers, got float32"):
        RoPE()(x, jnp.arange(5.0))
    with pytest.raises(ValueError, match="fraction . head size must be even and at least 2, got 0.4 . 8 = 3"):
        RoPE(fraction=0.4)(x, jnp.arange(5))
    with pytest.raises(ValueError, match="RoPE: fraction must be in .0, 1., got 1.5"):
        RoPE(fraction=1.5)
    with pytest.raises(ValueError, match="RoPE: theta must be greater than 1 and finite, got 0"):
        RoPE(theta=0)
    with pytest.raises(TypeError, match="RoPE: theta must be a number, got '1e4'"):
        RoPE(theta="1e4")
    with pytest.raises(ValueError, match="YaRN: attention_factor must be a positive number, got -1.0"):
        YaRN(4.0, 64, attention_factor=-1.0)
    with pytest.raises(ValueError, match="YaRN: beta_fast must be greater than beta_slow, got 1.0 and 32.0"):
        YaRN(4.0, 64, beta_fast=1.0, beta_slow=32.0)
    with pytest.raises(TypeError, match="RoPE: scaling must be LinearScaling, .* got float 4.0"):
        RoPE(scaling=4.0)
    with pytest.raises(ValueError, match="LinearScaling: factor must be a positive number, got 0"):
        LinearScaling(0)
    with pytest.raises(ValueError, match="YaRN: original_length must be a positive number, got -1"):
        YaRN(4.0, -1)
    with pytest.raises(
        ValueError, match="high_frequency_factor must be greater than low_frequency_factor, got 1.0 and 4.0"
    ):
        Llama3Scaling(8.0, 4.0, 1.0, 512)
    with pytest.raises(ValueError, match="features must be an even integer of at least 2, got 5"):
        sinusoidal(4, 5)
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        sinusoidal(0, 4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_positions_outside_of_a_learned_table_are_nan(dtype):
    """Before it as well as behind it, in every type of integers."""
    layer = LearnedPositions(8, 4, rngs=nnx.Rngs(0))
    limits = np.iinfo(dtype)
    positions = [n for n in (0, 7, 8, -1, -8, 100, int(limits.max), int(limits.min)) if limits.min <= n <= limits.max]
    got = jax.jit(layer)(jnp.asarray(np.array(positions, dtype)))
    for position, row in zip(positions, got, strict=True):
        inside = 0 <= position < 8
        np.testing.assert_array_equal(row, layer.embedding[position] if inside else np.full(4, np.nan))
