"""The page: whole, closed in itself, honest about gaps, and safe against odd labels."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch
from evaluation_families import Parabola, Regression

from learned_opt import rules
from learned_opt.evaluation import BASELINES, Baseline, EvaluationConfig, Learned, compare, page, totals
from learned_opt.evaluation.explain import explain
from learned_opt.evaluation.explain_plots import draw_all
from learned_opt.evaluation.plots import draw_curves, draw_family
from learned_opt.evaluation.report import build
from learned_opt.evaluation.style import new_figure, short, styles, to_svg
from learned_opt.evaluation.suite_plots import draw_profiles, draw_speedups

VOID = {"meta", "img", "br", "line", "wbr"}
ODD = "<b>steep</b> & co"


class Reader(HTMLParser):
    """Checks that what is opened is closed, and collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    return reader


def broken(groups):
    raise RuntimeError("no luck")


@pytest.fixture(scope="module")
def comparison():
    rule = rules.get("adam", lr=0.1)
    config = EvaluationConfig(
        horizon=12, num_tasks=3, seeds=(0,), num_validation_tasks=2, num_resamples=50, cost_seconds=0.005
    )
    return compare(
        [
            Learned(name="mine_too", rule=rule, theta=rule.init_theta(torch.Generator())),
            BASELINES["adam"],
            BASELINES["sgd"],
            Baseline(name="broken", make=broken),
        ],
        {"regression": Regression(), "parabola": Parabola(), ODD: Parabola(curvature=1e40)},
        config,
    )


@pytest.fixture(scope="module")
def html(comparison):
    rule = rules.get("compact")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    explanation = explain(rule, theta, horizon=10)
    return build(comparison, title="A & B", explanations={"mine_too": explanation}, settings={"seeds": [0], "<": ">"})


def test_the_page_needs_nothing_outside_itself(html):
    reader = read(html)
    assert html.startswith("<!doctype html>")
    names = [tag for tag, _ in reader.tags]
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    for tag, attributes in reader.tags:
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/svg+xml;base64,")
            assert attributes["alt"]
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    assert not re.search(r"url\(|@import", html)


def test_it_fits_a_phone_and_paper(html):
    reader = read(html)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert "@media print" in html and "@page" in html and "@media (max-width" in html
    # Wide tables scroll within their own box, never the page.
    assert html.count("<table>") == html.count('<div class="scroll"><table>')


def test_links_lead_somewhere(html):
    reader = read(html)
    targets = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    links = {attributes["href"][1:] for _, attributes in reader.tags if "href" in attributes}
    assert links == targets == {"suite", "families", "time", "learned0", "method", "settings"}


def test_pictures_are_all_there_and_are_svg(html):
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    # Two of the suite, one a family, ten of the explanation.
    assert len(pictures) == 2 + 3 + 10
    for picture in pictures:
        text = base64.b64decode(picture).decode()
        assert "<svg" in text and 'xlink:href="http' not in text
    assert "memory goes with" in html


def test_labels_are_escaped(html):
    assert "<b>" not in html and "&lt;b&gt;steep&lt;/b&gt; &amp; co" in html
    assert "<title>A &amp; B</title>" in html and "&lt;: &gt;" in html


def test_every_number_of_the_table_is_on_the_page(comparison, html):
    words = " ".join("".join(read(html).words).split())
    for result in comparison.ordered():
        if result.scores is not None:
            value = next(row[3] for row in comparison.rows() if row[:2] == [result.family, result.optimizer])
            assert value.split(" [")[0] in words
    assert "mine_<wbr>too" in html and "mine_too" in words


def test_gaps_are_told(comparison, html):
    assert "broken: could not run: RuntimeError: no luck" in html
    assert "broken has no result on regression, parabola" in html
    assert ">none</td>" in html
    partial = dataclasses.replace(comparison, results=comparison.results[:5])
    text = build(partial, title="t")
    assert "This comparison is not complete: 5 of 12 results are here." in text
    assert "This comparison is not complete" not in html
    read(text)
    empty = build(dataclasses.replace(comparison, results=()), title="t")
    assert "0 of 12 results" in empty and 'id="suite"' not in empty
    read(empty)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("meta_validation", "mean final loss on meta-validation tasks;"),
        ("meta_test", "mean final loss on other initial parameters and batches of the reported data;"),
    ],
)
def test_the_method_says_what_baselines_were_tuned_on(split, words):
    config = EvaluationConfig(
        horizon=3, num_tasks=2, seeds=(0,), num_validation_tasks=2, validation_seed=1, tuning_split=split
    )
    compared = compare([BASELINES["adam"]], {"parabola": Parabola()}, config)
    assert words in " ".join("".join(read(build(compared, title="t")).words).split())


def test_a_comparison_without_reference_has_no_suite_part(comparison):
    rule = rules.get("sgd", lr=0.1)
    config = EvaluationConfig(horizon=3, num_tasks=2, seeds=(0,), num_resamples=10)
    alone = compare([Learned(name="a", rule=rule, theta=rule.init_theta(torch.Generator()))], {"p": Parabola()}, config)
    text = build(alone, title="t")
    read(text)
    assert 'id="suite"' not in text and "Family by family" in text and "Time of a step" not in text


def test_suite_pictures_show_what_the_totals_hold(comparison):
    from learned_opt.evaluation import totals

    sums = totals(comparison)
    panel = draw_speedups(comparison, sums).axes[0]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == [t.optimizer for t in sorted(sums, key=lambda t: t.speedup.value)]
    profile = draw_profiles(comparison, sums).axes[0]
    lines = {line.get_label(): line for line in profile.get_lines()}
    assert {"mine_too", "sgd", "broken"} <= set(lines) and "adam" not in lines
    assert lines["broken"].get_ydata()[-1] == 0
    for draw in (draw_speedups, draw_profiles):
        with pytest.raises(ValueError, match="totals must hold at least one optimizer; got none"):
            draw(comparison, [])


def test_the_band_is_of_the_learned_and_the_reference(comparison):
    panel = draw_family(comparison, "regression").axes[0]
    assert len(panel.collections) == 2 and len(panel.get_lines()) == 3
    with pytest.raises(ValueError, match="the family 'regression' has no results to draw"):
        draw_family(dataclasses.replace(comparison, results=()), "regression")


def test_many_baselines_all_look_different(comparison):
    names = tuple(f"b{k}" for k in range(12))
    results = tuple(dataclasses.replace(comparison.results[0], optimizer=name) for name in names)
    found = styles(dataclasses.replace(comparison, optimizers=names, results=results, reference="b0"))
    assert len({(style.colour, style.dashes) for style in found.values()}) == 12


def test_svg_is_the_same_for_the_same_figure():
    def draw():
        figure = new_figure(2, 2)
        figure.subplots().plot([1, 2], [3, 5], label="x")
        return to_svg(figure)

    assert draw() == draw()
    assert ">1.0</text>" in draw(), "words are text, not outlines"


LONG = "my_experiment_with_a_very_long_name_of_seventy_characters_rnnprop_seed_0"


def test_long_labels_push_nothing_out_of_the_page_or_its_pictures(comparison):
    # The first column of tables is narrow on a phone; whatever else is kept on one line would push the page sideways.
    style = re.sub(r"@media.*", "", page.STYLE, flags=re.DOTALL)
    kept_on_one_line = [rule.split("{")[0].strip() for rule in style.split("}") if "white-space: nowrap" in rule]
    assert kept_on_one_line == ["th, td"] and "overflow-wrap: break-word" in page.STYLE
    results = [
        dataclasses.replace(r, optimizer=LONG if r.optimizer == "mine_too" else r.optimizer) for r in comparison.results
    ]
    names = tuple(LONG if name == "mine_too" else name for name in comparison.optimizers)
    renamed = dataclasses.replace(comparison, results=results, optimizers=names)
    rule = rules.get("compact")
    explanation = explain(rule, rule.init_theta(torch.Generator().manual_seed(0)), horizon=10)
    sums = totals(renamed)
    figures = [draw_speedups(renamed, sums), draw_curves(renamed), *draw_all(explanation, LONG).values()]
    for figure in figures:
        assert LONG not in to_svg(figure)  # a layout that collapses warns, and warnings are errors
    assert short(LONG) == "my_experiment_with…op_seed_0" and short(LONG) in to_svg(figures[0])
    assert LONG in build(renamed, title="A").replace("<wbr>", "")
