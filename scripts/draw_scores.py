"""Draw the scores that a study of LESS gives to rows, grouped by source, answer and label.

    python scripts/draw_scores.py configs/studies/less.yaml FOLDER docs/figures/scores.png

FOLDER is the output of that study; the figure shows the scores of its first seed.
"""

import argparse
import json
from pathlib import Path

import jaxlm
from jaxlm.cli import config as configs
from jaxlm.studies.figures import new_axes, save_figure
from jaxlm.studies.less import SelectionConfig, read_sides
from jaxlm.studies.less_rows import PoolRow

SCALE = 10_000


def rows_of(config: SelectionConfig, base_dir: Path) -> dict[str, PoolRow]:
    """Return the rows of the study by id."""
    pool, _ = read_sides(config, jaxlm.from_pretrained(config.model), base_dir=base_dir)
    return {row.id: row for row in pool.rows}


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    config = configs.load(SelectionConfig, options.study)
    rows = rows_of(config, options.study.parent)
    (file,) = options.folder.glob(f"seed-{config.seeds[0]}/select-less-*/scores.jsonl")
    groups: dict[str, list[float]] = {}
    for line in file.read_text().splitlines():
        found = json.loads(line)
        row = rows[found["id"]]
        kind = "wrong label" if row.noise else "right label"
        name = f"{row.source}:{row.text['completion']}, {kind}"
        groups.setdefault(name, []).append(SCALE * found["score"])
    names = sorted(groups, key=lambda name: sorted(groups[name])[len(groups[name]) // 2])
    axes = new_axes((5.6, 0.5 + 0.3 * len(names)))
    axes.boxplot([groups[name] for name in names], orientation="horizontal", whis=(5, 95), sym="")
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set(xlabel=f"score x {SCALE:g}; quartiles, 5 and 95 per cent")
    save_figure(axes, options.output)


if __name__ == "__main__":
    main()
