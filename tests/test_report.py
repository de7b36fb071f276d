"""The live table and the curves."""

from nanogrpo.grpo.report import COLUMNS, plot_curves, table_header, table_row

METRICS = {
    "step": 12, "loss": -0.0123456, "reward": 0.75, "reward_std": 0.25, "completion_length": 3.5, "kl": 0.001,
}  # fmt: skip


def test_rows_line_up_with_the_header():
    header, row = table_header(), table_row(METRICS)
    assert len(header) == len(row)
    assert [i for i, c in enumerate(header) if c == "|"] == [i for i, c in enumerate(row) if c == "|"]
    assert tuple(cell.strip() for cell in header.split("|")) == COLUMNS


def test_row_values():
    cells = [cell.strip() for cell in table_row(METRICS).split("|")]
    assert cells == ["12", "-0.012346", "0.750000", "0.250000", "3.500000", "0.001000"]


def test_curves_are_a_png(tmp_path):
    from matplotlib.image import imread

    history = [{**METRICS, "step": s, "reward": s / 4} for s in range(1, 5)]
    plot_curves({"seed 0": history, "seed 1": history[:2]}, tmp_path / "curves.png", "larger")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (720, 1080)
    assert picture[..., :3].min() < 0.5  # something is drawn
