"""The report of an evaluation: what is on the page, that texts stay texts, and what a browser without a network makes of it."""

import json
import math
import re
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from playwright.sync_api import expect

from trimtab.evaluate.charts import Point, frontier_chart
from trimtab.evaluate.report import write_report
from trimtab.evaluate.report_tables import by_system, number, with_interval

HOSTILE = '</script><img src=x onerror="window.hit=1">&amp;<!--\'\u2028\ud800'
PHONE, DESKTOP = (390, 844), (1200, 900)
ITEMS = 45
NEEDED = ("systems", "judging", "provenance")


def judged(judge, kind, pair, names, win_rate, **more):
    return {
        "judge": judge,
        "kind": kind,
        "pair": pair,
        "output_1": names[0],
        "output_2": names[1],
        "n": 42,
        "missing": 3,
        "win_rate": win_rate,
        "win_rate_interval": [win_rate - 3.25, win_rate + 3.25],
        "discrete_win_rate": win_rate + 0.5,
        "length_controlled_win_rate": win_rate - 2,
        "length_controlled_interval": None,
        "length_controlled_by": "length-only fit",
        "position": {"first_preferred": 54.0, "first_preferred_interval": [52, 56], "consistent": 81.0},
        "length": {"output_1": 820.1, "output_2": 902.4, "longer_preferred": None},
        "scores": None,
        **more,
    }


def make_results(x=""):
    """Every section; `x` is in every text."""
    one, two, gpt, reward = f"proposal{x}", f"aligned{x}", f"gpt{x}", f"reward{x}"
    points = [
        {
            "rule": rule + x,
            "weight": w,
            "win_rate": 50 + 3 * w,
            "kl_per_token": 0.02 * w,
            "picked": rule == "product" and w == 1,
        }
        for rule in ("product", "geometric")
        for w in (0.5, 1, 2)
    ]
    return {
        "title": f"aligned against proposal{x}",
        "systems": {"baseline": one, "system": two},
        "dataset": {"path": f"x.jsonl{x}", "sha256": f"{x}0123456789abcdef", "prompts": ITEMS, "criterion": f"helpful{x}"},
        "judging": [
            judged(gpt, "endpoint", "main", (one, two), 61.2),
            judged(reward, "reward", "main", (one, two), 51.4, position=None, scores={"output_1": 0.31, "output_2": 0.35}),
            judged(gpt, "endpoint", "null", (one, f"again{x}"), 50.3),
            judged(gpt, f"endpoint{x}", "references", (one, f"references{x}"), 70.0, length_controlled_by=f"fit{x}"),
        ],
        "texts": {one: {f"distinct_1{x}": 0.31, "answers": 45}, two: {f"distinct_1{x}": 0.29, "answers": 45, "cut": math.nan}},
        "distribution": {two: {"kl_per_token": 0.03, "kl_per_token_interval": [0.02, 0.04], "log_z_mean": None}},
        "likelihood": {"tokens": 1234, "sequences": 20, "nll": {two: 1.4, one: 1.5, f"aligner{x}": 1.9}},
        "speed": {two: {"tokens_per_second": 100.0, "acceptance": 0.7}},
        "frontier": {"judge": gpt, "split": f"development{x}", "prompts": 200, "points": points},
        "paper": {
            "columns": [f"8B{x}", "14B"],
            "rows": [
                {"name": f"RAM{x}", "published": True, "values": [6.46, 12.32]},
                {"name": f"mine{x}", "published": False, "values": [5.0, None]},
            ],
            "metric": f"win rate{x}",
            "task": f"UltraChat{x}",
        },
        "provenance": {
            f"models{x}": {"proposal": {"id": f"llama{x}"}},
            "seeds": [0, 1],
            "judges": {gpt: {"cost": {"requests": 1610, "prompt_tokens": 7, "amount": None}}},
            "none": None,
        },
    }


def make_items(x="", count=ITEMS, tokens=4):
    """Preferences of the first judge, by index mod 5: won, lost, tied, none, won by orders that disagree."""
    one, two, gpt, reward = f"proposal{x}", f"aligned{x}", f"gpt{x}", f"reward{x}"
    orders = [[1.9, 1.7], [1.2, 1.4], [1.5, 1.5], None, [1.2, 1.9]]
    items = []
    for i in range(count):
        pieces = [(f" word{x}", 4.0), (" is\n", -1.0), ("", None), (" 🙂", 0.0), (" end", -math.inf)] * (tokens // 4) + [
            ("", 0.5)
        ]
        text = "".join(piece for piece, _ in pieces)
        chosen = orders[i % 5]
        verdict = {"preference": chosen and sum(chosen) / 2, "orders": chosen}
        items.append(
            {
                "index": i,
                "instruction": f"Question number {i} {x}",
                "reference": f"Reference {i}{x}" if i % 2 else None,
                "answers": {
                    one: {"text": "short" + x + "." * (i % 7), "tokens": None},
                    two: {"text": text, "tokens": [*pieces, (f"<end>{x}", 0.25)]},
                },
                "judgements": {gpt: verdict, reward: {"preference": 1.1, "orders": None}},
            }
        )
    return items


class Reader(HTMLParser):
    """Elements, ids, the text outside of scripts and styles, and the data."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.ids, self.text, self.data, self._in = [], set(), "", "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids.add(dict(attrs).get("id"))
        if tag in ("script", "style"):
            self._in = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._in = None

    def handle_data(self, data):
        if self._in == "data":
            self.data += data
        elif self._in is None:
            self.text += data

    def section(self, name):
        return name in self.ids


def write(tmp_path, results, items):
    path = tmp_path / "report.html"
    write_report(path, results, items)
    return path


# ---- the file


def test_all_sections_are_there_and_linked(tmp_path):
    path = write(tmp_path, make_results(), make_items())
    page = Reader(path)
    links = [attrs["href"].removeprefix("#") for tag, attrs in page.elements if tag == "a"]
    assert len(links) == 12
    assert set(links) <= page.ids
    for words in (
        "By gpt, aligned beats proposal with a win rate of 61.2 % [58.0, 64.5].",
        "By reward, aligned and proposal are not told apart: the win rate is 51.4 % [48.1, 54.6]",
        "published",
        "1,234 tokens of 20 texts",
        "models › proposal › id",
        "judges › gpt › cost › requests",
    ):
        assert words in page.text, words


def test_a_run_that_was_stopped_says_so_and_what_it_cost(tmp_path):
    """Also where no comparison is whole, and the judge has no row."""
    results = make_results() | {"stopped": "gpt has cost 5 of <b>5</b>", "judging": []}
    page = write(tmp_path, results, []).read_text(encoding="utf-8")
    assert "Stopped before the end" in page
    assert "gpt has cost 5 of &lt;b&gt;5&lt;/b&gt;" in page
    assert "1,610" in page


def test_why_judgements_are_missing_is_told(tmp_path):
    results = make_results()
    results["judging"][0] |= {"missing": 7, "why_missing": "no verdict in '<hm>'"}
    assert "7 without: no verdict in &#x27;&lt;hm&gt;&#x27;" in write(tmp_path, results, []).read_text(encoding="utf-8")


def test_a_sweep_shows_what_its_limit_is_about(tmp_path):
    """The limit is in nats an answer, and which points are beyond it can be seen."""
    results = make_results()
    for i, point in enumerate(results["frontier"]["points"]):
        point |= {"kl_per_sequence": 10.0 * (i + 1), "n": 40, "missing": i}
    results["frontier"]["max_kl"] = 15.0
    page = write(tmp_path, results, []).read_text(encoding="utf-8")
    assert "No pick may be more than 15" in page
    assert page.count("over the limit") == len(results["frontier"]["points"]) - 1 - sum(
        point["picked"] for point in results["frontier"]["points"][1:]
    )


def test_nothing_leads_out_of_the_file(tmp_path):
    html = write(tmp_path, make_results(), make_items()).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|\bsrc=", re.sub(r'(?m)^ *// .*$|"data">.*', "", html))
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in html


@pytest.mark.parametrize(
    ("rate", "interval", "words"),
    [
        (40.0, [35.0, 45.0], "aligned loses to proposal with a win rate of 40.0 %"),
        (52.0, [50.0, 54.0], "the interval contains 50"),
        (60.0, None, "has a win rate of 60.0 % against proposal, without an interval"),
        (60.0, [math.nan, math.nan], "has a win rate of 60.0 % against proposal, without an interval"),
        (None, None, "nothing can be said"),
    ],
)
def test_the_headline_says_who_wins_and_whether_that_is_sure(tmp_path, rate, interval, words):
    results = {"systems": {"baseline": "proposal", "system": "aligned"}, "provenance": {}}
    row = {"judge": "j", "kind": "reward", "pair": "main", "output_1": "proposal", "output_2": "aligned"}
    page = Reader(write(tmp_path, {**results, "judging": [{**row, "win_rate": rate, "win_rate_interval": interval}]}, []))
    assert words in page.text


@pytest.mark.parametrize("missing", [*sorted(set(make_results()) - set(NEEDED)), "all"])
def test_what_is_not_there_is_not_shown(tmp_path, missing):
    whole = make_results()
    results = {key: value for key, value in whole.items() if key in NEEDED or missing not in (key, "all")}
    page = Reader(write(tmp_path, results, make_items() if missing != "all" else []))
    full = {"texts", "distribution", "likelihood", "speed", "frontier", "paper"}
    assert full & page.ids == (full & results.keys())
    assert page.section("prompts") == (missing != "all")
    assert "None" not in page.text


def test_almost_nothing_is_a_page_too(tmp_path):
    results = {"systems": {"baseline": "a", "system": "b"}, "judging": [], "provenance": {}}
    assert "b against a" in Reader(write(tmp_path, results, [])).text
    item = {"index": 0, "instruction": "q", "reference": None, "answers": {}, "judgements": {}}
    assert json.loads(Reader(write(tmp_path, results, [item])).data)["items"][0]["answers"] == [None, None]


def test_hostile_texts_are_texts(tmp_path):
    path = write(tmp_path, make_results(HOSTILE), make_items(HOSTILE))
    page = Reader(path)
    assert "img" not in {tag for tag, _ in page.elements}
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 2
    plain = Reader(write(tmp_path, make_results(), make_items()))
    assert [tag for tag, _ in page.elements if tag not in ("path", "text")] == [
        tag for tag, _ in plain.elements if tag not in ("path", "text")
    ]
    assert not set("<>&\u2028\u2029") & set(page.data)
    data = json.loads(page.data)
    assert data["judges"] == [f"gpt{HOSTILE}", f"reward{HOSTILE}"]
    assert data["items"][1]["reference"] == f"Reference 1{HOSTILE}"


def test_the_data_has_no_number_that_json_has_not(tmp_path):
    items = make_items(count=1)
    items[0]["judgements"] = {"gpt": {"preference": math.nan, "orders": [math.nan, 1.0]}, "reward": None}
    items[0]["answers"]["aligned"]["tokens"] = [("é🙂", math.nan), ("", math.inf), ("x", -math.inf), ("y", 0.12345)]

    def refuse(name):
        raise AssertionError(name)

    data = json.loads(Reader(write(tmp_path, make_results(), items)).data, parse_constant=refuse)
    (item,) = data["items"]
    assert item["preferences"] == item["orders"] == [None, None]
    assert item["answers"][1]["ratios"] == [None, 99, -99, 0.123]
    assert item["answers"][1]["lengths"] == [3, 0, 1, 1]
    assert item["answers"][1]["shown"] == "é🙂xy"


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report(path, {"systems": {"baseline": "a", "system": "b"}}, [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- parts


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (True, "–"),
        ("7", "–"),
        (0, "0"),
        (0.0, "0"),
        (1610, "1,610"),
        (1234.5, "1,234"),
        (61.25, "61.2"),
        (-1.2, "−1.20"),
        (0.0312, "0.0312"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_an_interval_that_is_none_is_left_out():
    assert with_interval(1.5, [1, 2], 1) == "1.5<small>[1.0, 2.0]</small>"
    assert with_interval(1.5, None, 1) == with_interval(1.5, [None, 2], 1) == with_interval(1.5, "ab", 1) == "1.5"
    assert with_interval(None, [1, 2], 1) == "–"


def test_figures_by_system_have_a_row_each():
    html = by_system({"b": {"x": 1.0, "x_interval": [0, 2], "name": "no number"}, "a": {"y": {"z": 2}}}, ["a", "b"], "l")
    assert re.findall(r"<th scope[^>]*>(.*?)</th>", html) == ["", "a", "b", "y, z", "x"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", html) == ["2", "–", "–", "1.00<small>[0, 2.00]</small>"]


def test_the_frontier_shows_every_finite_point():
    names = [f"series {i} & more" for i in range(6)]
    points = [Point(name, 0.01 * i, 50 + i, 48 + i, 53 + i, f"{i}", marked=i == 2) for i, name in enumerate(names)]
    svg = frontier_chart([*points, Point("a", math.nan, 1), Point("a", 1, math.inf)], "x & y", "z", level=50)
    root = ElementTree.fromstring(svg)
    kinds = [element.get("class") for element in root]
    assert (kinds.count("mark"), kinds.count("bar"), kinds.count("picked"), kinds.count("level")) == (6, 6, 1, 1)
    assert {*names, *"012345"} <= {element.text for element in root.iter("text")}
    assert not re.search(r'[",]nan', svg)


@pytest.mark.parametrize("points", [[], [Point("a", 0.1, 55)], [Point("a", 0.1, 55, label="1")] * 3])
def test_a_frontier_of_little_is_well_formed(points):
    ElementTree.fromstring(frontier_chart(points, "x", "y"))


# ---- in a browser


@contextmanager
def visit(browser, path, size=DESKTOP, **settings):
    """The page, whose console stays clean, and which asks for nothing but itself."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True, **settings)
    page = context.new_page()
    page.set_default_timeout(8_000)
    expect.set_options(timeout=8_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert asked == [path.as_uri()]
    assert said == []
    context.close()


@pytest.fixture
def page(browser, tmp_path):
    with visit(browser, write(tmp_path, make_results(), make_items())) as page:
        yield page


def count(page, words):
    expect(page.locator("#count")).to_have_text(words)


def headings(page):
    return [int(text.split()[1]) for text in page.locator(".item h3").all_text_contents()]


@pytest.mark.parametrize(
    ("outcome", "remainders"), [("won", {0, 4}), ("lost", {1}), ("tied", {2}), ("none", {3}), ("all", {0, 1, 2, 3, 4})]
)
def test_outcomes(page, outcome, remainders):
    page.get_by_label("Outcome").select_option(outcome)
    total = 9 * len(remainders)
    count(page, f"{total} of {ITEMS} prompts, {min(total, 20)} shown")
    assert {i % 5 for i in headings(page)} == remainders
    assert f"({total})" in page.locator(f"#outcome option[value={outcome}]").inner_text()


def test_the_winner_is_marked(page):
    first, second = page.locator(".item").nth(0), page.locator(".item").nth(1)
    assert first.locator(".answer.won h4").text_content().startswith("aligned")
    assert second.locator(".answer.won h4").text_content().startswith("proposal")
    expect(page.locator(".item").nth(2).locator(".won")).to_have_count(0)
    expect(page.locator(".item").nth(3).locator(".verdicts")).to_contain_text("gpt: no judgement")
    expect(first.locator(".verdicts")).to_contain_text("gpt: 1.80 (orders 1.90, 1.70)")


def test_another_judge_decides_otherwise(page):
    page.get_by_label("Judge", exact=True).select_option("reward")
    page.get_by_label("Outcome").select_option("lost")
    count(page, f"{ITEMS} of {ITEMS} prompts, 20 shown")
    assert page.locator(".verdicts .chosen").first.text_content() == "reward: 1.10"


def test_orders_that_disagree(page):
    page.get_by_label("orders disagree").check()
    count(page, f"9 of {ITEMS} prompts, 9 shown")
    assert {i % 5 for i in headings(page)} == {4}


def test_search_finds_words_of_instructions_and_answers(page):
    search = page.get_by_label("Search")
    search.fill("NUMBER 7 ")
    count(page, f"1 of {ITEMS} prompts, 1 shown")
    search.fill("short......")
    count(page, f"6 of {ITEMS} prompts, 6 shown")
    search.fill("nowhere")
    count(page, f"0 of {ITEMS} prompts, 0 shown")
    expect(page.locator("#more")).to_be_hidden()


def test_orders(page):
    def first(order):
        page.get_by_label("Order by").select_option(order)
        return headings(page)[0]

    assert (first("best"), first("worst")) == (0, 1)
    assert (first("longer"), first("shorter"), first("index")) == (0, 6, 0)
    page.get_by_label("Order by").select_option("worst")
    page.locator("#more").click()
    page.locator("#more").click()
    assert {i % 5 for i in headings(page)[-9:]} == {3}  # without a preference: last


def test_more(page):
    expect(page.locator(".item")).to_have_count(20)
    page.get_by_role("button", name="Show 20 more").click()
    expect(page.locator(".item h3").nth(20)).to_be_focused()
    page.get_by_role("button", name="Show 5 more").click()
    count(page, f"{ITEMS} of {ITEMS} prompts, {ITEMS} shown")
    expect(page.locator("#more")).to_be_hidden()
    assert headings(page) == list(range(ITEMS))


def test_tokens_have_their_colour_and_text(page):
    answer = page.locator(".item").first.locator(".answer").nth(1).locator(".tokens")
    tokens = answer.locator(".t")
    assert tokens.all_text_contents() == [" word", " is↵\n", " 🙂", " end", "▫", "<end>"]
    shares = [token.evaluate("e => getComputedStyle(e).getPropertyValue('--share')") for token in tokens.all()]
    assert shares == ["1.000", "0.250", "", "1.000", "0.125", "0.063"]
    colours = [tokens.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in (0, 1, 2)]
    assert colours == ["rgba(37, 99, 200, 0.6)", "rgba(205, 60, 45, 0.15)", "rgba(0, 0, 0, 0)"]
    assert answer.evaluate("e => [...e.querySelectorAll('.mark')].forEach(m => m.remove()) || e.textContent") == (
        " word is\n 🙂 end<end>"
    )
    assert "special" in tokens.nth(5).get_attribute("class")


def test_the_number_of_a_token_by_pointer_tap_and_keys(browser, tmp_path):
    with visit(browser, write(tmp_path, make_results(), make_items())) as page:
        answer, tip = page.locator(".item").first.locator(".answer").nth(1).locator(".tokens"), page.locator("#tip")
        tokens = answer.locator(".t")
        tokens.nth(0).hover()
        expect(tip).to_have_text("␣word+4.000 nats, × 54.6")
        page.locator("h1").hover()
        expect(tip).to_be_hidden()
        answer.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(tip).to_have_text("␣is↵−1.000 nats, × 0.368")
        page.keyboard.press("ArrowLeft")
        expect(tip).to_contain_text("word")
        page.keyboard.press("End")
        expect(tip).to_have_text("<end>+0.250 nats, × 1.28")
        page.keyboard.press("Escape")
        expect(tip).to_be_hidden()
    with visit(browser, write(tmp_path, make_results(), make_items()), PHONE, has_touch=True) as page:
        page.locator(".t").nth(5).scroll_into_view_if_needed()
        page.locator(".item .t").nth(3).tap()
        expect(page.locator("#tip")).to_have_text("␣endimpossible under the rule")


def test_hostile_texts_do_nothing(browser, tmp_path):
    with visit(browser, write(tmp_path, make_results(HOSTILE), make_items(HOSTILE))) as page:
        expect(page.locator(".item")).to_have_count(20)
        page.locator(".item .t").first.click()
        assert page.evaluate("window.hit === undefined && document.images.length === 0")
        assert "</script><img src=x" in page.locator("#judge option").first.inner_text()
        assert "</script><img src=x" in page.locator(".instruction").first.inner_text()


def test_without_scripts_the_tables_are_whole(browser, tmp_path):
    with visit(browser, write(tmp_path, make_results(), make_items()), java_script_enabled=False) as page:
        assert "scripts are off" in page.content()  # the browser's driver turns them off too late for <noscript> to show
        expect(page.locator("#controls")).to_be_hidden()
        expect(page.locator("#win-rates table")).to_be_visible()


def test_without_judgements_there_is_nothing_to_choose(browser, tmp_path):
    results = {"systems": {"baseline": "proposal", "system": "aligned"}, "judging": [], "provenance": {}}
    items = [{**item, "judgements": {}} for item in make_items(count=3)]
    with visit(browser, write(tmp_path, results, items)) as page:
        count(page, "3 of 3 prompts, 3 shown")
        expect(page.get_by_label("Judge", exact=True)).to_be_hidden()
        expect(page.get_by_label("Search")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_screen(browser, tmp_path, size, scheme):
    """Nothing is wider than the screen, though names are long, and the picture is in the scheme asked for: look at it."""
    path = write(tmp_path, make_results("-a-name-without-any-space" * 4), make_items("-a-name-without-any-space" * 4))
    with visit(browser, path, size, color_scheme=scheme) as page:
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert len(colours) > 50
    assert (sum(max(colours)[1]) > 600) == (scheme == "light")


def test_a_thousand_prompts_stay_usable(browser, tmp_path):
    """Two answers of 500 tokens each; the limits leave room for a slow machine."""
    path = write(tmp_path, make_results(), make_items(count=1000, tokens=500))
    began = time.monotonic()
    with visit(browser, path) as page:
        expect(page.locator(".item")).to_have_count(20)
        opened = time.monotonic() - began
        page.get_by_label("Search").fill("number 777 ")
        count(page, "1 of 1000 prompts, 1 shown")
        found = time.monotonic() - began - opened
    assert (opened < 4, found < 4) == (True, True), (opened, found)
