"""The task of product reviews: labels by file, no line twice, splits that share nothing."""

import gzip
import json

from scripts import prepare_reviews


def test_rows_are_labelled_by_their_file_and_occur_once(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_reviews, "HELD_OUT", {"validation": 2, "test": 3})
    lines = {
        "pros": [*(f"good value number {i}" for i in range(12)), "Easy to use!", "small"],
        "cons": [*(f"bad  battery number {i}" for i in range(10)), "easy to use", "Bad battery"],
    }
    for domain, each in lines.items():
        text = json.dumps({"text": "\n".join(each), "domain": domain})
        (tmp_path / f"{domain}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    counts = prepare_reviews.prepare(tmp_path, tmp_path / "out")
    assert counts == {"validation": 4, "test": 6, "train": 10}
    rows = [
        json.loads(line)
        for split in counts
        for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len({row["text"] for row in rows}) == 20
    for row in rows:
        assert row["text"].startswith(("bad battery", "good value")[row["label"]])
    again = prepare_reviews.prepare(tmp_path, tmp_path / "again")
    assert again == counts
    for split in counts:
        both = [(tmp_path / name / f"{split}.jsonl").read_text() for name in ("out", "again")]
        assert both[0] == both[1]
