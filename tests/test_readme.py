"""The README's examples run, and its commands exist. Checks no numbers."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(number):
    """The names that an example makes."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[number]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_runs(capsys):
    names = run(0)
    gradients = names["gradients"]
    assert [g.shape for g in gradients] == [names["q"].shape] * 3 + [(8,)]
    assert all(bool((abs(g) > 0).any()) for g in gradients)
    assert "xla" in capsys.readouterr().out


def test_the_flax_example_runs():
    assert run(1)["text"].shape == (1, 8)


def test_its_commands_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), f"make {command}"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).is_file(), picture
