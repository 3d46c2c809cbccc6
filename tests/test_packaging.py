"""What is published: the sdist is the checkout, the wheel what of it runs. (.ci/run runs the wheel.)"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CARDS = "experiments/strategy_cards/"


def for_readers(name: str) -> bool:
    """Whether a file of a checkout's packages is for its readers alone; the scores that cards are drawn against run."""
    return name.endswith((".png", ".ipynb", ".md", ".json")) and not name.startswith(CARDS)


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout():
    """The files that git keeps, or would keep."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    return set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines())


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """(the sdist, the wheel that was made of it), from a copy, where nothing is left of an earlier build."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in checkout:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--outdir", folder, copy)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_sdist_is_the_checkout(built, checkout):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    generated = {name for name in names if name.startswith("tljax.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - generated == checkout


def test_the_wheel_holds_what_runs_and_nothing_else(built, checkout):
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {n for n in checkout if n.startswith(("tljax/", "experiments/")) and not for_readers(n)} | {
        "tljax/data/shipped/LICENSES.md"
    }
