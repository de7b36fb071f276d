"""The comparison with other libraries: its verdicts, its table, and the libraries themselves where installed."""

import importlib
import math
import re
from pathlib import Path

import pytest
from nanogrpo.grpo import peers, verify
from nanogrpo.grpo.loss import PRESETS, policy_loss

DOCS = (Path(__file__).parent.parent / "docs" / "algorithms.md").read_text(encoding="utf-8")


def ours(config, batch):
    return policy_loss(**batch, config=config).loss


def lines_and_code(monkeypatch, peer, loss):
    monkeypatch.setitem(verify.PEERS, peer, loss)
    lines = []
    return lines, verify.run(peer, lines.append)


def test_a_peer_that_agrees(monkeypatch):
    lines, code = lines_and_code(monkeypatch, "trl", ours)
    rows = len(lines) - 2
    assert code == 0 and lines[-1] == f"{rows} equal, 0 differ for a known reason, 0 unknown"
    assert lines[0].split() == ["case", "loss", "ours", "trl", "|d", "gradient|", "verdict"]
    assert any(re.fullmatch(r"golden +dapo +(-0\.111004300786 +){2}0\.0e\+00  equal", line) for line in lines)
    labels = verify.loss_configs()
    assert set(PRESETS) <= set(labels) and len(verify.CASES) == 7
    assert rows == 3 * len(labels) + 4 * (len(PRESETS) + 1)


def test_an_unknown_difference_fails(monkeypatch):
    """In the value of one loss, or in its gradient alone."""
    value = lambda config, batch: ours(config, batch) + 2e-9 * (config.name == "dapo")
    lines, code = lines_and_code(monkeypatch, "trl", value)
    unknown = [line for line in lines if line.endswith("UNKNOWN")]
    assert code == 1 and unknown and all(" dapo " in line for line in unknown)
    gradient = lambda config, batch: ours(config, batch) + 0 * ours(config, batch).exp() * math.inf
    assert lines_and_code(monkeypatch, "trl", gradient)[1] == 1
    shifted = lambda config, batch: (
        ours(config, batch) + 1e-8 * (batch["logprobs"] - batch["logprobs"].detach()).sum()
    )
    lines, code = lines_and_code(monkeypatch, "liger", shifted)
    assert code == 1 and "1.0e-08  UNKNOWN" in "\n".join(lines)


@pytest.mark.parametrize("error, verdict", [(3e-8, "known: sapo, 1e-8"), (1e-6, "UNKNOWN")])
def test_a_known_difference_is_known_up_to_its_size(monkeypatch, error, verdict):
    off = lambda config, batch: ours(config, batch) + error * (config.name == "sapo")
    monkeypatch.setitem(verify.PEERS, "trl", off)
    rows = {(row.case, row.loss): row.verdict for row in verify.verify("trl")}
    assert rows["golden", "sapo"] == verdict and rows["golden", "grpo"] == "equal"
    assert off is not ours and rows["dirty padding", "grpo"] == "equal"


def test_nan_is_never_equal(monkeypatch):
    rows = lambda: {row.loss: row.verdict for row in verify.verify("trl") if row.case == "golden"}
    monkeypatch.setitem(verify.PEERS, "trl", lambda config, batch: ours(config, batch) * math.nan)
    assert rows()["grpo"] == "UNKNOWN"


def test_a_loss_that_the_peer_lacks_is_left_out(monkeypatch):
    only = lambda config, batch: ours(config, batch) if config.name == "grpo" else None
    monkeypatch.setitem(verify.PEERS, "liger", only)
    assert {row.loss.split()[0] for row in verify.verify("liger")} == {"grpo"}


@pytest.mark.parametrize("peer", verify.PEERS)
def test_a_peer_that_is_not_installed(monkeypatch, peer):
    def absent(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=f"verify against {peer} needs it installed: make test-oracles"):
        verify.verify(peer)
    assert peers.PEERS is verify.PEERS


def test_unknown_peer():
    with pytest.raises(ValueError, match="against: got 'trlx', expected one of"):
        verify.verify("trlx")


def test_the_documentation_holds_the_tables():
    assert verify.differences_table() in DOCS
    for name, config in PRESETS.items():
        assert (
            f"- **{name}** ({config.paper}), advantage `{config.estimator}`  \n  `{config.formula}`" in DOCS
        )


@pytest.mark.oracle
@pytest.mark.parametrize("peer", verify.PEERS)
def test_against_the_library(peer):
    """No unknown difference, and every known one is still there: an entry that no row shows is out of date."""
    rows = verify.verify(peer)
    assert [row for row in rows if row.verdict == "UNKNOWN"] == []
    assert sum(row.verdict == "equal" for row in rows) > len(rows) / 2
    seen = {row.verdict.removeprefix("known: ") for row in rows}
    listed = [known.where for known in verify.DIFFERENCES if peer in known.peers.split()]
    assert [where for where in listed if where not in seen] == []
