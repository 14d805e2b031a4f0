"""attnjax bench and what it rests on: costs against hand counts, peers against the oracle, the command for real."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import profiling
from attnjax.bench import accuracy, cases, cli, peers, report
from attnjax.bench.cases import CASES, Case
from attnjax.kernels import cpu

SMALL = Case("small", T=24, S=24, B=2, N=4, K=4, H=8, V=8)


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """The peers promote types; users of the command have JAX's default."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# What is counted.


def _multiply(*products):
    """FLOPs that XLA counts for einsums, given as (formula, shape, shape)."""

    def all_of_them(*arrays):
        return [jnp.einsum(formula, *arrays[2 * i : 2 * i + 2]) for i, (formula, _, _) in enumerate(products)]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for _, *pair in products for shape in pair]
    return jax.jit(all_of_them).lower(*shapes).compile().cost_analysis()["flops"]


def test_flops_are_those_of_the_products():
    t, s, n, h, v = 5, 7, 3, 4, 6
    query, key, value, logits = (t, n, h), (s, n, h), (s, n, v), (n, t, s)
    forward = _multiply(("tnh,snh->nts", query, key), ("nts,snv->tnv", logits, value))
    backward = _multiply(
        ("tnh,snh->nts", query, key),
        ("tnv,snv->nts", (t, n, v), value),
        ("nts,tnv->snv", logits, (t, n, v)),
        ("nts,snh->tnh", logits, key),
        ("nts,tnh->snh", logits, query),
    )
    counted = profiling.attention_flops(pairs=n * t * s, head_size=h, value_size=v)
    assert counted["forward"] == forward == 2 * 105 * 10
    assert counted["backward"] == backward == 2 * 105 * 24
    assert counted["tangent"] == 2 * 105 * (3 * h + 2 * v)


def test_flops_count_visible_pairs_only():
    case = dataclasses.replace(SMALL, causal=True)
    pairs = 2 * 4 * (24 * 25 // 2)
    assert case.pairs() == pairs
    assert case.flops() == 2 * pairs * 16
    assert dataclasses.replace(case, backward=True).flops() == 2 * pairs * 16 + 2 * pairs * 40


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"causal": True},
        {"window": 3},
        {"documents": 5},
        {"length": 10, "causal": True},
        {"window": 9, "documents": 2},
    ],
    ids=str,
)
def test_pairs_are_those_of_the_mask(rules):
    case = dataclasses.replace(SMALL, T=21, **rules)
    mask = case.options(case.draw())["mask"]
    seen = np.ones((21, 24), bool) if mask is None else np.asarray(mask.to_array(21, 24))
    assert case.pairs() == 2 * 4 * seen.sum()


def test_bytes_are_inputs_and_results():
    query, key, value = np.zeros((2, 5, 4, 8), np.float32), np.zeros((2, 7, 2, 8)), np.zeros((2, 7, 2, 6))
    key, value = key.astype(np.float32), value.astype(np.float32)
    out, lse = 2 * 5 * 4 * 6 * 4, 2 * 5 * 4 * 4
    inputs = query.nbytes + key.nbytes + value.nbytes
    counted = profiling.attention_bytes(query, key, value)
    assert counted["forward"] == inputs + out + lse
    assert counted["backward"] == 2 * inputs + 2 * out + lse


# What is measured.


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_temporary_bytes_of_a_known_function(wrap):
    x = jax.ShapeDtypeStruct((256, 8), jnp.float32)  # never made: nothing runs
    assert profiling.temporary_bytes(wrap(lambda x: (x @ x.T) @ x), x) == 256 * 256 * 4
    assert profiling.temporary_bytes(wrap(lambda x: x + 1), x) == 0


def test_interleaved_turns_the_order():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = profiling.interleaved(runs, rounds=3)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_sample_of_several_runs_starts_with_one_that_is_not_counted():
    calls = []
    profiling.interleaved({"a": lambda: calls.append("a")}, rounds=2, repeats={"a": 5})
    assert len(calls) == 2 * (1 + 5)


def test_what_is_queued_is_waited_for_once():
    """A device works in order: a sample of several runs has one wait, for the last of them."""
    calls = []
    queue = profiling.Queue(lambda: calls.append("s") or len(calls), lambda made: calls.append(f"w{made}"))
    profiling.sample(queue, 3)
    assert calls == ["s", "s", "s", "w3"]
    queue()
    assert calls[4:] == ["s", "w5"]
    calls.clear()
    profiling.interleaved({"a": queue}, rounds=2, repeats={"a": 2})
    assert calls == ["s", "w1", "s", "s", "w4"] + ["s", "w6", "s", "s", "w9"]


def test_a_queue_where_the_device_is_no_cpu(monkeypatch):
    assert not isinstance(profiling.awaited(lambda: 1), profiling.Queue)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert isinstance(profiling.awaited(lambda: 1), profiling.Queue)
    least = []
    monkeypatch.setattr(profiling, "sample", lambda run: least.append(run) or 1e-3)
    assert profiling.repeats_for(profiling.awaited(lambda: 1)) == 20 and profiling.repeats_for(lambda: 1) == 2


def test_matmul_rate():
    rate = profiling.matmul_rate("float32", size=64, rounds=3)
    assert rate["best"] >= rate["median"] > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H200", "H200 SXM"), ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("cpu", None)],
)
def test_known_chips(kind, name):
    chip = profiling.find_chip(kind)
    assert (chip and chip.name) == name


def test_the_machine_is_described():
    machine = profiling.describe_machine()
    assert machine["cores"] >= 1
    assert machine["platform"] == jax.default_backend()
    json.dumps(machine)


# The cases and the competitors.


def test_names_are_unique_and_masks_valid():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        case.options({"bias": np.zeros((1,), np.float32), "slopes": np.zeros(1, np.float32), **case.indices()})


def test_select():
    assert [case.name for case in cases.select(["tiny*"])] == ["tiny", "tiny-grad"]
    assert all(case.default for case in cases.select())
    assert 0 < len(cases.select(quick=True)) < len(cases.select())
    with pytest.raises(KeyError, match="nothing-like-it"):
        cases.select(["tiny", "nothing-like-it"])


RULES = {
    "all-at-once": {"causal": True, "documents": 3, "length": 20, "alibi": True, "bias": "1N1S", "backward": True},
    "pair-bias": {"bias": "11TS", "backward": True},
    "window": {"window": 5},
    "grouped": {"causal": True, "K": 2, "backward": True},
    "soft-cap": {"soft_cap": 2.0},
    "values": {"V": 6},
}


@functools.cache
def _asked(rules):
    case = dataclasses.replace(SMALL, name=rules, **RULES[rules])
    arrays = case.draw()
    return case, arrays, accuracy.consult(case, arrays)


def _in_the_place_of_cudnn(*args, implementation, bias=None, attend=jax.nn.dot_product_attention, **options):
    """What the same words mean; of a bias cuDNN wants every query."""
    assert implementation == "cudnn" and (bias is None or bias.shape[2:] == (24, 24))
    return attend(*args, bias=bias, implementation="xla", **options)


uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def flex_on_cpus(monkeypatch):
    """FlexAttention without its check that there is no compiled backward for CPUs: its plain formula has one."""
    if not peers.COMPETITORS["torch-flex"].missing:
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        monkeypatch.setattr(flex, "_validate_device", lambda *arrays: None)


@uncompiled
@pytest.mark.parametrize("name", ["cpu", "xla", "jax.nn", "jax.nn-cudnn", "flax", "torch", "torch-flex", "tokamax"])
@pytest.mark.parametrize("rules", RULES)
def test_a_competitor_does_the_case_or_says_why_not(name, rules, monkeypatch, flex_on_cpus):
    if peers.COMPETITORS[name].missing:
        pytest.skip(f"{name}: {peers.COMPETITORS[name].missing}")
    if name == "jax.nn-cudnn" and jax.default_backend() == "cpu":
        monkeypatch.setattr(jax.nn, "dot_product_attention", _in_the_place_of_cudnn)
    case, arrays, oracle = _asked(rules)
    try:
        prepared = peers.COMPETITORS[name].prepare(case, arrays, 2**30, True)
    except peers.CannotDo as error:
        assert rules in ("soft-cap", "values") and name not in ("cpu", "xla", "torch-flex", "tokamax"), error
        return
    made = prepared.to_numpy(prepared.run("checked"))
    errors = oracle.errors(made)
    assert list(errors) == ["output", "query", "key", "value"][: len(made)]
    assert max(errors.values()) < 1e-5  # float32 on values of size 1, not a bound on accuracy: that is tested elsewhere


def test_the_oracle_in_strips_of_rows_is_the_oracle(monkeypatch):
    case = dataclasses.replace(SMALL, B=1, causal=True, documents=2, alibi=True, bias="11TS", backward=True)
    whole = accuracy.consult(case, case.draw())
    monkeypatch.setattr(accuracy, "_STRIP", 7 * 24 * 4)
    strips = accuracy.consult(case, case.draw())
    assert strips.rows.all()
    for one, other in zip(whole.answer, strips.answer, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_the_oracle_on_a_part_of_rows_and_heads(monkeypatch):
    case = dataclasses.replace(SMALL, K=2, causal=True, backward=True)
    monkeypatch.setattr(accuracy, "_STRIP", 3 * 24 * 2)
    monkeypatch.setattr(accuracy, "_ALL_HEADS", 1)
    monkeypatch.setattr(accuracy, "_ALL_ROWS", 1)
    arrays = case.draw()
    oracle = accuracy.consult(case, arrays)
    assert oracle.rows.sum() == 12 and oracle.rows[0] and oracle.rows[-1]
    assert not arrays["checked"][:, ~oracle.rows].any()
    assert oracle.answer[0].shape == (1, 12, 2, 8) and oracle.answer[2].shape == (1, 24, 1, 8)
    prepared = peers.COMPETITORS["jax.nn"].prepare(case, arrays, 2**30, True)
    assert max(oracle.errors(prepared.to_numpy(prepared.run("checked"))).values()) < 1e-5


# The command.


def _command(*words):
    command = [sys.executable, "-m", "attnjax.bench.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_measures_and_writes_json(tmp_path):
    file = tmp_path / "made.json"
    done = _command("bench", "--case", "tiny", "--impl", "xla", "jax.nn", "--rounds", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "[1/1] tiny: xla " in done.stderr
    made = json.loads(file.read_text())
    assert {"machine", "versions", "date", "command", "matmul_rates", "rows"} <= set(made)
    assert made["versions"]["jax"] == jax.__version__
    assert made["matmul_rates"]["float32"]["median"] > 0
    assert [row["implementation"] for row in made["rows"]] == ["xla", "jax.nn"]
    for row in made["rows"]:
        assert row["status"] == "ok" and row["rounds"] == 2
        assert row["command"] == "attnjax bench --case tiny --impl xla jax.nn --rounds 2"
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["flops"] == 2 * 4 * 16 * 16 * 64
        assert row["rate"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["share"] == pytest.approx(row["rate"] / row["matmul_rate"])
        assert 0 <= row["errors"]["output"] < 1e-5
        assert row["temporary_bytes"] > 0
    assert "x jax.nn" in done.stdout and "attnjax bench --case tiny --impl xla jax.nn --rounds 2" in done.stdout
    shown = _command("bench", "--show", str(file))
    assert shown.stdout == done.stdout


def test_import_attnjax_loads_no_bench():
    names = "'attnjax.bench', 'flax', 'rich', 'matplotlib'"
    code = f"import attnjax.profiling, sys; print([name for name in ({names}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"


def test_list(capsys):
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in CASES)
    assert all(name in printed for name in peers.COMPETITORS)


def test_a_reader_that_stops_reading_is_no_error():
    command = [sys.executable, "-u", "-m", "attnjax.bench.cli", "bench", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline().startswith(b"cases")
        running.stdout.close()
        assert (running.wait(timeout=100), running.stderr.read()) == (0, b"")


def test_list_of_some(capsys):
    assert cli.main(["bench", "--list", "--case", "tiny*", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("bfloat16 forward") == 2 and "causal-1024" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "tinny"], "--case tinny: unknown; did you mean tiny"),
        (["--case", "zzzzzz"], "--case zzzzzz: unknown; there are tiny, tiny-grad"),
        (["--impl", "jaxnn"], "--impl jaxnn: unknown; did you mean jax.nn"),
        (["--dtype", "float31"], "--dtype float31: unknown; did you mean float32"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--json", "no/such/place.json"], "--json no/such/place.json: there is no directory no/such"),
        (["--show", "no-such-file.json"], "--show no-such-file.json: cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_words_that_make_no_sense(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_not_shown(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("[1]")
    with pytest.raises(SystemExit):
        cli.main(["bench", "--show", str(file)])
    assert "not a file that --json of this version wrote" in capsys.readouterr().err


def test_who_takes_part_where(monkeypatch):
    """Each device has its own kernels and peers; what is for others is left out, and named it is an error."""
    monkeypatch.setattr(peers.Competitor, "missing", None)  # whatever is installed
    taking_part = lambda: {name for name, one in peers.COMPETITORS.items() if not one.absent}
    only = {"cpu": {"cpu"}, "tpu": {"mosaic_tpu"}}
    only["gpu"] = {"cudnn", "triton", "mosaic_gpu", "jax.nn-cudnn", "torch-flex"}
    for platform, own in only.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        others = set.union(*(names for name, names in only.items() if name != platform))
        assert taking_part() == set(peers.COMPETITORS) - others | own
    monkeypatch.undo()
    assert peers.COMPETITORS["mosaic_tpu"].absent == "for TPUs only"


def test_a_record_in_a_folder_is_named_after_the_device(tmp_path, monkeypatch, capsys):
    assert (
        cli._file_name({"platform": "gpu", "device": "NVIDIA H200", "processor": "P", "cores": 3}) == "nvidia-h200.json"
    )
    assert cli.main(["bench", "--case", "tiny", "--impl", "xla", "--rounds", "1", "--json", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.endswith(f"-{profiling.usable_cores()}-cores.json")
    assert json.loads(file.read_text())["rows"][0]["status"] == "ok"


def test_cases_for_gpus():
    """Every kind of mask and score is there, forward and with gradients, in bfloat16, and none by default."""
    found = cases.select(["gpu-*"])
    assert all(case.dtype == "bfloat16" and not case.default for case in found)
    assert {case.H for case in found} == {64, 128, 256}
    for field in ("causal", "window", "documents", "bias", "alibi", "soft_cap"):
        assert {case.backward for case in found if getattr(case, field)} == {False, True}
    assert any(case.K < case.N for case in found) and any(case.T == 1 for case in found)


@uncompiled
def test_cases_for_gpus_made_small(flex_on_cpus):
    """Their rules at sizes for a CPU: FlexAttention and ours agree with the oracle on all of them."""
    names = [name for name in ("xla", "torch-flex") if not peers.COMPETITORS[name].missing]
    for case in cases.select(["gpu-*-grad", "gpu-decode*"]):
        length = lambda x: max(1, x // 256)
        small = {"B": 2, "N": max(2, case.N // 8), "K": max(1, case.K // 8), "H": 16, "V": 16, "dtype": "float32"}
        small |= {"T": length(case.T), "S": length(case.S), "window": case.window and length(case.window)}
        case = dataclasses.replace(case, **small)
        arrays = case.draw()
        oracle = accuracy.consult(case, arrays)
        for name in names:
            prepared = peers.COMPETITORS[name].prepare(case, arrays, 2**30, True)
            assert max(oracle.errors(prepared.to_numpy(prepared.run("checked"))).values()) < 2e-5, (case.name, name)


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    absent = dataclasses.replace(peers.COMPETITORS["torch"], module="no_such_module")
    monkeypatch.setitem(peers.COMPETITORS, "torch", absent)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--impl", "torch"])
    assert stopped.value.code == 2
    assert "--impl torch: not installed: pip install 'attnjax[peers]'" in capsys.readouterr().err


def test_what_needs_too_much_memory_is_a_row_that_says_so(capsys):
    assert cli.main(["bench", "--case", "tiny", "--impl", "xla", "--memory", "1e-5"]) == 1
    assert "refused: needs about 0.0 GiB, 0.0 GiB are allowed" in capsys.readouterr().out


def _fake(run=lambda which: None, raising=None):
    """A competitor that gives zeros, after doing something of its own."""

    def prepare(case, arrays, limit, asked):
        if raising is not None:
            raise raising
        zeros = np.zeros((case.B, case.T, case.N, case.V))
        return peers.Prepared(run, lambda made: [zeros if made is None else zeros + made])

    return peers.Competitor("fake", "attnjax", "", prepare)


def _fails_when_timed():
    calls = []

    def run(which):
        calls.append(which)
        if len(calls) > 6:
            raise ValueError("gave up\nand a second line")

    return run


def test_what_goes_wrong_is_a_row_that_says_so(monkeypatch, capsys):
    fakes = {
        "raises": (_fake(raising=RuntimeError("broken\nlong story")), "failed: RuntimeError: broken"),
        "memory": (_fake(raising=MemoryError("no more")), "out of memory: no more"),
        "exhausted": (_fake(raising=RuntimeError("RESOURCE_EXHAUSTED: so big")), "out of memory: RESOURCE_EXHAUSTED"),
        "unable": (_fake(raising=NotImplementedError("no such thing")), "cannot: no such thing"),
        "later": (_fake(_fails_when_timed()), "failed: ValueError: gave up"),
        "fine": (_fake(), "e"),  # its error, a number like 2e-01
    }
    for name, (fake, _) in fakes.items():
        monkeypatch.setitem(peers.COMPETITORS, name, fake)
    assert cli.main(["bench", "--case", "tiny", "--impl", *fakes, "--rounds", "2"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    lines["raises"] = lines.pop("tiny")  # the first line of the case starts with its name
    for name, (_, text) in fakes.items():
        assert text in lines[name]
    assert "story" not in lines["raises"] and "second" not in lines["later"]


def test_a_broken_oracle_is_a_row_too(monkeypatch, capsys):
    def broken(case, arrays):
        raise RuntimeError("no oracle today")

    monkeypatch.setattr("attnjax.bench.run.consult", broken)
    assert cli.main(["bench", "--case", "tiny", "--impl", "jax.nn"]) == 1
    assert "failed: RuntimeError: no oracle today" in capsys.readouterr().out


@pytest.mark.parametrize(("made", "shown"), [(None, r"e-01|e\+00"), (np.nan, "nan")], ids=["wrong", "nan"])
def test_wrong_answers_show_in_the_error(made, shown, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(peers.COMPETITORS, "fake", _fake(lambda which: made))
    file = tmp_path / "made.json"
    assert cli.main(["bench", "--case", "tiny", "--impl", "fake", "--rounds", "1", "--json", str(file)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "fake  " in line)
    assert re.search(shown, line)
    json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_an_interruption_keeps_what_was_measured(monkeypatch, capsys):
    def stop(which):
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.COMPETITORS, "fake", _fake(stop))
    assert cli.main(["bench", "--case", "tiny", "--impl", "fake"]) == 130
    assert "attnjax bench --case tiny --impl fake" in capsys.readouterr().out


@pytest.mark.compiled
def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = {line[:10].strip(): line[10:].strip() for line in capsys.readouterr().out.splitlines()}
    assert f"jax {jax.__version__}," in lines["versions"]
    assert lines["devices"].startswith(f"{len(jax.devices())} x ") and f"({jax.default_backend()})" in lines["devices"]
    fastest, *others = cpu.instruction_sets()
    assert lines["cpu kernel"] == fastest + (f"; also {', '.join(others)}" if others else "")


def test_info_where_the_kernel_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_library", lambda: "the compiled kernel was not built")
    assert cli.main(["info"]) == 0
    assert "cpu kernel  none: the compiled kernel was not built" in capsys.readouterr().out


# The report.


def _record():
    row = {"dtype": "float32", "part": "forward", "flops": int(4e9), "operand_bytes": 0, "command": "attnjax bench"}
    row |= {"temporary_bytes": 2**21, "errors": {"output": 1e-6, "query": 3e-6}, "status": "ok", "note": ""}
    own = row | {"case": "one", "implementation": "xla", "seconds": 0.01, "rate": 4e11, "share": 0.8}
    other = row | {"case": "one", "implementation": "jax.nn", "seconds": 0.04, "rate": 1e11, "share": 0.2}
    refused = row | {"case": "one", "implementation": "torch", "seconds": None, "status": "refused", "note": "too big"}
    skipped = row | {"case": "one", "implementation": "flax", "seconds": None, "status": "skipped", "note": "no news"}
    machine = {"processor": "P", "platform": "cpu", "cores": 2, "features": ["avx2"], "device": "cpu", "devices": 1}
    return {
        "command": "attnjax bench",
        "date": "2026-01-01",
        "seconds": 1.0,
        "machine": machine,
        "versions": {"jax": "0"},
        "matmul_rates": {"float32": {"median": 5e11, "best": 6e11}},
        "implementations": ["xla", "reference"],
        "absent": {"tokamax": "not installed: get it"},
        "rows": [own, other, refused, skipped],
    }


def test_table():
    own, other, refused = report.table(_record())
    assert own == ["one", "xla", "10.00", "400", "0.80", "2.0 MiB", "3e-06", "4.00", "", ""]
    assert other[:3] == ["", "jax.nn", "40.00"] and other[7:] == ["", "", ""]
    assert refused == ["", "torch", *[""] * 7, "refused: too big"]
    assert report.summary(_record()) == [
        "xla, forward: 4.00 x jax.nn (1 case); 0.80 of the matrix-multiply rate (1 case)"
    ]


@pytest.mark.parametrize("style", ["plain", "markdown", "rich"])
def test_styles(style, capsys):
    if style == "rich" and importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    report.show(_record(), style)
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "float32 500 GFLOP/s",
        "10.00",
        "too big",
        "4.00 x jax.nn",
        "tokamax (not installed: get it)",
        "no news",
    ):
        assert text in printed
    assert ("| one | xla |" in printed) == (style == "markdown")
