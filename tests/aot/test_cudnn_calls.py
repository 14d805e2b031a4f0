"""The calls of cuDNN that are written here are those of `jax.nn`, to the last field: the interface is what is tested.

Needs the CUDA plugin and cuDNN's library, because `jax.nn` asks for its version.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from targets import TARGETS

import attnjax as aj

WORDS = {
    "full": (lambda n: None, {}),
    "causal": (lambda n: aj.Causal(), {"is_causal": True}),
    "window": (lambda n: aj.Window(100, 0), {"is_causal": True, "local_window_size": (100, 0)}),
    "lengths": (lambda n: aj.Lengths(n, n), {"lengths": True}),
    "all": (
        lambda n: aj.Window(100, 0) & aj.Lengths(n, n),
        {"is_causal": True, "local_window_size": (100, 0), "lengths": True},
    ),
}
CALL = re.compile(r"@(__cudnn\$\w+)\(.*?\) \{(.*)\} : (.*)")


def calls(attend, arguments):
    """(name, what XLA is told, layouts, types) of each call in the program of a gradient."""
    loss = lambda q, k, v, n: attend(q, k, v, n).astype(jnp.float32).sum()
    sharding = TARGETS["h200"].sharding()
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    with TARGETS["h200"].lowering():
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*placed).lower().as_text()
    found = []
    for name, attributes, types in CALL.findall(text):
        config = re.search(r'backend_config = "(.*?)"(?:,|$)', attributes)
        rest = attributes.replace(config[0], "")
        layouts = re.findall(r"(?:operand|result)_layouts = \[.*?\](?=,|$| )", rest)
        found.append((name, json.loads(config[1].replace(r"\22", '"')), sorted(layouts), types))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask, words", WORDS.values(), ids=WORDS)
def test_calls(mask, words, dtype):
    arguments = [jax.ShapeDtypeStruct((2, 256, heads, 64), dtype) for heads in (8, 2, 2)]
    arguments.append(jax.ShapeDtypeStruct((2,), jnp.int32))
    words = dict(words)
    with_lengths = words.pop("lengths", False)

    def theirs(q, k, v, n):
        lengths = {"query_seq_lengths": n, "key_value_seq_lengths": n} if with_lengths else {}
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths, **words)

    ours = lambda q, k, v, n: aj.attention(q, k, v, mask=mask(n), implementation="cudnn")
    got, want = calls(ours, arguments), calls(theirs, arguments)
    assert [name for name, *_ in got] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert got == want
