"""What fits cost and in which precision they are computed, as flags say it."""

import pytest
from test_programs import arguments

from experiments import transfer
from tljax.types import InputError


def test_a_dry_run_shows_what_decays(tasks, tmp_path, capsys):
    flags = {"optimizer": "adamw", "weight_decay": 0.1, "dry_run": True, "strategies": ("head_only",)}
    transfer.run(**arguments(tasks, tmp_path / "w", **flags))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "hidden_0/" in line or "head/" in line]
    decays = {row[0]: row[3] for row in rows if row[2] in ("trained", "frozen") and row[3] in ("yes", "no", "-")}
    assert decays == {"head/kernel": "yes", "head/bias": "no", "hidden_0/kernel": "-", "hidden_0/bias": "-"}


def test_a_rule_of_decay_that_matches_nothing_is_refused_by_the_name_of_its_flag(tasks, tmp_path):
    flags = {"optimizer": "adamw", "weight_decay": 0.1, "source_decay": "all"}
    with pytest.raises(InputError, match=r"^--decay=heads/\*\*: pattern 'heads/\*\*' matches no leaf; nearest: 'head/"):
        transfer.run(**arguments(tasks, tmp_path / "w", decay="heads/**", **flags))
    assert not (tmp_path / "w").exists()
