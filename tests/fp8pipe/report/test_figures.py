"""Every figure of a report is read again from the file that it names, by code that shares nothing with the report."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from small_artifacts import LEAST, details_of

from fp8pipe.artifact import ArtifactWriter, write_checked
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.report import default_output, write_report
from fp8pipe.report.page import render
from fp8pipe.report.subject import open_subject

_SCALE = {"%": 0.01, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_PLACEHOLDERS = re.compile(
    r"\b(TODO|FIXME|N/A|n/a|[Nn]a[Nn]|None|null|[Ll]orem|undefined|Undefined)\b|\{\{|\}\}|\{%|object at 0x"
)


class Marks(HTMLParser):
    """Elements with a source, and all text."""

    def __init__(self):
        super().__init__()
        self.marks, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        entry = {"tag": tag, "text": "", **found}
        if "data-source" in found or "data-quote" in found:
            self.marks.append(entry)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(entry)

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if any(entry["tag"] == "style" for entry in self.open):
            return
        self.text.append(data)
        for entry in self.open:
            entry["text"] += data


def parsed(page):
    marks = Marks()
    marks.feed(page)
    return marks


def look_up(root, source):
    file, _, pointer = source.partition("#")
    text = (root / file).read_text()
    here = [json.loads(x) for x in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)
    return follow(here, [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]])


def follow(here, parts):
    for index, part in enumerate(parts):
        if part == "*":
            return [follow(item, parts[index + 1 :]) for item in (here.values() if isinstance(here, dict) else here)]
        here = here[part] if isinstance(here, dict) else here[int(part)]
    return here


def expected(root, mark):
    found = look_up(root, mark["data-source"])
    how = mark.get("data-derive")
    return float(len(found) if how == "count" else sum(found) if how == "sum" else found)


def read(text):
    """A shown number and half a unit of its last digit."""
    minutes = re.fullmatch(r"(\d+) min (\d+) s", text)
    if minutes:
        return 60 * int(minutes[1]) + int(minutes[2]), 0.5
    number, _, unit = text.replace(",", "").partition(" ")
    digits, _, exponent = number.partition("e")
    step = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    scale = _SCALE.get(unit, 1)
    return float(number) * scale, 0.5 * step * scale


def wrong_figures(root, page):
    wrong = []
    for mark in parsed(page).marks:
        if "data-quote" in mark:
            if mark["text"] != str(look_up(root, mark["data-quote"])):
                wrong.append(mark)
            continue
        value = expected(root, mark)
        told = float(mark["value"] if mark["tag"] == "data" else mark["data-value"])
        text = mark["text"] if mark["tag"] == "data" else mark["text"].rpartition(": ")[2]
        shown, slack = read(text)
        if told != value or abs(shown - value) > slack + 1e-12 * abs(value):
            wrong.append((mark, value, shown))
    return wrong


def test_every_figure_and_quotation_is_what_its_file_says(run_directory, page_of):
    marks = parsed(page_of).marks
    assert len(marks) > 120
    assert {mark["tag"] for mark in marks} >= {"data", "circle", "rect", "span"}
    assert wrong_figures(run_directory, page_of) == []


def test_the_check_of_figures_notices_a_changed_file(run_directory, page_of):
    path = run_directory / "onnx.bench.json"
    kept = path.read_text()
    try:
        path.write_text(kept.replace("1.43117", "1.63117"))
        assert len(wrong_figures(run_directory, page_of)) == 1
    finally:
        path.write_text(kept)


def test_numbers_outside_of_figures_are_names_dates_and_versions(page_of):
    """A table cell that holds nothing but a number holds a traceable one."""
    cells = re.findall(r"<td[^>]*><span>([^<]*)</span></td>", page_of)
    bare = [cell for cell in cells if re.fullmatch(r"[-\d.,e]+( ?(%|s|ms|MB|kB|GB|nats))?", cell.strip())]
    assert [cell for cell in bare if not re.fullmatch(r"\d+\.\d+(\.\d+.*)?", cell)] == []  # versions, capabilities


def test_points_of_a_curve_lie_where_their_values_say(page_of):
    for drawing in re.findall(r"<svg.*?</svg>", page_of, re.S):
        dots = re.findall(r'<circle class="first" cx="[\d.]+" cy="([\d.]+)"[^>]*data-value="([^"]+)"', drawing)
        if len(dots) < 3 or len({value for _, value in dots}) < 2:
            continue
        (y0, v0), *_, (y1, v1) = [(float(y), float(v)) for y, v in dots]
        slope = (y1 - y0) / (v1 - v0)
        assert slope < 0
        for y, value in dots:
            assert float(y) == pytest.approx(y0 + slope * (float(value) - v0), abs=0.05)


def sections(page):
    return {key: body for key, body in re.findall(r'<section id="([\w-]+)".*?</p>(.*?)</section>', page, re.S)}


def test_all_sections_are_there_in_order_and_none_is_empty(page_of):
    found = sections(page_of)
    assert list(found) == ["verdicts", "training", "layers", "images", "accuracy", "parity", "precision", "speed",
                           "provenance", "reproduce", "warnings"]  # fmt: skip
    assert all(re.sub(r"<[^>]+>|\s", "", body) for body in found.values())


def test_verdicts_come_first_and_failures_before_what_holds(page_of):
    body = sections(page_of)["verdicts"]
    assert body.index("ANOMALOUS") < body.index("Gates that fail")
    assert body.index("accuracy lost") < body.index("reopened bytes differing")
    assert ">missing<" in body
    assert "no vLLM here" in body


def test_a_stale_record_is_named_and_left_out(page_of):
    assert "it is about manifest 000000" in page_of
    assert "blocks.0.mlp.fc1" not in sections(page_of)["parity"].partition("engines")[2]


def test_a_damaged_record_is_left_out(run_directory):
    path = run_directory / "onnx.validation.json"
    kept = path.read_text()
    try:
        write_checked(path, kept)
        assert "QGemm" in render(open_subject(run_directory))
        path.write_text(kept.replace("15", "16"))
        page = render(open_subject(run_directory))
        assert "QGemm" not in page
        assert "onnx.validation.json has sha256" in page
    finally:
        write_checked(path, kept)


def test_a_report_on_changed_files_is_refused(run_directory, tmp_path):
    """One bit, same size: what a report says has to be of what lies there."""
    shutil.copytree(run_directory, tmp_path / "run")
    artifact = open_subject(tmp_path / "run").items[0].artifact
    path = artifact.root / max(artifact.manifest.files, key=lambda entry: entry.size).path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for subject in (tmp_path / "run", artifact.root):
        with pytest.raises(BadArtifactError, match=path.name):
            open_subject(subject)


def test_missing_data_names_the_command_that_makes_it(run_directory, page_of):
    assert f"fp8pipe validate {run_directory}/served" in page_of
    assert f"fp8pipe bench {run_directory}/served" in page_of
    assert f"fp8pipe bench {run_directory}/engines" not in page_of  # bench takes no engines of TensorRT
    assert f"fp8pipe report {run_directory} --image PICTURE" in page_of


def test_words_of_artifacts_are_escaped_and_the_page_loads_nothing(page_of):
    assert "<script" not in page_of
    assert "&lt;script&gt;" in page_of
    assert not re.search(r'(src|href)="(?!data:|#)', page_of)
    assert len(page_of) < 3_000_000


def test_the_same_files_give_the_same_page(run_directory, page_of):
    assert render(open_subject(run_directory)) == page_of


@pytest.mark.parametrize("name", ["tuned", "vit", "onnx", "engines", "served"])
def test_one_artifact_alone_is_reported_beside_it(run_directory, name):
    path, _ = write_report(run_directory / name)
    assert path == default_output(run_directory / name) == run_directory / f"{name}.report.html"
    page = path.read_text()
    path.unlink()
    assert wrong_figures(run_directory, page) == []
    assert len(sections(page)) == 11
    assert not _PLACEHOLDERS.search("".join(parsed(page).text))


@pytest.mark.parametrize("kind", LEAST)
def test_an_artifact_that_holds_nothing_gives_no_placeholder_and_says_what_is_missing(tmp_path, kind):
    with ArtifactWriter(tmp_path / "bare", kind=kind, stage="test") as writer:
        writer.commit(details=details_of(kind), runtime={"odd": math.nan})
    page = render(open_subject(tmp_path / "bare"))
    assert not _PLACEHOLDERS.search("".join(parsed(page).text))
    assert "Not here." in page


def test_no_placeholder_survives_in_a_whole_run(page_of):
    assert not _PLACEHOLDERS.search("".join(parsed(page_of).text))
