"""What elastic versions of published transformers cost."""

import pytest

import elit
from elit.cli import main
from elit.integrations import KNOWN_BASES

cost = pytest.importorskip("elit.integrations.cost", exc_type=ImportError)


def test_qwen_image_costs_what_the_paper_reports() -> None:
    """FLOPs of a step with CCFG beside the base with CFG: Table 3, at 100, 50, 25 and 12.5 % of 4096 tokens."""
    found = [row.guided / row.guided_of_base for row in cost.count_costs("qwen-image")]
    assert found == pytest.approx([0.688, 0.494, 0.409, 0.369], rel=0.03)


def test_all_known_bases_are_there() -> None:
    assert tuple(cost.BASES) == KNOWN_BASES
    for known in cost.BASES.values():
        window = {21: (1, 2, 4)}.get(known.grid[0], (1, 4, 4))
        assert all(tokens % side == 0 for tokens, side in zip(known.grid, window, strict=True))
    with pytest.raises(elit.ElitError, match="no base is named 'sana'; there are qwen-image, flux"):
        cost.known_base("sana")


def test_info_tells_what_an_elastic_version_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "dit-xl"]) == 0
    shown = capsys.readouterr().out
    assert "DiTTransformer2DModel" in shown and "Read after block 4 and Write after block 24" in shown
    base = cost.on_meta("dit-xl")[0]
    assert f"{base.num_parameters() / 1e6:,.0f} M parameters" in shown
    assert main(["info", "dit-xl", "--resolution", "512"]) == 2
    assert "resolution is for named models" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN_BASES)
def test_budgets_cost_less_and_less(name: str) -> None:
    rows = cost.count_costs(name)
    assert 1 < rows[0].forward / rows[0].forward_of_base < 1.04
    assert [row.forward for row in rows] == sorted((row.forward for row in rows), reverse=True)
    assert rows[-1].forward / rows[-1].forward_of_base < 0.45
