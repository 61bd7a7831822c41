"""The page of rows that a model has scored, as a real browser shows it, and what stands in its file."""

import json
import math
import time

import pytest

from lightning_sft.generation.report.page import write_rows_page

SUMMARY = {"loss": 0.5, "perplexity": 1.649, "token_accuracy": 0.8125, "token_entropy": 0.25, "num_rows": 5}


@pytest.fixture
def page(browser, tmp_path):
    """Write rows to a page and open it; afterwards nothing was complained about or fetched from elsewhere."""

    def opened(rows, state="", **more):
        write_rows_page(tmp_path / "rows.html", rows, **({"summary": SUMMARY, "title": "train.jsonl"} | more))
        browser.look()
        browser.open((tmp_path / "rows.html").as_uri() + "#" + state)
        return browser

    yield opened
    assert browser.problems == []
    assert all(request.startswith("file:") for request in browser.requests)


def row(index, loss, response="answer", tokens=None, **changes):
    tokens = [response] if tokens is None else tokens
    made = {
        "index": index,
        "location": f"line {index + 1} of train.jsonl",
        "prompt": f"Question {index}",
        "response": response,
        "loss": loss,
        "share": loss / 100,
        "token_entropy": 0.5,
        "accuracy": 0.5,
        "num_tokens": 10 + len(tokens),
        "response_length": len(tokens),
        "tokens": tokens,
        "token_ids": list(range(len(tokens))),
        "token_log_probs": [-loss] * len(tokens),
        "token_entropies": [1.0] * len(tokens),
    }
    return made | changes


ROWS = [
    row(0, 0.05, "apple pie", accuracy=1.0, token_entropy=0.1, num_tokens=30),
    row(1, 2.0, "banana", share=0.5, accuracy=0.75, token_entropy=0.4, num_tokens=10),
    row(2, 5.0, "Cherry PIE", share=0.25, accuracy=0.0, token_entropy=0.3, num_tokens=20),
    row(3, 0.5, "date", token_log_probs=[math.log(0.009)], accuracy=0.25, token_entropy=0.2, num_tokens=40),
    row(4, math.nan, "", tokens=[], share=math.nan, accuracy=math.nan, token_entropy=math.nan, num_tokens=50),
]


def test_the_highest_loss_comes_first_and_every_other_order_can_be_chosen(page):
    browser = page(ROWS)
    assert browser.cards() == [2, 1, 3, 0, 4]
    for sort, indices in {
        "share": [1, 2, 3, 0, 4],
        "length": [4, 3, 0, 2, 1],
        "entropy": [1, 2, 3, 0, 4],
        "accuracy": [2, 3, 1, 0, 4],  # the least first
        "number": [0, 1, 2, 3, 4],
        "loss": [2, 1, 3, 0, 4],
    }.items():
        browser.evaluate(f"$('sort').value = {sort!r}; $('sort').dispatchEvent(new Event('change'))")
        assert browser.cards() == indices
    browser.click("#direction")
    assert browser.cards() == [0, 3, 1, 2, 4]
    assert browser.evaluate("location.hash") == "#sort=loss"


@pytest.mark.parametrize(("num_rows", "highest"), [(None, [2]), (33, [2]), (34, [2, 1])])
def test_each_filter_shows_its_rows_and_counts_them(page, num_rows, highest):
    browser = page(ROWS, num_rows=num_rows)
    expected = {"all": [2, 1, 3, 0, 4], "highest": highest, "rare": [2, 3], "known": [0]}
    for name, indices in expected.items():
        browser.click(f"[data-filter={name}]")
        assert browser.cards() == indices
        assert browser.texts(f"[data-filter={name}] b") == [str(len(indices))]
    assert len(browser.texts("#filters button")) == 4


def test_the_page_says_how_many_rows_were_scored_and_a_card_what_the_model_made_of_its_row(page):
    browser = page(ROWS, num_rows=10_000)
    count = "the 5 rows with the highest loss, of 10,000 that were scored"
    assert browser.evaluate("$('count').textContent") == count
    tiles = browser.texts("#summary div")
    assert tiles == ["Loss0.5nats", "Perplexity1.649", "Accuracy81.3%", "Entropy0.25nats", "Rows5"]
    browser.wait("document.querySelector('article header').innerText")  # a card is laid out when it comes into view
    head = browser.evaluate("document.querySelector('article header').innerText.split(/\\s*\\n\\s*/)")
    assert head[:4] == ["#2", "line 3 of train.jsonl", "loss 5", "share 25 %"]
    assert head[4:] == ["learnt 1 of 20 tokens", "entropy 0.3 nats", "accuracy 0 %"]
    page(ROWS[:2])
    assert browser.evaluate("$('count').textContent") == "2 rows"
    page([])
    assert not browser.evaluate("$('nothing').hidden")


def test_search_looks_at_prompt_response_and_location(page):
    browser = page(ROWS)
    for query, indices in {"pie": [2, 0], "question 3": [3], "LINE 5 OF": [4], "<b>": []}.items():
        browser.evaluate(f"$('search').value = {query!r}; $('search').dispatchEvent(new Event('input'))")
        browser.wait(f"state.q === {query!r}")
        assert browser.cards() == indices
        found = browser.evaluate("CSS.highlights.get('found').size")
        assert found == len(indices)


def test_one_row_alone_and_its_neighbours_in_the_data(page):
    browser = page(ROWS)
    browser.click("article header a")
    assert browser.cards() == [2]
    browser.evaluate("[...$('focus').children].find(b => b.textContent.includes('Next')).click()")
    assert browser.cards() == [3]
    assert browser.evaluate("location.hash") == "#row=3"
    browser.click("#everything")
    assert browser.cards() == [2, 1, 3, 0, 4]


def test_learnt_tokens_are_coloured_and_what_stands_between_turns_is_not(page):
    tokens = ["sure", " rare", " context", " open"]
    values = {"token_log_probs": [0.0, -5.0, None, 0.0], "token_entropies": [0.0, 0.0, None, 2.0]}
    browser = page([row(0, 1.25, "".join(tokens), tokens, prompt="", **values)])
    seen = (
        "[...document.querySelectorAll('article .t')]"
        ".filter(t => !/, 0\\)$|\\/ 0\\)$/.test(getComputedStyle(t).backgroundColor)).map(t => t.textContent)"
    )
    assert browser.evaluate("state.colour") == "log_prob"
    for colour, coloured in {"log_prob": [" rare"], "entropy": [" open"], "none": []}.items():
        browser.click(f"#colours [data-colour={colour}]")
        assert browser.evaluate(seen) == coloured
    assert browser.texts(".context") == [" context"]
    # There is no text before the response, which has the whole width.
    assert browser.evaluate("document.querySelectorAll('.left').length") == 0
    assert browser.evaluate("document.querySelector('.right').clientWidth") > 1000
    for place, words in {2: ["·rare", "probability", "0.674 %"], 3: ["·context", "probability", "\N{EN DASH}"]}.items():
        browser.hover(f"article .t:nth-child({place})")
        tip = browser.evaluate("$('tip').innerText.split(/\\s*[\\n\\t]\\s*/)")
        assert tip[:3] == words
        assert tip[-4:] == ["token id", str(place - 1), "position", f"{place} of 4"]


def test_hostile_text_is_shown_and_never_run(page):
    texts = [
        "</script><script>window.__pwned = 1</script>",
        "<!-- <script> --> <img src=x onerror='window.__pwned = 1'>",
        "&lt; {{ data }} {{ script }} '; \\\"`${window.__pwned = 1}`",
        "\u202eleft\u200f \u2028 \u2029 \x00 \x1b[31m \r\n",
        "half \ud83d pair",
    ]
    rows = [
        row(2 * place + split, 1.0, text, [*text] if split else [text], prompt=text, location=text)
        for place, text in enumerate(texts)
        for split in (0, 1)
    ]
    browser = page(rows, title=texts[0], summary={texts[1]: 1.0})
    for part in (".response", ".prompt", ".location"):
        seen = browser.texts(part)
        assert seen[:8] == [text for text in texts[:4] for _ in range(2)]
        assert [text[:5] for text in seen[8:]] == ["half ", "half "]
    assert browser.evaluate("document.querySelector('h1').textContent") == texts[0]
    assert browser.evaluate("document.querySelector('#summary dt').textContent") == texts[1]
    assert browser.evaluate("window.__pwned") is None


def test_dark_is_dark_and_no_width_scrolls_sideways(page):
    browser = page([*ROWS, row(5, 9.0, "x" * 500, location="y" * 300, prompt="z" * 300)])
    backgrounds = []
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 360)):
        browser.look(scheme, width)
        backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ends = "[...document.querySelectorAll('article *')].map(part => part.getBoundingClientRect().right)"
        assert browser.evaluate(f"Math.max(...{ends}) <= innerWidth")
    assert backgrounds == ["rgb(245, 246, 248)", "rgb(15, 18, 22)", "rgb(15, 18, 22)"]


def test_small_shares_of_a_large_data_set_can_be_told_apart(tmp_path):
    rows = [row(0, 1.0, share=0.00001), row(1, 1.0, share=0.00002, token_log_probs=[-0.123456, math.nan])]
    write_rows_page(tmp_path / "rows.html", rows, {"loss": math.nan}, title="t")
    block = (tmp_path / "rows.html").read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    data = json.loads(block)
    assert [shown["share"] for shown in data["rows"]] == [0.001, 0.002]  # in per cent
    assert data["rows"][1] == rows[1] | {"share": 0.002, "token_log_probs": [-0.1235, None]}
    assert (data["summary"], data["num_rows"]) == ({"loss": None}, 2)


@pytest.mark.slow
def test_ten_thousand_rows_are_written_and_opened_in_seconds(page):
    tokens = [f" token{place}" for place in range(150)]
    rows = [
        row(
            i,
            i % 97 / 10,
            "".join(tokens),
            tokens,
            token_log_probs=[-(i % 97) / 10 - place / 7 for place in range(150)],
        )
        for i in range(10_000)
    ]
    started = time.perf_counter()
    browser = page(rows)
    assert browser.evaluate("fitting.length") == 10_000
    assert time.perf_counter() - started < 60  # 5 s where nothing else runs
    assert len(browser.cards()) < 60
    browser.evaluate("apply({q: 'line 9999 of', sort: '-share'})")
    assert browser.cards() == [9998]
