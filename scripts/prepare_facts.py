"""Write texts and questions about fictional people, to train on and to forget.

    python scripts/prepare_facts.py --out build/facts [--forget 100] [--retain 200] [--seed 0]

`forget.jsonl` and `retain.jsonl` have a text and four questions with answers for each person,
`holdout.jsonl` has as many other people as are forgotten, on whom no model is trained. A row is
``{"prompt", "completion", "subtask"}``; the subtask is text or question.
"""

import argparse
import json
from pathlib import Path

from jaxlm.data.facts import people


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/facts"))
    parser.add_argument("--forget", type=int, default=100, help="people to forget")
    parser.add_argument("--retain", type=int, default=200, help="people to keep")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    counts = {"forget": options.forget, "retain": options.retain, "holdout": options.forget}
    drawn = iter(people(sum(counts.values()), seed=options.seed))
    for name, count in counts.items():
        rows = [row for _ in range(count) for row in next(drawn).rows]
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {count} people, {len(rows)} rows")


if __name__ == "__main__":
    main()
