"""The page of several runs, as a real browser shows it."""

import json
import math
import time

import pytest
from support.records import made_up_record
from support.refusals import write

from lightning_sft import compare_runs
from lightning_sft.generation.records import write_records

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
HOSTILE = [
    "</script><script>window.__pwned = 1</script>",
    "<!-- <script> --> <img src=x onerror='window.__pwned = 1'>",
    "&lt; {{ data }} {{ tokens }} '; \\\"`${window.__pwned = 1}`",
    "\u202eleft\u200f \u2028 \u2029 \x00 \x1b[31m \r\n",
    "half \ud83d pair",
    "x" * 600,
]


def record(index, tokens, answer, prompt=None, **changes):
    prompt = f"Question {index}?" if prompt is None else prompt
    return made_up_record(prompt, tokens, answer, index=index, **({"ground_truth": "5"} | changes))


@pytest.fixture
def page(browser, tmp_path):
    """Compare runs, given as records by name, and open the page; nothing was complained about or fetched."""

    def opened(state="", metrics=None, **runs):
        for name, records in runs.items():
            write_records(tmp_path / name / "generations" / "step_1.jsonl", records)
            if metrics is not None:
                write(tmp_path / name / "metrics.csv", metrics[name])
        compare_runs([tmp_path / name for name in runs], tmp_path / "page.html")
        browser.look()
        browser.open((tmp_path / "page.html").as_uri() + "#" + state)
        return browser

    yield opened
    assert browser.problems == []
    assert all(request.startswith("file:") for request in browser.requests)


def filters(browser):
    return browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#filters button')]"
        ".map(button => [button.dataset.filter, button.textContent]))"
    )


def test_planted_differences_are_found_by_the_filters(page):
    answers = {"base": [1.0] * 30, "tuned": [1.0] * 30}
    answers["base"][4] = answers["base"][17] = answers["tuned"][9] = answers["base"][20] = answers["tuned"][20] = 0.0
    runs = {
        name: [record(i, f"{name if i in (3, 4) else 'same'} {i}", answer) for i, answer in enumerate(rewards)]
        for name, rewards in answers.items()
    }
    runs["base"].append(record(30, "old", 1.0, "Only the base model was asked"))
    browser = page(**runs)
    assert browser.evaluate("$('count').textContent") == "30 prompts that both runs were asked, 1 that only base was"
    assert filters(browser) == {
        "all": "All31",
        "gained_1": "tuned right, base wrong2",
        "lost_1": "base right, tuned wrong1",
        "reward": "Different rewards3",
        "text": "Different responses2",
        "missing": "Not asked of all1",
    }
    for name, indices in {
        "gained_1": [4, 17],
        "lost_1": [9],
        "reward": [4, 9, 17],
        "text": [3, 4],
        "missing": [30],
    }.items():
        browser.click(f"[data-filter={name}]")
        assert browser.cards() == indices
    assert browser.texts("article .column")[1] == "tunedThis run was not asked."
    row = browser.texts("#runs tbody tr:last-child > *")
    assert row[:3] == ["tuned", "1", f"+0.03395 %: {MINUS}0.067 to +0.1672 better, 1 worseof 30 pairs"]
    browser.evaluate("apply({filter: 'all', sort: '-reward'})")
    assert browser.cards()[:3] == [4, 17, 0]
    browser.click("#direction")
    assert browser.cards()[:2] == [9, 0]


def test_a_card_has_all_runs_their_samples_and_where_a_response_departs_from_the_first(page):
    first = [record(0, ["2", "+", "3"], 0.0, sample=i, token_entropies=[0.0, 3.0, 0.0]) for i in range(5)]
    second = [record(0, ["2", "-", "3"], 1.0, token_log_probs=[-1.0, math.log(0.25), -1.0])]
    third = [record(0, ["2", "+", "3"], None, ground_truth=None)]
    browser = page(one=first, two=second, three=third)
    assert filters(browser)["gained_1"] == "two right more often than one1"
    assert browser.texts("article .run") == ["one", "two", "three"]
    assert browser.texts(".columns .verdict") == ["✗ Wrong answer"] * 3 + ["✓ Correct", f"{NOTHING} Unscored"]
    assert browser.texts(".column .departs") == ["-"]
    browser.click(".column .gap")
    assert browser.texts(".sample .facts span:nth-child(2)")[:5] == [f"sample {i} of 5" for i in range(1, 6)]
    assert browser.texts("article header .verdict") == ["▲ reward +1"]
    browser.hover(".column:nth-child(2) .departs")
    assert browser.texts("#tip")[0].startswith("-probability25 %")
    browser.evaluate("apply({q: '2-', prompt: ''})")
    assert (browser.cards(), browser.evaluate("CSS.highlights.get('found').size")) == ([0], 1)


def test_runs_without_rewards_are_told_apart_by_text_and_log_prob(page):
    runs = {
        name: [record(i, text, None, ground_truth=None, token_log_probs=[log_prob]) for i, (text, log_prob) in found]
        for name, found in {
            "one": enumerate([("a", -1.0), ("b", -3.0), ("c", -2.0)]),
            "two": enumerate([("a", -1.5), ("x", -1.0), ("c", -2.0)]),
        }.items()
    }
    browser = page("sort=-log_prob", **runs)
    assert filters(browser) == {"all": "All3", "text": "Different responses1"}
    assert browser.cards() == [1, 2, 0]
    assert browser.texts("#runs td:nth-child(3)")[1] == f"{NOTHING}no pairs with rewards"


def test_curves_lie_over_one_another_and_tell_their_values_under_the_pointer(page):
    metrics = {
        "one": "step,train/loss,only\n10,2.0,\n20,1.0,0.00001\n30,0.5,\n",
        "two": "step,train/loss\n10,3.0\n30,2.5\n",
    }
    browser = page(metrics=metrics, **{name: [record(0, "a", 1.0)] for name in metrics})
    assert browser.texts("figcaption strong") == ["train/loss", "only"]
    assert browser.texts("figcaption b") == ["0.5", "2.5", f"1e{MINUS}5", NOTHING]
    points = browser.evaluate("[...document.querySelectorAll('figure:first-child polyline')].map(p => p.points.length)")
    assert points == [3, 2]
    browser.hover("#charts svg")  # in the middle, at step 20
    assert browser.texts("figcaption")[0] == "train/lossstep 2013"


def test_hostile_text_is_shown_and_never_run_and_no_width_scrolls_sideways(browser, tmp_path):
    for name, answer in {"a": 0.0, "b": 1.0}.items():
        records = [
            record(i, list(text) if split else text, answer, text + " " * split, ground_truth=text, reward_error=text)
            for i, text in enumerate(HOSTILE)
            for split in (0, 1)
        ]
        lines = [one.to_json() | {"stop_reason": one.response} for one in records]
        write(tmp_path / f"{name}.jsonl", "".join(json.dumps(one) + "\n" for one in lines))
    found = compare_runs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "page.html", names=HOSTILE[:2])
    backgrounds = []
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 360)):
        browser.look(scheme, width)
        browser.open(found.page.as_uri())
        backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ends = "[...document.querySelectorAll('article *')].map(part => part.getBoundingClientRect().right)"
        assert browser.evaluate(f"Math.max(...{ends}) <= innerWidth")
    assert backgrounds == ["rgb(245, 246, 248)", "rgb(15, 18, 22)", "rgb(15, 18, 22)"]
    browser.evaluate("while (!$('more').hidden) $('more').click()")
    for part, number in {".response": 4, ".expected .text": 2, ".error": 4}.items():
        seen = [text.removeprefix("⚠ reward failed: ") for text in browser.texts(part)]
        expected = [text for text in HOSTILE for _ in range(number)]
        assert [text for text in seen if "half" not in text] == [text for text in expected if "half" not in text]
    assert browser.texts("h1") == [f"Runs compared: {HOSTILE[0]}, {HOSTILE[1]}"]
    assert browser.evaluate("window.__pwned") is None
    assert browser.problems == []


@pytest.mark.slow
def test_ten_thousand_records_are_opened_in_seconds(page):
    tokens = [f" token{place}" for place in range(150)]
    runs = {
        name: [record(i, tokens, float(i % (2 + is_b) == 0), f"Problem {i}") for i in range(5000)]
        for is_b, name in enumerate("ab")
    }
    started = time.perf_counter()
    browser = page(**runs)
    assert browser.evaluate("fitting.length") == 5000
    assert time.perf_counter() - started < 60  # 8 s where nothing else runs, of which the browser takes one or two
    browser.evaluate("apply({q: 'Problem 4995', filter: 'gained_1'})")
    assert browser.cards() == [4995]
