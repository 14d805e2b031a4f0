"""Checkpoints between models that differ: streams, scans, types, parts, shapes without arrays; and others' files."""

import dataclasses
import json
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from test_constants import holding

from attnjax.models import (
    DecoderConfig,
    DecoderLM,
    EncoderConfig,
    MaskedLM,
    SequenceClassifier,
    checkpoint,
    folders,
)
from attnjax.nn import Constant, MultiHeadAttention, RoPE

CONFIG = DecoderConfig(13, features=8, num_heads=2, num_layers=2, positions="none")
TOKENS = jnp.arange(10).reshape(2, 5)


def shapes(**fields):
    """A model, and an optimizer with moments of every parameter, without arrays."""

    def make():
        model = DecoderLM(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    return nnx.eval_shape(make)


def made(seed=0, **fields):
    """The same with arrays that numpy draws, by name, which compiles nothing."""

    def drawn(path, variable):
        rng, x = np.random.default_rng([seed, zlib.crc32(str(path).encode())]), variable.get_value()
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return variable.replace(jnp.asarray(rng.normal(size=x.shape, scale=3), x.dtype))
        data = jax.eval_shape(jax.random.key_data, x)
        return variable.replace(jax.random.wrap_key_data(jnp.asarray(rng.integers(0, 2**31, data.shape), data.dtype)))

    modules = shapes(**fields)
    for module in modules:
        pairs = nnx.to_flat_state(nnx.state(module))
        nnx.update(module, nnx.from_flat_state([(path, drawn(path, variable)) for path, variable in pairs]))
    return modules


run = nnx.jit(lambda model: model(TOKENS, deterministic=True))


def leaves(*modules):
    pairs = [pair for module in modules for pair in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))]
    return {(i, path): np.asarray(v.get_value()) for i, (path, v) in enumerate(pairs)}


def same(these, those):
    these, those = leaves(*these), leaves(*those)
    assert these.keys() == those.keys()
    for name in these:
        assert these[name].dtype == those[name].dtype, name
        np.testing.assert_array_equal(these[name], those[name], err_msg=str(name))


class Counting(nnx.Module):
    """Every kind of thing that a variable can hold."""

    def __init__(self, seed=0):
        self.seen, self.rate, self.done, self.name = (nnx.Variable(x) for x in (0, 0.0, False, ""))
        self.best = nnx.Variable({"loss": jnp.zeros(2), "step": 0, "none": None})
        self.big = nnx.Variable(np.zeros(2, np.int64))
        self.empty = nnx.Param(jnp.zeros((0, 3), jnp.bfloat16))
        self.layers = nnx.List([nnx.Param(jnp.full(2, seed)), nnx.Param(jnp.zeros((2, 0)))])
        self.plain = jnp.full(3, seed)
        self.four = Constant(jnp.full(3, seed, jnp.int4))
        self.key = nnx.Variable(jax.random.key(seed))


# What is in variables


def test_everything_that_variables_hold_is_stored(tmp_path):
    """deepmd-kit#5748 (a parameter of size zero); mlx#1328, maxtext#4343 (variables that are no parameters)."""
    model, other = Counting(7), Counting()
    for name, value in dict(seen=7, rate=float("inf"), done=True, name="best").items():
        getattr(model, name).set_value(value)
    model.best.set_value({"loss": jnp.array([1.0, 2.0]), "step": 2**40, "none": None})
    model.big.set_value(np.array([2**40, -1]))
    checkpoint.save(tmp_path, model, step=1)
    assert checkpoint.restore(tmp_path, other) == 1
    for name in ("seen", "rate", "done", "name"):
        assert getattr(other, name).get_value() == getattr(model, name).get_value()
        assert type(getattr(other, name).get_value()) is type(getattr(model, name).get_value())
    best = other.best.get_value()
    assert best["loss"].tolist() == [1, 2] and best["step"] == 2**40 and best["none"] is None
    assert other.big.get_value().dtype == np.int64 and other.big.get_value().tolist() == [2**40, -1]
    assert other.plain.tolist() == [7, 7, 7] and other.four[...].dtype == jnp.int4 and other.four[0] == 7
    assert other.layers[0][...].tolist() == [7, 7] and other.empty[...].shape == (0, 3)
    assert (jax.random.key_data(other.key[...]) == jax.random.key_data(model.key[...])).all()
    assert sorted(os.listdir(tmp_path)) == ["1"]


def test_numbers_that_a_compiled_step_made_arrays(tmp_path):
    count = nnx.jit(lambda model: model.seen.set_value(model.seen.get_value() + 1))
    model, array = (nnx.Dict(seen=nnx.Variable(0)) for _ in range(2))
    count(array)
    checkpoint.save(tmp_path, model, step=0)
    checkpoint.save(tmp_path, array, step=1)
    checkpoint.restore(tmp_path, model)
    assert isinstance(model.seen.get_value(), jax.Array) and model.seen[...] == 1
    checkpoint.restore(tmp_path, array, step=0)
    assert array.seen[...] == 0 and array.seen[...].dtype == jnp.int32
    array.seen.set_value(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"model/seen is 0, the model has float32\[2\]"):
        checkpoint.restore(tmp_path, array, step=0)
    array.seen.set_value("text")
    with pytest.raises(ValueError, match=r"model/seen is int32\[\], the model has 'text'"):
        checkpoint.restore(tmp_path, array, step=1)


def test_what_cannot_be_stored_is_named(tmp_path):
    model = Counting()
    model.seen.set_value(1j)
    with pytest.raises(TypeError, match="model/seen is a complex, and a checkpoint holds arrays, numbers and texts"):
        checkpoint.save(tmp_path, model, step=1)
    model.seen = nnx.data((jnp.ones(2),))
    with pytest.raises(
        TypeError, match="model/seen/0 is an array outside of variables, in a tuple: hold it in an attn"
    ):
        checkpoint.save(tmp_path, model, step=1)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = optax.adam(0.1).init(nnx.state(model))
    for call in (checkpoint.save, checkpoint.restore):
        with pytest.raises(
            TypeError, match="optimizer must be nnx.Optimizer.model.*holds the state of optax, got tuple"
        ):
            call(tmp_path, model, state, step=1)
        with pytest.raises(TypeError, match="model must be an nnx.Module, got State"):
            call(tmp_path, nnx.state(model), step=1)
    with pytest.raises(TypeError, match="model/bias is only a shape, as nnx.eval_shape makes it"):
        checkpoint.save(tmp_path, nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))), step=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", holding())
def test_modules_whose_masks_and_scores_hold_arrays(name, tmp_path):
    make = lambda seed: MultiHeadAttention(16, 4, **holding()[name], rngs=nnx.Rngs(seed))
    model, other = make(0), make(1)
    nnx.update(model, jax.tree.map(lambda x: x + x, nnx.state(model, Constant)))
    checkpoint.save(tmp_path, model, step=1)
    checkpoint.restore(tmp_path, other)
    same([model], [other])


# Others' files, and steps that are there


def test_what_this_library_did_not_write_stays(tmp_path):
    """Folders and files whose names are numbers; only checkpoints are counted, and removed."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "photos.txt").write_text("mine")
    (tmp_path / "2024" / "january").mkdir(parents=True)
    (tmp_path / "3000").write_text("a file")
    assert checkpoint.latest(tmp_path) is None
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, model, step=step, keep=2)
    assert checkpoint.latest(tmp_path) == 30 and checkpoint.restore(tmp_path, model) == 30
    assert (tmp_path / "1" / "photos.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path), key=int) == ["1", "20", "30", "2024", "3000"]
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="1 is no intact checkpoint of attnjax: remove it, or save elsewhere"):
            checkpoint.save(tmp_path, model, step=1, overwrite=overwrite)
    (tmp_path / "40" / "arrays").mkdir(parents=True)  # perhaps one of ours that is damaged: refused, never removed
    checkpoint.save(tmp_path, model, step=50, keep=1)
    assert (tmp_path / "40").exists() and not (tmp_path / "30").exists()
    with pytest.raises(ValueError, match="40 is damaged or no checkpoint of attnjax"):
        checkpoint.restore(tmp_path, model, step=40)


def test_the_highest_steps_are_kept(tmp_path):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for step, keep, left in ((9, None, {9}), (20, None, {9, 20}), (15, 1, {15, 20}), (10, 2, {10, 15, 20})):
        checkpoint.save(tmp_path, model, step=step, keep=keep)
        assert set(map(int, os.listdir(tmp_path))) == left and checkpoint.latest(tmp_path) == max(left)


def test_a_step_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new, got = (nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in range(3))
    checkpoint.save(tmp_path, old, step=5)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.args.Composite", lambda **items: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save(tmp_path, new, step=5, overwrite=True)
    assert os.listdir(tmp_path) == ["5"]
    checkpoint.restore(tmp_path, got)
    same([got], [old])
    (tmp_path / "5").rename(tmp_path / "5.replaced")  # as when the machine went down while the new one was written
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.latest(tmp_path) == 5 and checkpoint.restore(tmp_path, got) == 5
    with pytest.raises(FileExistsError, match="holds step 5 already"):
        checkpoint.save(tmp_path, new, step=5)
    for model in (new, old, new):
        checkpoint.save(tmp_path, model, step=5, overwrite=True)
        assert os.listdir(tmp_path) == ["5"]
        checkpoint.restore(tmp_path, got)
        same([got], [model])


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("orbax.checkpoint.CompositeCheckpointHandler.finalize", fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), step=1)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_the_first_format_are_read(tmp_path):
    """They have the same layout, and no numbers in their descriptions."""
    model, other = made(0), made(1)
    checkpoint.save(tmp_path, *model, step=1)
    file = tmp_path / "1" / "about" / "metadata"
    about = json.loads(file.read_text()) | {"format": 1}
    del about["crc32"]
    file.write_text(json.dumps(about | {"crc32": folders._json_sum(about)}))
    checkpoint.restore(tmp_path, *other)
    same(model, other)
    file.write_text(json.dumps((about := about | {"format": 3}) | {"crc32": folders._json_sum(about)}))
    with pytest.raises(ValueError, match="has format 3, this attnjax reads 1 and 2: update attnjax"):
        checkpoint.restore(tmp_path, *other)


# Models that differ


def test_dropout_and_generators_may_differ(tmp_path):
    """mlx#1328: trained with dropout, loaded for use, and the other way round."""
    rates = dict(dropout=0.1, attention_dropout=0.1)
    kinds = {"with": rates, "without": {}}
    for kind, fields in kinds.items():
        checkpoint.save(tmp_path / kind, *made(0, **fields), step=1)
    for directory, kind in (("with", "without"), ("without", "with")):
        model, optimizer = made(1, **kinds[kind])
        keys = [jax.random.key_data(key) for key in jax.tree.leaves(nnx.state(model, nnx.RngKey))]
        assert checkpoint.restore(tmp_path / directory, model, optimizer) == 1
        same((model, optimizer), made(0, **kinds[kind]))
        for key, old in zip(jax.tree.leaves(nnx.state(model, nnx.RngKey)), keys, strict=True):
            np.testing.assert_array_equal(jax.random.key_data(key), old)
    with jax.default_prng_impl("rbg"):
        model, optimizer = made(1, **rates)
        key = jax.random.key_data(model.dropout.rngs.key[...])
        assert checkpoint.restore(tmp_path / "with", model, optimizer) == 1
        np.testing.assert_array_equal(jax.random.key_data(model.dropout.rngs.key[...]), key)
        same((model, optimizer), made(0, **rates))


def test_layers_in_one_array_and_in_many(tmp_path):
    """Trained with scan, used without, and back: the same numbers, optimizer and random streams included."""
    rates = dict(dropout=0.1, attention_dropout=0.1)
    for scan in (False, True):
        model, optimizer = made(0, scan=scan, **rates)
        checkpoint.save(tmp_path / str(scan), model, optimizer, step=1)
        other, its_optimizer = made(1, scan=not scan, **rates)
        checkpoint.restore(tmp_path / str(scan), other, its_optimizer)
        if scan:
            np.testing.assert_allclose(run(other), run(model), rtol=1e-5, atol=1e-6)
        checkpoint.save(tmp_path / f"{scan} other", other, its_optimizer, step=1)
        back = made(2, scan=scan, **rates)
        checkpoint.restore(tmp_path / f"{scan} other", *back)
        same(back, (model, optimizer))
        keys = [jax.tree.leaves(nnx.state(m, nnx.RngKey)) for m in (back[0], model)]
        for one, two in zip(*keys, strict=True):
            np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(two))
    for layers, stored, says in (
        (1, True, "layers/.* has 2 layers, the model has 1"),
        (3, True, "layers/2/.* is missing in the checkpoint"),
        (1, False, r"layers/.* is float32\[2, .*, the model has float32\[1"),
    ):
        other = shapes(scan=not stored, num_layers=layers)[0]
        with pytest.raises(ValueError, match=says):
            checkpoint.restore(tmp_path / str(stored), other, same_config=False)
    first = shapes(num_layers=1)[0]
    parts = checkpoint.restore(tmp_path / "True", first, strict=False, same_config=False)
    assert parts.missing == () and "model/stack/layers/attention/query/kernel" in parts.left
    kernel = model.stack.layers.attention.query.kernel
    np.testing.assert_array_equal(first.stack.layers[0].attention.query.kernel[...], kernel[0])


def test_types_are_converted_when_asked(tmp_path):
    model, optimizer = made(0)
    checkpoint.save(tmp_path, model, optimizer, step=1)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        half, _ = made(1, param_dtype=param_dtype)
        checkpoint.restore(tmp_path, half, dtype=jnp.bfloat16)
        for (_, x), (_, y) in zip(leaves(half).items(), leaves(model).items(), strict=True):
            np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))
    half, its_optimizer = made(1, param_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"is float32\[.*, the model has bfloat16\[.*; dtype= converts it"):
        checkpoint.restore(tmp_path, half)
    with pytest.raises(ValueError, match=r"; dtype= converts it"):
        checkpoint.restore(tmp_path, half, strict=False)
    checkpoint.restore(tmp_path, half, its_optimizer, dtype=jnp.bfloat16)
    moments = its_optimizer.opt_state[0]
    assert moments.mu["norm"]["scale"][...].dtype == jnp.bfloat16
    assert moments.count[...] == optimizer.opt_state[0].count[...] and moments.count[...].dtype == jnp.int32
    with jax.enable_x64(True):
        double, _ = made(0, param_dtype=jnp.float64)
        checkpoint.save(tmp_path / "double", double, step=1)
    checkpoint.restore(tmp_path / "double", model, dtype=jnp.float32)
    np.testing.assert_allclose(model.norm.scale[...], np.asarray(double.norm.scale[...]), rtol=1e-7)
    assert model.norm.scale[...].dtype == jnp.float32


def test_parts_are_taken_when_asked(tmp_path):
    config = EncoderConfig(13, features=8, num_heads=2, num_layers=1, positions=RoPE())
    base, classifier = MaskedLM(config, rngs=nnx.Rngs(0)), SequenceClassifier(config, 3, rngs=nnx.Rngs(1))
    checkpoint.save(tmp_path, base, step=4)
    head = np.asarray(classifier.head.kernel[...])
    with pytest.raises(ValueError, match="Nothing was loaded. strict=False takes what both hold"):
        checkpoint.restore(tmp_path, classifier)
    parts = checkpoint.restore(tmp_path, classifier, strict=False)
    assert parts == (
        4,
        ("model/head/bias", "model/head/kernel", "model/pooler/bias", "model/pooler/kernel"),
        ("model/bias", "model/norm/bias", "model/norm/scale", "model/transform/bias", "model/transform/kernel"),
    )
    same([classifier.encoder], [base.encoder])
    np.testing.assert_array_equal(classifier.head.kernel[...], head)
    checkpoint.save(tmp_path / "classes", classifier, step=1)
    other = SequenceClassifier(config, 5, rngs=nnx.Rngs(2))
    parts = checkpoint.restore(tmp_path / "classes", other, strict=False)
    assert parts.missing == parts.left == ("model/head/bias", "model/head/kernel")
    same([other.encoder, other.pooler], [classifier.encoder, classifier.pooler])
    other_config = dataclasses.replace(config, activation="relu")
    with pytest.raises(ValueError, match="encoder/activation is 'gelu_exact', the model has 'relu'"):
        checkpoint.restore(tmp_path, SequenceClassifier(other_config, 5, rngs=nnx.Rngs(2)), strict=False)
    with pytest.raises(ValueError, match="they have nothing in common"):
        checkpoint.restore(tmp_path, nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0)), strict=False)
    with pytest.raises(ValueError, match="model/head/bias is missing, and the model has only its shape"):
        abstract = nnx.eval_shape(lambda: SequenceClassifier(config, 3, rngs=nnx.Rngs(0)))
        checkpoint.restore(tmp_path, abstract, strict=False)


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_that_has_only_shapes_is_filled(scan, tmp_path):
    """google/flax#5110, google/orbax#2540, #1105, google/flax#4383: nnx.eval_shape, and models with PRNG keys."""
    options = dict(dropout=0.1, attention_dropout=0.1)
    model, optimizer = made(0, **options)
    checkpoint.save(tmp_path, model, optimizer, step=1)
    abstract, its_optimizer = shapes(scan=scan, **options)
    checkpoint.restore(tmp_path, abstract, its_optimizer)
    if scan:
        assert abstract.stack.layers.dropout.rngs.key[...].shape == (2,)
    else:
        same((abstract, its_optimizer), (model, optimizer))
        train = nnx.jit(lambda model: model(TOKENS))
        np.testing.assert_array_equal(train(abstract), train(model))  # the same is dropped
    half = shapes(scan=scan)[0]
    checkpoint.restore(tmp_path, half, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.bfloat16)}
    checkpoint.save(tmp_path / "without", made(0)[0], step=1)
    with pytest.raises(ValueError, match="dropout/rngs/count is missing in the checkpoint"):
        checkpoint.restore(tmp_path / "without", shapes(**options)[0])


def test_shapes_say_where_arrays_lie(tmp_path):
    """By shardings of their own, or by the rules and the mesh that are set."""
    model, _ = made(0)
    checkpoint.save(tmp_path, model, step=1)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    rules = [("embed", None), ("heads", "model"), ("key_heads", "model"), ("size", None), ("mlp", "model")]
    rules += [("vocab", None), ("layers", None)]
    for scan in (False, True):
        with nnx.logical_axis_rules(rules), jax.set_mesh(mesh):
            abstract = shapes(scan=scan)[0]
            checkpoint.restore(tmp_path, abstract)
        layer = abstract.stack.layers if scan else abstract.stack.layers[1]
        spec = layer.attention.query.kernel[...].sharding.spec
        assert spec == PartitionSpec(*([None] if scan else []), None, "model", None)
    abstract = shapes()[0]
    own = NamedSharding(mesh, PartitionSpec("data"))
    nnx.update(
        abstract, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), nnx.state(abstract))
    )
    checkpoint.restore(tmp_path, abstract)
    assert {x.sharding for x in jax.tree.leaves(nnx.state(abstract))} == {own}
    checkpoint.restore(tmp_path, plain := shapes()[0])
    assert {x.sharding for x in jax.tree.leaves(nnx.state(plain))} == {SingleDeviceSharding(jax.devices()[0])}
    same([abstract], [model])
    same([plain], [model])


MOVED = """
import sys, jax, numpy as np
from flax import nnx
from attnjax.models import checkpoint
from attnjax.nn import EncoderBlock, Stack
names = ["embed", "heads", "key_heads", "size", "mlp", "layers"]
rules = [(name, "model" if name in ("heads", "key_heads", "mlp") else None) for name in names]
make = lambda scan=False: Stack(lambda rngs: EncoderBlock(16, 8, 16, rngs=rngs), 2, scan=scan, rngs=nnx.Rngs(0))
whole, divisions = make(), []
for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
    for i, shape in enumerate([(2, 4), (8, 1), (1, 8)]):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
        with nnx.logical_axis_rules(rules), jax.set_mesh(mesh):
            if i == 0:
                placed = nnx.eval_shape(make)
                checkpoint.save(sys.argv[1], whole, step=1, overwrite=True)
                checkpoint.restore(sys.argv[1], placed)
                checkpoint.save(sys.argv[1], placed, step=1, overwrite=True)
            for scan in (False, True):
                got = nnx.eval_shape(lambda: make(scan))
                checkpoint.restore(sys.argv[1], got)
                kernel = (got.layers if scan else got.layers[1]).attention.query.kernel[...]
                divisions.append(8 // kernel.addressable_shards[0].data.shape[-2])
                alone = whole.layers[1].attention.query.kernel[...]
                np.testing.assert_array_equal(np.asarray(kernel)[1] if scan else np.asarray(kernel), np.asarray(alone))
        one = nnx.eval_shape(make)
        checkpoint.restore(sys.argv[1], one)
        for x, y in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(whole)), strict=True):
            assert len(x.sharding.device_set) == 1
            np.testing.assert_array_equal(x, y)
print(divisions)
"""


def test_what_one_mesh_saved_another_restores(tmp_path):
    """google/orbax#648: saved on 2 x 4 devices, restored on 8 x 1, 1 x 8 and one; layers in one array and in many."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MOVED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout) == [4, 4, 1, 1, 8, 8] * 2


def test_large_models_are_read_bit_by_bit(tmp_path, monkeypatch):
    """What is cast or taken apart is held twice for one batch only; the numbers do not depend on batches."""
    model, optimizer = made(0, scan=True)
    checkpoint.save(tmp_path, model, optimizer, step=1)
    reads = []
    read = folders.read_arrays
    monkeypatch.setattr(
        folders, "read_arrays", lambda folder, like, names: reads.append(like) or read(folder, like, names)
    )
    whole, parts = made(1), made(2)
    checkpoint.restore(tmp_path, *whole)
    assert len(reads) == 1
    monkeypatch.setattr(checkpoint, "_BATCH", 500)
    checkpoint.restore(tmp_path, *parts)
    assert len(reads) > 10 and sum(map(len, reads[1:])) == len(reads[0])
    same(whole, parts)
