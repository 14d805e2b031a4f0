"""`attnjax tune` on this machine, and calls that find what it wrote."""

import json

import jax
import jax.numpy as jnp
import pytest

import attnjax as aj
from attnjax.bench import tune
from attnjax.bench.cases import CASES
from attnjax.bench.cli import main
from attnjax.core import tables
from attnjax.kernels import triton, xla

X = jax.ShapeDtypeStruct((1, 1000, 4, 64), jnp.bfloat16)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for a device, in a folder that calls read."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables._entries.cache_clear()

    def put(device, key, config):
        tune.write(tables.path_for(device), device, [tune.Tuned(key, config, 1.0, 2.0, 3)], "by hand")

    yield put
    tables._entries.cache_clear()


def on(kind, platform):
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=1)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def test_the_command_writes_what_calls_read(tmp_path, monkeypatch, capsys):
    """Few configs of a small case, but measured and written and found as all are."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tables")
    monkeypatch.setitem(tune._FORWARD, "xla", (xla.Config, dict(block_q=(16,), block_k=(16, 32))))
    monkeypatch.setattr(tune.profiling, "interleaved", lambda runs, *_, **__: {n: [4.0 - int(n)] for n in runs})
    tables._entries.cache_clear()
    assert main(["tune", "--case", "tiny", "--impl", "xla"]) == 0
    assert "tiny: block_q=16, block_k=32, 2000 ms, 2.00 x as fast as the usual, of 3" in capsys.readouterr().out
    (path,) = (tmp_path / "tables").iterdir()
    (entry,) = json.loads(path.read_text())["entries"].items()
    (case,) = (case for case in CASES if case.name == "tiny")
    assert entry[0].startswith(f"xla all {case.dtype} {max(16, case.H)} {max(16, case.T)}x{max(16, case.S)}")
    q = jax.ShapeDtypeStruct((case.B, case.T, case.N, case.H), case.dtype)
    mask = aj.Causal() if case.causal else None
    assert aj.explain(q, q, q, mask=mask, implementation="xla", platform="cpu").blocks.block_k == min(32, case.S)
    tables._entries.cache_clear()


def test_the_fastest_is_measured():
    """With the true timer: no config is slower than the usual one by more than it is itself."""
    (case,) = (case for case in CASES if case.name == "tiny")
    said = []
    found = tune.tune(case, "xla", 2, said.append)
    assert 0 < found.seconds <= found.usual
    assert found.tried == len(tune.configs("xla", False)) == 17
    assert said[-1] == "tiny: time 17 configs"


@pytest.mark.parametrize("part, prefix", [("forward", ""), ("backward", "backward_")])
def test_tables_of_gpus(table, part, prefix):
    sizes = {f"{prefix}{name}": n for name, n in dict(block_q=32, block_k=16, warps=2, stages=1).items()}
    table("NVIDIA H200", f"triton {part} bfloat16 64 1024x1024 mask", sizes)
    text = "32 queries x 16 keys, 2 warps, 1 stage"
    with on("NVIDIA H200", "gpu"):
        told = lambda **more: str(aj.explain(X, X, X, platform="cuda", implementation="triton", **more))
        assert text in told(mask=aj.Causal())
        assert text not in told()  # without a mask it is another problem
        assert text not in told(mask=aj.Causal(), score=aj.SoftCap(3.0))
        assert text not in told(mask=aj.Causal(), config=triton.Config(block_q=64, backward_block_q=64))
    with on("NVIDIA A100-SXM4-80GB", "gpu"):
        assert text not in told(mask=aj.Causal())


def test_tables_of_tpus(table):
    table("TPU v6 lite", "mosaic_tpu forward bfloat16 64 1024x1024", dict(block_q=256, block_k=128))
    with on("TPU v6 lite", "tpu"):
        blocks = aj.explain(X, X, X, platform="tpu").blocks
    assert (blocks.block_q, blocks.block_k) == (256, 128)
    assert aj.explain(X, X, X, platform="tpu").blocks != blocks  # which TPU is not known here


def test_entries_are_added(table):
    table("a device", "one", dict(block_q=16))
    table("a device", "two", dict(block_q=32))
    table("a device", "one", dict(block_q=64))
    made = json.loads(tables.path_for("a device").read_text())
    assert {key: entry["config"]["block_q"] for key, entry in made["entries"].items()} == {"one": 64, "two": 32}
    assert (made["format"], made["device"]) == (1, "a device")


@pytest.mark.parametrize(
    "words, text",
    [
        (["--case", "tiny", "--impl", "cpu"], "cpu has no sizes to tune; xla, triton, mosaic_tpu have"),
        (
            ["--case", "tiny-grad", "--impl", "xla"],
            "xla has the same sizes in all parts: give a case",
        ),
        (["--case", "tiny", "--impl", "triton"], "implementation 'triton' cannot: runs on NVIDIA GPUs only"),
        (["--case", "tiny", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--case", "nothing"], "nothing"),
        ([], "--case"),
    ],
)
def test_what_makes_no_sense(words, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *words])
    assert text in capsys.readouterr().err
