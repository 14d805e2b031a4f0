"""Checkpoints: a resumed run is the uninterrupted one, bit by bit; what is damaged or foreign is refused whole."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnjax.models import (
    DecoderConfig,
    DecoderLM,
    Encoder,
    EncoderConfig,
    QuestionAnswering,
    TokenClassifier,
    checkpoint,
    folders,
)
from attnjax.nn import RoPE


class Net(nnx.Module):
    """Two layers, one of them bfloat16, and dropout: three kinds of variables."""

    def __init__(self, features=4, *, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, features, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(features, 2, param_dtype=jnp.bfloat16, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[0](self.dropout(nnx.relu(self.first(x))).astype(jnp.bfloat16))


def run(seed=0):
    model = Net(seed=seed)
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def train(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).astype(jnp.float32).mean())(model)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of integers
        optimizer.update(model, grads)
    return loss


def batches(start, stop):
    return [jax.random.normal(jax.random.key(i), (8, 3)) for i in range(start, stop)]


def values(*modules):
    parts = [jax.tree.leaves(nnx.state(module)) for module in modules]
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(keys(x)) for part in parts for x in part]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 3 and 5 of a run."""
    directory = tmp_path_factory.mktemp("run")
    model, optimizer = run()
    for step, x in enumerate(batches(0, 5), start=1):
        train(model, optimizer, x)
        if step in (3, 5):
            checkpoint.save(directory, model, optimizer, step=step, extras={"next": step, "files": ["a", "b"]})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def refuses(directory, says, error=ValueError, **options):
    """Restoring fails with that message and leaves model and optimizer as they were."""
    model, optimizer = run(seed=9)
    before = values(model, optimizer)
    with pytest.raises(error, match=says):
        checkpoint.restore(directory, model, optimizer, **options)
    for old, new in zip(before, values(model, optimizer), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_resumed_run_is_the_uninterrupted_one(saved):
    model, optimizer = run()
    losses = [train(model, optimizer, x) for x in batches(0, 8)]
    resumed, its_optimizer = run(seed=1)
    step = checkpoint.restore(saved, resumed, its_optimizer)
    assert (step, type(step)) == (5, int)
    again = [train(resumed, its_optimizer, x) for x in batches(checkpoint.extras(saved)["next"], 8)]
    np.testing.assert_array_equal(again, losses[5:])
    for one, other in zip(values(model, optimizer), values(resumed, its_optimizer), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_older_steps_can_be_asked_for(saved):
    model, optimizer = run(seed=1)
    assert checkpoint.latest(saved) == 5
    assert checkpoint.restore(saved, model, optimizer, step=3) == 3
    assert checkpoint.extras(saved, step=3) == {"next": 3, "files": ["a", "b"]}


def test_a_model_is_restored_without_its_optimizer(saved):
    model, other = Net(seed=1), run(seed=2)
    assert checkpoint.restore(saved, model) == 5
    checkpoint.restore(saved, *other)
    for one, two in zip(values(model), values(other[0]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_only_the_latest_are_kept_when_asked(tmp_path):
    model = Net()
    for step in range(4):
        checkpoint.save(tmp_path, model, step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with pytest.raises(FileNotFoundError, match="there is no step 1 in .*: it holds 2, 3"):
        checkpoint.restore(tmp_path, model, step=1)


def test_nothing_to_resume_from_is_an_error_and_latest_says_so(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None
    refuses(tmp_path, "there is no checkpoint in .*: nothing to resume from", FileNotFoundError)
    refuses(tmp_path / "missing", "there is no checkpoint in .*: nothing to resume from", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.extras(tmp_path)


def test_a_save_that_was_cut_short_does_not_count(copy):
    (copy / "5").rename(copy / "5.orbax-checkpoint-tmp")
    assert checkpoint.latest(copy) == 3


def test_another_model_is_refused_by_name(saved):
    for model, says in [
        (Net(features=5), r"of another model.*model/first/bias is float32\[4\], the model has float32\[5\]"),
        (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "model/bias is missing in the checkpoint.*Nothing was loaded"),
    ]:
        before = values(model)
        with pytest.raises(ValueError, match=says):
            checkpoint.restore(saved, model)
        for old, new in zip(before, values(model), strict=True):
            np.testing.assert_array_equal(old, new)
    model = Net()
    sgd = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="optimizer/opt_state/.* is not in the model"):
        checkpoint.restore(saved, model, sgd)


def test_a_model_of_the_same_shapes_that_computes_something_else_is_refused(tmp_path):
    config = EncoderConfig(7, features=8, num_heads=2, num_layers=1, positions=RoPE(), pre_norm=True)
    made = lambda **fields: TokenClassifier(dataclasses.replace(config, **fields), 2, rngs=nnx.Rngs(1))
    checkpoint.save(tmp_path, made(), step=1)
    decoder = DecoderConfig(7, features=8, num_heads=2, num_layers=1, positions=RoPE())
    checkpoint.save(tmp_path / "decoder", DecoderLM(decoder, rngs=nnx.Rngs(0)), step=1)
    longer = made(positions=RoPE(500.0))
    for directory, model, says in [
        (
            tmp_path,
            made(activation="relu", windows=(3,)),
            "encoder/activation is 'gelu_exact', the model has 'relu'; enc",
        ),
        (tmp_path, longer, "encoder/positions is .*10000.0.*the model has .*500.0"),
        (tmp_path, QuestionAnswering(config, rngs=nnx.Rngs(1)), "class is 'TokenClassifier', the model has 'Question"),
        (tmp_path / "decoder", Encoder(config, rngs=nnx.Rngs(1)), "class is 'DecoderLM', the model has 'Encoder'"),
    ]:
        before = values(model)
        with pytest.raises(ValueError, match=f"of another model, though .* same shapes: {says}.*Nothing was loaded"):
            checkpoint.restore(directory, model)
        for old, new in zip(before, values(model), strict=True):
            np.testing.assert_array_equal(old, new)
    assert checkpoint.restore(tmp_path, longer, same_config=False) == 1
    same = made(positions=RoPE(10000), hidden=32, dtype=jnp.bfloat16, remat=True, max_length=9, activation=jax.nn.gelu)
    assert checkpoint.restore(tmp_path, same) == 1


def test_an_optimizer_that_was_not_saved_is_missed(tmp_path):
    checkpoint.save(tmp_path, Net(), step=1)
    refuses(tmp_path, "optimizer/.* is missing in the checkpoint")


# orbax leaves the reading of the other arrays unfinished when one fails, and Python says so when it cleans up
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["removed", "emptied", "changed"])
def test_damaged_files_are_refused_or_do_not_matter(saved, tmp_path, harm):
    refused = 0
    for number, file in enumerate(sorted(p for p in (saved / "5").rglob("*") if p.is_file() and p.stat().st_size)):
        directory = shutil.copytree(saved, tmp_path / str(number))
        target = directory / file.relative_to(saved)
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 0xFF
        {"removed": target.unlink, "emptied": lambda t=target: t.write_bytes(b"")}.get(
            harm, lambda t=target, data=data: t.write_bytes(bytes(data))
        )()
        model, optimizer = run(seed=9)
        try:
            checkpoint.restore(directory, model, optimizer)
        except ValueError as error:
            assert "5 is damaged" in str(error)
            refused += 1
            expected = run(seed=9)
            gc.collect()
        else:  # orbax keeps some things twice
            expected = run(seed=1)
            checkpoint.restore(saved, *expected)
        for one, other in zip(values(model, optimizer), values(*expected), strict=True):
            np.testing.assert_array_equal(one, other)
    assert refused >= 3


def test_a_wrong_check_sum_is_noticed(copy, monkeypatch):
    monkeypatch.setattr(folders, "check_sum", lambda array: 1)
    refuses(copy, "damaged: the check sum of .* is wrong. Nothing was loaded")


def test_saving_refuses_what_it_cannot_write(saved, tmp_path):
    model = Net()
    with pytest.raises(FileExistsError, match="holds step 5 already: overwrite=True replaces it"):
        checkpoint.save(saved, model, step=5)
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        checkpoint.save(tmp_path, model, step=-1)
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        checkpoint.save(tmp_path, model, step=1, keep=0)
    with pytest.raises(TypeError, match="extras must be JSON values"):
        checkpoint.save(tmp_path, model, step=1, extras={"rng": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_is_masked(tmp_path):
    """Some of its variables hold nothing."""
    biases = lambda parameters: jax.tree.map(lambda x: x.ndim == 1, parameters)

    def made(seed):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, optax.masked(optax.sgd(0.1, momentum=0.9), biases), wrt=nnx.Param)

    (model, optimizer), (other, its_optimizer) = made(0), made(1)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(3)).sum())(model))
    checkpoint.save(tmp_path, model, optimizer, step=1)
    assert checkpoint.restore(tmp_path, other, its_optimizer) == 1
    for one, two in zip(*(jax.tree.leaves(nnx.state(x)) for x in (optimizer, its_optimizer)), strict=True):
        np.testing.assert_array_equal(one, two)
