"""report.html: nothing in a run can become more than text in it."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest

from jobs.analysis.program import main
from jobs.analysis.report_page import page
from tests.analysis import browser
from tests.analysis.editing import Row, edit_manifest
from tests.analysis.made_run import Shape, make_run

_WRAPPED = ["{}", '">{}', "'>{}", "</script>{}", "--></style>{}", "]]>{}", "\u2028{}"]
_ATTACKS = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg/onload=window.pwned=1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<link rel=stylesheet href=https://outside.example/x.css>",
    "<base href=https://outside.example/>",
    "<meta http-equiv=refresh content='0;url=https://outside.example'>",
]
PAYLOADS = [
    *(wrapper.format(attack) for wrapper in _WRAPPED for attack in _ATTACKS),
    "<!--<script>",
    "javascript:window.pwned=1",
    "${window.pwned=1}`+window.pwned+`",
    '\\u003cscript\\u003e"};window.pwned=1;{"',
    "\x00\x1b[31m\x07<\u2029>&amp;&lt;",
    "'; window.pwned = 1; //",
]


def test_there_are_at_least_fifty_payloads() -> None:
    assert len(set(PAYLOADS)) >= 50


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose ids, names, configuration and command are attacks."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=window.pwned=1>"
    run = make_run(folder, Shape(num_rows=len(PAYLOADS), ids=PAYLOADS))

    def attack(manifest: Row) -> None:
        manifest["config"] |= {payload: payload for payload in PAYLOADS}
        manifest["model"] = {"path": PAYLOADS[3]}
        manifest["device"] = PAYLOADS[0]
        manifest["command"] += PAYLOADS
        manifest["error"] = PAYLOADS[1]
        manifest["counts"] |= {"failed": 1, "failed_by_code": dict.fromkeys(PAYLOADS, 1)}

    edit_manifest(run, attack)
    assert main("analyze", [f"run={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def hostile_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = tmp_path_factory.mktemp("hostile") / "<script>window.pwned=1<script>"
    for number in (1, 2):
        run = make_run(sweep / f"<img src=x onerror=window.pwned={number}>", Shape(num_rows=9))
        edit_manifest(run, lambda manifest, number=number: manifest["config"].update({PAYLOADS[9]: PAYLOADS[number]}))
    assert main("analyze", [f"run={sweep}"]) == 0
    return sweep


def parsed(report: Path) -> ElementTree.Element:
    """As a browser's parser builds it."""
    return html5lib.parse(report.read_bytes(), treebuilder="etree", namespaceHTMLElements=False)


def elements(root: ElementTree.Element) -> Iterator[ElementTree.Element]:
    return (node for node in root.iter() if isinstance(node.tag, str))


@pytest.mark.parametrize("name", ["hostile", "hostile_sweep"])
def test_attacks_in_a_run_leave_the_document_as_it_is(name: str, request: pytest.FixtureRequest) -> None:
    root = parsed(request.getfixturevalue(name) / "report.html")

    tags = Counter(node.tag for node in elements(root))
    assert tags == Counter(
        {"html": 1, "head": 1, "meta": 3, "title": 1, "style": 1, "body": 1, "main": 1, "noscript": 1, "script": 2}
    )
    allowed = {"charset", "http-equiv", "content", "name", "lang", "id", "type"}
    assert {name for node in elements(root) for name in node.attrib} <= allowed
    (content,) = [node.text for node in elements(root) if node.attrib.get("id") == "data"]
    assert content is not None
    assert not set("<>&\u2028\u2029") & set(content)
    told = json.dumps(json.loads(content), ensure_ascii=False)
    assert "window.pwned" in told, "the texts are there, as texts"


def test_every_payload_is_in_the_report_as_it_was(hostile: Path) -> None:
    (content,) = [node.text for node in elements(parsed(hostile / "report.html")) if node.attrib.get("id") == "data"]
    assert content is not None
    data = json.loads(content)
    assert set(data["rows"]["id"]) == set(PAYLOADS)
    assert {key for key, _ in data["config"]} >= set(PAYLOADS)


@pytest.mark.parametrize("name", ["hostile", "hostile_sweep"])
def test_the_policy_allows_our_script_and_style_and_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    root = parsed(request.getfixturevalue(name) / "report.html")
    (policy,) = [n.attrib["content"] for n in elements(root) if n.attrib.get("http-equiv") == "Content-Security-Policy"]
    (script,) = [n.text for n in elements(root) if n.tag == "script" and "id" not in n.attrib]
    (style,) = [n.text for n in elements(root) if n.tag == "style"]
    hashes = [base64.b64encode(hashlib.sha256((text or "").encode()).digest()).decode() for text in (script, style)]
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src 'sha256-{hashes[0]}'",
        f"style-src 'sha256-{hashes[1]}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    ours = f"{script}{style}"
    assert not re.search(r"https?:|url\(|@import|import\(|fetch|XMLHttpRequest|WebSocket|sendBeacon|\bsrc\b|href", ours)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|createContext", ours
    )


def test_a_page_without_escaping_would_be_caught() -> None:
    """The negative control: the same text, put in as it is, does change the document."""
    safe = page({"id": PAYLOADS[21]})
    unsafe = re.sub(rb'id="data">.*?</script>', lambda _: b'id="data">' + PAYLOADS[21].encode() + b"</script>", safe)
    tags = [
        Counter(n.tag for n in elements(html5lib.parse(text, namespaceHTMLElements=False))) for text in (safe, unsafe)
    ]
    assert tags[0] != tags[1]


def test_a_terminal_gets_no_escapes_from_ids(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = PAYLOADS.index("\x00\x1b[31m\x07<\u2029>&amp;&lt;")
    assert main("explain", [f"run={hostile}", f"row={row}"]) == 0
    assert main("analyze", [f"run={hostile}"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out


@pytest.fixture(scope="module")
def page_of_browser() -> Iterator[browser.Page]:
    program = browser.find()
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(browser.NAMES)} is on PATH, {browser.VARIABLE} is not set")
    with browser.Page(program) as opened:
        yield opened


@pytest.mark.browser
@pytest.mark.parametrize("name", ["hostile", "hostile_sweep"])
def test_a_browser_draws_the_report_and_runs_nothing_of_the_run(
    name: str, request: pytest.FixtureRequest, page_of_browser: browser.Page
) -> None:
    report: Path = request.getfixturevalue(name) / "report.html"
    opened = page_of_browser
    opened.requests.clear()
    opened.open(report)
    assert opened.ask("document.documentElement.dataset.drawn") == "true", opened.complaints
    assert opened.ask("typeof window.pwned") == "undefined"
    assert opened.ask("document.querySelectorAll('img, iframe, svg, link, base, [onerror]').length") == 0
    assert "onerror=window.pwned" in opened.ask("document.body.innerText"), "shown as text"
    assert opened.ask("document.documentElement.scrollWidth <= innerWidth"), "long texts do not widen the page"
    assert opened.requests == [report.as_uri()], "and nothing was loaded from anywhere else"
    assert opened.complaints == []


PICTURES = """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
    done([...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())))))"""
"""What is drawn, once all that was asked for is."""


def wheel(canvas: int, delta: int, keys: str = "") -> str:
    """Expression that turns the wheel over a plot and answers whether the page may scroll."""
    return f"""(() => {{
        const canvas = document.querySelectorAll('canvas')[{canvas}], box = canvas.getBoundingClientRect();
        return canvas.dispatchEvent(new WheelEvent('wheel', {{
            deltaY: {delta}, clientX: box.left + box.width * 0.5, clientY: box.top + 40, cancelable: true, {keys} }}));
    }})()"""


@pytest.mark.browser
def test_a_browser_zooms_the_plots(hostile: Path, page_of_browser: browser.Page) -> None:
    """Those of time together, each of the three latencies by itself."""
    opened = page_of_browser
    opened.open(hostile / "report.html")
    widths = opened.ask(
        "[...document.querySelectorAll('canvas')].map((c) => [c.width, c.clientWidth * devicePixelRatio])"
    )
    assert len(widths) == 10
    assert all(drawn == shown for drawn, shown in widths), "a picture is as wide as its place"
    whole = opened.ask(PICTURES)
    assert opened.ask(wheel(0, 100)) is True, "there is nothing to zoom out of: the page scrolls"
    assert opened.ask(wheel(0, -100)) is False
    zoomed = opened.ask(PICTURES)
    assert [one != other for one, other in zip(whole, zoomed, strict=True)] == [True] * 7 + [False] * 3
    opened.ask("document.querySelector('canvas').dispatchEvent(new MouseEvent('dblclick'))")
    assert opened.ask(PICTURES) == whole
    for canvas in range(10):
        assert opened.ask(wheel(canvas, -100, "shiftKey: true")) is False
    upright = opened.ask(PICTURES)
    assert all(one != other for one, other in zip(whole, upright, strict=True))
    assert opened.ask(wheel(7, -100)) is False
    latency = opened.ask(PICTURES)
    assert [one != other for one, other in zip(upright, latency, strict=True)] == [False] * 7 + [True, False, False]
