"""The loss curve of 20 steps in float32, as it once was: a change of the model, the data or the optimiser shows here.

`python -m tests.training.test_golden_curve` stores it anew, when a change of the curve is meant.
"""

import json
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden_curve.json")
# Other kernels and orders of summation move the last digits, and 20 steps carry them on.
TOLERANCE = 1e-4


def curve_of(run_dir: Path) -> dict[str, dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        key: {str(row["step"]): row[key] for row in rows if key in row}
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte")
    }


def test_the_curve_is_the_stored_one(finished_run):
    curve, golden = curve_of(finished_run), json.loads(GOLDEN.read_text())
    assert curve.keys() == golden.keys()
    for key, values in golden.items():
        assert curve[key] == pytest.approx(values, rel=TOLERANCE), key


if __name__ == "__main__":
    import torch

    from tests.training.conftest import write_corpus, write_recipe
    from transxssm.training import load_recipe, train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(write_recipe(Path(name), write_corpus(Path(name) / "corpus")))
        train(recipe)
        GOLDEN.write_text(json.dumps(curve_of(recipe.output_dir), indent=1) + "\n")
