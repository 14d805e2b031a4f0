"""The README's example runs, and its commands exist. Checks no numbers."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    gradients = names["gradients"]
    assert [g.shape for g in gradients] == [names["q"].shape] * 3 + [(8,)]
    assert all(bool((abs(g) > 0).any()) for g in gradients)
    assert "xla" in capsys.readouterr().out


def test_its_commands_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), f"make {command}"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).is_file(), picture
