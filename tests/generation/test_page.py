"""Pages as a real browser shows them, and what stands in their files."""

import http.server
import json
import math
import os
import threading
from functools import partial

import pytest
from support.records import made_up_record

from lightning_sft.generation.report.page import update_index, write_page

NOTHING = "\N{EN DASH}"
PREAMBLE = "A conversation. " * 10 + "\n"


@pytest.fixture
def page(browser, tmp_path):
    """Write records to a page and open it; afterwards nothing was complained about or fetched from elsewhere."""

    def opened(records, state="", summary=None, **more):
        write_page(tmp_path / "page.html", records, summary or {}, **({"title": "Step 7"} | more))
        browser.look()
        browser.open((tmp_path / "page.html").as_uri() + "#" + state)
        return browser

    yield opened
    assert browser.problems == []
    assert all(request.startswith("file:") for request in browser.requests)


def record(index, response, format_reward=1.0, answer_reward=1.0, tokens=None, **changes):
    made = made_up_record(f"{PREAMBLE}Question {index}", response if tokens is None else tokens, answer_reward)
    values = {"index": index, "response": response, "format_reward": format_reward, "ground_truth": f"truth {index}"}
    return vars(made) | values | changes


RECORDS = [
    record(0, "apple pie", token_entropy=0.25, response_length=30),
    record(1, "banana", answer_reward=0.0, token_entropy=0.75, response_length=10),
    record(2, "Cherry PIE", 0.0, 0.0, token_entropy=math.nan, response_length=20, stop_reason="length"),
    record(3, "date", None, None, ground_truth=None, token_entropy=0.5, response_length=40),
    record(4, "elder", 0.0, 0.0, reward_error="ValueError: no", token_entropy=0.125, response_length=50),
]


def data_of(path):
    text = path.read_text(encoding="ascii" if path.name == "data" else "utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


# -- a step's page, in the browser -----------------------------------------------------------------------------------


def test_each_filter_shows_its_records_and_counts_them(page):
    browser = page(RECORDS)
    expected = {
        "all": [0, 1, 2, 3, 4],
        "correct": [0],
        "answer": [1],
        "format": [2, 4],
        "unscored": [3],
        "cut": [2],
        "failed": [4],
    }
    assert browser.evaluate("[...document.querySelectorAll('#filters button')].map(b => b.dataset.filter)") == [
        *expected
    ]
    for name, indices in expected.items():
        browser.click(f"[data-filter={name}]")
        assert browser.cards() == indices
        assert browser.texts(f"[data-filter={name}] b") == [str(len(indices))]
        assert browser.evaluate(f"document.querySelector('[data-filter={name}]').ariaPressed") == "true"
    page(RECORDS[:1])
    assert browser.evaluate("[...document.querySelectorAll('#filters button')].map(b => b.dataset.filter)") == [
        "all",
        "correct",
    ]


def test_a_card_says_what_came_of_the_record(page):
    browser = page([record(0, "a"), record(0, "b", 0.0, 0.0, sample=1, reward_error="ValueError: <b>no</b>")])
    browser.wait("document.querySelector('article header').innerText")  # a card is laid out when it comes into view
    heads = browser.evaluate(
        "[...document.querySelectorAll('article header')].map(h => h.innerText.split(/\\s*\\n\\s*/))"
    )
    assert heads[0] == ["#0", "✓ Correct", "sample 1 of 2", "reward 1", "1 tokens", "0.5 nats", "ended by stop string"]
    assert heads[1][1:3] == ["⊘ Wrong format", "sample 2 of 2"]
    assert heads[1][-1] == "⚠ reward failed: ValueError: <b>no</b>"
    assert browser.evaluate("document.querySelector('.expected .text').textContent") == "truth 0"


def test_search_ignores_case_and_looks_at_prompt_response_and_ground_truth(page):
    browser = page(RECORDS)
    for query, indices in {"pie": [0, 2], "QUESTION 3": [3], "truth 4": [4], "a.p": [], "": [0, 1, 2, 3, 4]}.items():
        browser.evaluate(f"$('search').value = {query!r}; $('search').dispatchEvent(new Event('input'))")
        browser.wait(f"state.q === {query!r}")
        assert browser.cards() == indices
        assert browser.evaluate("$('nothing').hidden") is bool(indices)
        if query == "pie":
            assert browser.evaluate("[...CSS.highlights.get('found')].map(range => range.endOffset)") == [9, 10]
            assert browser.evaluate("location.hash") == "#q=pie"


def test_sorting_puts_what_has_no_value_last(page):
    browser = page(RECORDS)
    for sort, indices in {
        "length": [1, 2, 0, 3, 4],
        "-length": [4, 3, 0, 2, 1],
        "entropy": [4, 0, 3, 1, 2],
        "-entropy": [1, 3, 0, 4, 2],
        "-reward": [0, 1, 2, 4, 3],
    }.items():
        page(RECORDS, f"sort={sort}")
        assert browser.cards() == indices
    browser.click("#direction")
    assert browser.cards() == [1, 2, 4, 0, 3]


def test_tokens_are_coloured_by_what_was_chosen_and_nothing_moves(page):
    tokens = ["sure", " not", " rare", " lost", "\n\n", "<eos>"]
    values = {"token_entropies": [0.0, 2.0, 0.0, None, 0.0, 0.0], "token_log_probs": [0.0, 0.0, -4.0, None, 0.0, 0.0]}
    browser = page([record(0, "sure not rare lost\n\n", tokens=tokens, stop_reason="eos", **values)])
    seen = "[...document.querySelectorAll('article .t')].map(t => getComputedStyle(t).backgroundColor)"
    places = "[...document.querySelectorAll('article .t')].map(t => JSON.stringify(t.getBoundingClientRect()))"
    browser.wait("document.querySelector('article header').innerText")  # a card is laid out when it comes into view
    found = {}
    for name in ("entropy", "log_prob", "none"):
        browser.click(f"#colours [data-colour={name}]")
        found[name] = browser.evaluate(seen)
        found[name + " places"] = browser.evaluate(places)
    clear = found["none"][0]
    for name, coloured in {"entropy": 1, "log_prob": 2}.items():
        assert [place for place, colour in enumerate(found[name]) if alpha(colour) > 0] == [coloured]
        assert found[name + " places"] == found["none places"]
    assert alpha(clear) == 0
    browser.hover("article .t")
    assert browser.evaluate(places) == found["none places"]
    assert browser.evaluate("document.querySelector('.response').textContent") == "".join(tokens)
    assert browser.texts(".eos") == ["<eos>"]


def alpha(colour):
    inner = colour.partition("(")[2].rstrip(")")
    return float(inner.replace("/", ",").split(",")[-1]) if "/" in inner or inner.count(",") == 3 else 1.0


def tip(browser):
    return browser.evaluate("$('tip').hidden ? null : $('tip').innerText.split(/\\s*[\\n\\t]\\s*/)")


def test_a_token_under_the_pointer_or_the_arrow_keys_tells_its_values(page):
    tokens = ["a\n", " b", "", "", "é", "\u200f", ""]
    values = {"token_ids": [7, 8, 9, 10, 11, 12, 13], "token_log_probs": [math.log(0.25), None, -1, -2, -3, 0.0, -1]}
    browser = page([record(0, "a\n bé\u200f", tokens=tokens, token_entropies=[1.5, math.nan, 0, 1, 2, 3, 4], **values)])
    assert tip(browser) is None
    browser.hover("article .t")
    assert tip(browser) == [
        "a↵",
        *("probability", "25 %", "log-prob", "\N{MINUS SIGN}1.386", "entropy", "1.5 nats"),
        *("token id", "7", "position", "1 of 7"),
    ]
    browser.hover("h1")
    assert tip(browser) is None
    browser.evaluate("$('direction').focus()")
    while not browser.evaluate("document.activeElement.matches('.response')"):
        browser.press("Tab")
    browser.press("ArrowRight")
    assert tip(browser)[0] == "a↵"
    browser.press("ArrowRight")
    assert tip(browser)[:3] == ["·b", "probability", NOTHING]
    browser.press("ArrowRight")
    assert tip(browser)[0] == "é"
    assert tip(browser)[-4:] == ["position", "3 of 7", "4 of 7", "5 of 7"]
    browser.press("ArrowRight")
    assert tip(browser)[0] == "⟨U+200F⟩"
    browser.press("ArrowLeft")
    assert tip(browser)[0] == "é"
    browser.press("Escape")
    assert tip(browser) is None


def test_hostile_text_is_shown_and_never_run(page):
    texts = [
        "<script>window.__pwned = 1</script>",
        "</script><script>window.__pwned = 1</script>",
        "<!-- <script> -->",
        "<img src=x onerror='window.__pwned = 1'>",
        "&amp; &lt; {{ data }} {{ hash }} {{ script }}",
        "\u202eright to left\u200f \u2028 \u2029 \x00 \r\n",
        "half \ud83d pair",
        "'; \\\"`${window.__pwned = 1}`",
    ]
    records = [
        record(
            text, text, prompt=text, ground_truth=text, tokens=tokens, reward_error=text, stop_reason=text, summary={}
        )
        for text in texts
        for tokens in ([text], [*text], [])
    ]
    browser = page(records, summary={texts[0]: 1.0}, title=texts[1])
    browser.evaluate("while (!$('more').hidden) $('more').click()")
    responses = browser.texts(".response")
    seen = [text for text in texts for _ in range(3) if "\ud83d" not in text]
    assert [text for text in responses if not text.startswith("half")] == sorted(seen, key=texts.index)
    assert (
        browser.evaluate("document.title") == browser.evaluate("document.querySelector('h1').textContent") == texts[1]
    )
    assert browser.evaluate("document.querySelector('#summary dt').textContent") == texts[0]
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.__pwned = 1\">')")
    browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert browser.evaluate("window.__pwned") is None
    assert browser.problems  # the policy's: what had come in as markup would neither run nor load
    browser.problems.clear()


def test_one_prompt_alone_and_back_again(page):
    records = [record(index, f"{index}{sample}", sample=sample) for index in range(3) for sample in range(2)]
    browser = page(records, "prompt=1&filter=answer")
    assert browser.cards() == [1, 1]
    browser.evaluate("[...$('focus').children].find(b => b.textContent.includes('Next')).click()")
    assert browser.cards() == [2, 2]
    assert browser.evaluate("location.hash") == "#filter=answer&prompt=2"
    browser.click("#everything")
    assert browser.cards() == []
    browser.click("[data-filter=all]")
    browser.click("article header a")
    assert browser.cards() == [0, 0]
    assert browser.evaluate("location.hash") == "#prompt=0"
    page(records, "prompt=9&colour=none&filter=nonsense")
    assert browser.cards() == []
    assert not browser.evaluate("$('nothing').hidden || $('everything').disabled")


def test_shared_starts_of_prompts_and_middles_of_long_responses_wait_to_be_asked_for(page):
    tokens = [f" {number}" for number in range(3_000)]
    browser = page([record(0, "".join(tokens), tokens=tokens), *RECORDS[1:]])
    text, response = (
        "document.querySelector('.prompt').textContent",
        "document.querySelector('.response').textContent",
    )
    assert browser.evaluate(text) == "… Question 0"
    browser.click(".fold")
    assert browser.evaluate(text) == PREAMBLE + "Question 0"
    browser.click(".fold")
    assert browser.evaluate(text) == "… Question 0"
    start, _, end = browser.evaluate(response).partition("… 2,100 tokens more: show all")
    assert (start, end) == ("".join(tokens[:700]), "".join(tokens[-200:]))
    browser.click(".gap")
    assert browser.evaluate(response) == "".join(tokens)
    page([record(0, "".join(tokens), tokens=tokens)], "q=1500")
    assert browser.evaluate(response) == "".join(tokens)


def test_dark_is_dark_and_no_width_scrolls_sideways(page):
    browser = page([*RECORDS, record(5, "x" * 500)], summary={"response_length_incorrect": 1234.5, "reward": None})
    backgrounds = []
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 360)):
        browser.look(scheme, width)
        backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert backgrounds == ["rgb(245, 246, 248)", "rgb(15, 18, 22)", "rgb(15, 18, 22)"]
    values = browser.texts("#summary dd")
    assert values == ["1,235tokens", NOTHING]


def test_a_large_page_draws_what_is_near_and_the_rest_on_the_way_down(page):
    records = [record(i, "x " * 400, tokens=["x "] * 400, answer_reward=float(i % 2)) for i in range(500)]
    browser = page(records, num_records=1319)
    assert browser.evaluate("$('count').textContent") == "the first 500 of 1,319 records"
    assert len(browser.cards()) < 60
    browser.click("[data-filter=correct]")
    assert browser.cards()[:3] == [1, 3, 5]
    before = len(browser.cards())
    browser.evaluate("scrollTo(0, document.body.scrollHeight)")
    browser.wait(f"document.querySelectorAll('article').length > {before}")
    left = 250 - len(browser.cards())
    assert browser.evaluate("$('more').textContent") == f"Show more ({left} left)"
    browser.evaluate("$('more').click()")
    assert browser.cards() == list(range(1, 2 * (250 - left + 13), 2))  # 13 of 400 tokens are enough at a time


# -- the index, in the browser ---------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "http"])
def address(request, tmp_path):
    """Of `tmp_path`, as files or from a server."""
    if request.param == "file":
        yield tmp_path.as_uri()
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_stepping_through_the_index_keeps_the_prompt_and_shows_the_other_step(browser, tmp_path, address):
    for step in (0, 50, 100):
        name = f"step #{step} 100%.html"  # what an address would read as something else
        write_page(tmp_path / name, [record(i, f"{i} at {step}") for i in range(40)], {}, title=str(step))
        update_index(tmp_path, step, name, {"reward": step / 100, "response_length": math.nan})
    browser.look()
    browser.open(f"{address}/index.html#step=50")

    def until(step, responses):
        texts = "[...document.querySelectorAll('.response')].map(t => t.textContent).slice(0, 2).join()"
        browser.wait(f"document.title === '{step}' && {texts} === {responses!r}", "step")

    until(50, "0 at 50,1 at 50")
    browser.press("ArrowRight")
    until(100, "0 at 100,1 at 100")
    browser.evaluate("document.querySelectorAll('article header a')[1].click()", "step")
    browser.wait("location.hash === '#step=100&prompt=1'")
    browser.press("ArrowLeft")
    until(50, "1 at 50")
    assert browser.evaluate("[$('step').textContent, $('slider').value]") == ["Step 50 2 of 3", "1"]
    browser.evaluate("$('more').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}))", "step")
    until(0, "1 at 0")
    assert browser.evaluate("$('previous').disabled")
    assert browser.evaluate("$('alone').href").endswith("/step%20%230%20100%25.html#prompt=1")
    browser.evaluate("$('slider').value = 2; $('slider').dispatchEvent(new Event('input'))")
    until(100, "1 at 100")
    browser.evaluate("$('everything').click()", "step")
    browser.wait("location.hash === '#step=100'")
    browser.evaluate("[...document.querySelectorAll('article')][12].scrollIntoView()", "step")
    browser.wait("at !== ''")
    browser.click("#previous")
    browser.wait("document.title === '50' && scrollY > 0", "step")
    assert browser.problems == []
    assert all(request.startswith(address) for request in browser.requests if "favicon" not in request)


def test_the_index_charts_its_steps_and_one_step_is_enough(browser, tmp_path):
    update_index(tmp_path, 10, "step_10.html", {"reward": 0.5, "pass_at_4": 0.75, "response_entropy": math.nan})
    write_page(tmp_path / "step_10.html", RECORDS, {}, title="10")
    browser.open((tmp_path / "index.html").as_uri())
    assert browser.texts("figcaption") == ["RewardsReward0.5pass@40.75", "Length, tokens", "Entropy, nats"]
    left, right = browser.evaluate("[...document.querySelectorAll('circle')].map(c => c.cx.baseVal.value)")
    width = browser.evaluate("document.querySelector('svg').clientWidth")
    assert width / 3 < left == right < 2 * width / 3
    assert browser.problems == []
    update_index(tmp_path, 20, "step_20.html", {"reward": 1.0})
    browser.open((tmp_path / "index.html").as_uri())
    heights = browser.evaluate("[...document.querySelectorAll('.wide circle')].map(c => c.getBoundingClientRect().y)")
    assert heights[1] < heights[0]


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_data_block_holds_the_records_with_null_for_what_is_no_number(tmp_path):
    records = [record(0, "<é\u2028\ud800>", token_entropy=math.nan, reward=-math.inf, token_log_probs=[-0.123456])]
    write_page(tmp_path / "page.html", records, {"reward": math.nan, "x": 0.25}, title="t<")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    block = text.partition('id="data">')[2].partition("</script>")[0]
    assert block.isascii()
    assert "<" not in block
    assert json.loads(block) == {
        "title": "t<",
        "summary": {"reward": None, "x": 0.25},
        "num_records": 1,
        "records": [records[0] | {"token_entropy": None, "reward": None, "token_log_probs": [-0.1235]}],
    }


def test_a_page_that_cannot_be_completed_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_page(path, RECORDS, {}, title="before")
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_page(path, RECORDS, {}, title="after")
        with pytest.raises(OSError, match="No space"):
            update_index(tmp_path, 1, "page.html", {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_index_keeps_steps_in_order_and_replaces_one_that_comes_again(tmp_path):
    for step, reward in ((100, 0.5), (0, 0.25), (100, math.nan)):
        update_index(tmp_path, step, f"step_{step}.html", {"reward": reward})
    assert data_of(tmp_path / "index.html") == [
        {"step": 0, "page": "step_0.html", "summary": {"reward": 0.25}},
        {"step": 100, "page": "step_100.html", "summary": {"reward": None}},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda text: text[: text.index("step_200")], [0, 100]),  # cut short
        (lambda text: text.replace('"step":100', '"step":1e999'), [0, 200]),
        (lambda text: text.replace('{"step":100', "[[[[" * 20_000), [0, 200]),
        (lambda text: text.replace('"summary":{}', '"summary":[]', 1), [100, 200]),
        (lambda text: "<html>my own</html>\udcff", []),
        (lambda text: "", []),
    ],
)
def test_a_damaged_index_loses_only_what_cannot_be_read_and_is_kept_aside(tmp_path, damage, kept):
    for step in (0, 100, 200):
        update_index(tmp_path, step, f"step_{step}.html", {})
    index = tmp_path / "index.html"
    damaged = damage(index.read_text(encoding="utf-8")).encode("utf-8", "surrogateescape")
    index.write_bytes(damaged)
    update_index(tmp_path, 300, "step_300.html", {})
    assert [entry["step"] for entry in data_of(index)] == [*kept, 300]
    if damaged:
        assert (tmp_path / "index.html.bak").read_bytes() == damaged
