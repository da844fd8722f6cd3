"""A made-up run's folder, as a real one leaves it, with texts that try to be more than text; and a reader of pages."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from actors.evaluation.answers import GeneratedAnswer
from actors.evaluation.evaluator import Evaluation, Metrics
from actors.evaluation.token_view import TokenView
from actors.examples import write_examples
from actors.records import Example, TeacherScores, example_key, tail_logmass
from actors.score_store.store import ScoreStore
from orchestrator.config.load import dump_config, validate
from orchestrator.run.evaluation import comparison_table, write_evaluation
from orchestrator.run.results_table import write_table

EVIL = "<script>document.title='broken'</script> & \"more\""
TARGET_PROBABILITIES = (0.99, 0.92, 0.5, 0.2, 0.02, 0.97, 0.6)
DIVERGENCES = {"teacher": (0.0, 0.0, 0.0), "student_before": (2.0, 0.5, 0.25), "student_after": (0.02, 0.5, 0.0)}
EVENTS = (
    {
        "time": 1.7e9, "event": "process_started", "command": f"atkd run a.yaml 'x={EVIL}'", "atkd": "0.1.0",
        "commit": "0123456789abcdef0123456789abcdef01234567", "changed": True, "python": "3.11.9", "platform": f"Linux {EVIL}",
        "processor": "A Processor", "cpus": 2, "memory_bytes": 8 << 30, "packages": {"torch": "2.11", "ray": "2.60"},
    },
    {"time": 1.7e9, "event": "cluster", "ray": "2.60", "nodes": [
        {"cpus": 16.0, "gpus": 1.0, "accelerators": ["H100"], "memory_bytes": 1},
        {"cpus": 16.0, "gpus": 1.0, "accelerators": ["H100"], "memory_bytes": 2},
        {"cpus": 4.0, "gpus": 0, "accelerators": [], "memory_bytes": 1},
    ]},
    {"time": 1.7e9, "event": "stage_started", "stage": "train"},
    {"time": 1.7e9, "event": "stage_started", "stage": "train"},
    {"time": 1.7e9 + 75, "event": "stage_finished", "stage": "train", "seconds": 75.0, "tokens_per_second": 1234.5},
)  # fmt: skip

REFERRING = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")


def bare_run(folder: Path, name: str = "my-run") -> Path:
    shape = {"kind": "scratch", "hidden_size": 64, "layers": 2, "heads": 2}
    config = validate(
        {
            "name": name, "tokenizer": {"vocab_size": 300}, "teacher": {"model": shape, "finetune": {"train": {}}},
            "student": {"model": shape},
            "data": {"format": {"kind": "instruction", "prompt": "{{ q }} </pre><script>x()</script>"}},
        }
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def whole_run(folder: Path, name: str = "my-run") -> Path:
    run = bare_run(folder, name)
    (run / "metrics").mkdir()
    for training in ("finetune_teacher", "train"):
        easy = {"easy_share": 0.5, "easy_loss": 1.0, "easy_border": 0.125} if training == "train" else {}
        steps = [
            {"step": i, "loss": 4 / i, "learning_rate": 1e-3 / i, "hard_target": 1 / i, "tokens": 9, **easy} for i in range(1, 4)
        ]
        (run / "metrics" / f"{training}.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS) + '{"time": 1.7e9, "ev')
    store = write_store(run / "store")
    (run / "scores.json").write_text(json.dumps({"train": str(Path(store.place)), "heldout": str(Path(store.place))}))
    (run / "data").mkdir()
    write_examples(run / "data" / "heldout.arrow", examples())
    texts = [{"row": row, "task": EVIL, "prompt": "p", "response": "r"} for row in range(len(TARGET_PROBABILITIES))]
    (run / "data" / "heldout_texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (run / "evaluation").mkdir()
    evaluations = []
    for model, generated in (("teacher", "right"), ("student_before", EVIL), ("student_after", "")):
        right = generated == "right"
        answers = tuple(
            GeneratedAnswer(row, f"task{row % 2}", f"ask {EVIL}", "right", generated, right, None) for row in range(6)
        )
        metrics = Metrics(0.5, 0.25, 0.75, 0.1, 1.0, None, 1000, 7, 1.0, 2.0)
        evaluations.append(Evaluation(metrics, answers, (token_view(DIVERGENCES[model]),)))
        write_evaluation(run / "evaluation" / f"{model}.json", evaluations[-1])
    write_table(run, comparison_table(*evaluations))
    return run


def token_view(divergence: tuple[float, float, float], row: int = 3) -> TokenView:
    """A prompt, three targets of which one is a character of three tokens, and another one."""
    return TokenView(
        row=row, task=EVIL, pieces=("ask ", EVIL, " well", "\n", "", "", "語", "!"), before=0, after=2, targets=(2, 6, 7),
        uncertainty=(0.9, 0.1, 0.3), divergence=divergence, probability=(0.1, 0.9, 0.7), favourite=(EVIL, "語", "\n"),
        favourite_probability=(0.6, 0.9, 0.7),
    )  # fmt: skip


def examples() -> list[Example]:
    ids, mask = np.array([1, 0], dtype=np.int32), np.array([False, True])
    return [Example(ids, mask, example_key(ids, mask), row) for row in range(len(TARGET_PROBABILITIES))]


def write_store(path: Path) -> ScoreStore:
    """One row a target, two shards, of a vocabulary of three."""
    scores = []
    for example, probability in zip(examples(), TARGET_PROBABILITIES, strict=True):
        target, others = np.log([[probability], [(1 - probability) * 0.6]]).astype(np.float32)
        tail = tail_logmass(target, others[:, None])
        scores.append(TeacherScores(example.key, target, np.array([[2]], dtype=np.int32), others[:, None], tail))
    store = ScoreStore.open_or_create(path, {"top_k": 1, "vocab_size": 3}, len(scores), rows_per_shard=4)
    for shard in range(2):
        here = store.positions(shard)
        store.write_shard(shard, [examples()[i] for i in here], [scores[i] for i in here])
    return store


class Page(HTMLParser):
    """Collects what a page refers to, its elements, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[dict[str, str]] = []
        """Of each element, in the order of ``elements``."""
        self.text = ""
        self.feed(page)

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for attributes in self.attributes if "id" in attributes]

    def having(self, element: str, name: str) -> list[str]:
        """Values of an attribute of all such elements that have it."""
        pairs = zip(self.elements, self.attributes, strict=True)
        return [attributes[name] for tag, attributes in pairs if tag == element and name in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes.append({name: value or "" for name, value in attrs})
        self.references += [value or "" for name, value in attrs if name in REFERRING]

    def handle_data(self, data: str) -> None:
        self.text += data


def require_closed(content: str) -> None:
    """Nothing is fetched, no script, every reference has its target, no id stands twice, nothing listens to events."""
    page = Page(content)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids), "no two elements share an id"
    assert not {"script", "link", "iframe", "img", "image", "object", "embed", "base", "form"} & set(page.elements)
    assert not [name for attributes in page.attributes for name in attributes if name.startswith("on")]
    addresses = set(re.findall(r"https?://[^\"'<\s)]+", content))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of namespaces, never fetched"
    assert not re.search(r"url\((?!#)|@import", content)
