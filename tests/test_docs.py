"""The API reference: one command builds it without a warning, and what is public is in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tljax import masks, optimizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_it_is_built_without_a_warning_and_has_every_room_and_public_function(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "pdoc", "tljax", "-o", str(tmp_path)]
    # On a new machine matplotlib asks for the fonts that there are, which pdoc would forbid with a warning.
    environment = {**os.environ, "PDOC_ALLOW_EXEC": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

    pages = {str(page.relative_to(tmp_path).with_suffix("")) for page in tmp_path.rglob("*.html")}
    places = ("tljax/*.py", "tljax/*/__init__.py", "tljax/strategies/*.py", "tljax/study/*.py")
    modules = {file.relative_to(ROOT) for place in places for file in ROOT.glob(place)}
    assert pages >= {str(file.parent if file.name == "__init__.py" else file.with_suffix("")) for file in modules}

    for module in (masks, optimizer):
        functions = {name: value for name, value in vars(module).items() if callable(value) and name[0] != "_"}
        public = {name for name, value in functions.items() if value.__module__.startswith(module.__name__)}
        text = (tmp_path / (module.__name__.replace(".", "/") + ".html")).read_text(encoding="utf-8")
        assert len(public) >= 3
        assert {name for name in public if f'id="{name}"' not in text} == set()
