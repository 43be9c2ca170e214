"""The status page, ``status --watch`` and the bill of materials: what a person and an inventory get of a node."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reconciler.commands import status_page
from reconciler.core.events import Incident
from reconciler.core.node import Gpu, NodeFacts
from reconciler.report import page
from reconciler.report.page import STYLE, ChartPoint, Page, PageEvent, PageModel
from reconciler.store import observe
from reconciler.store.ledger import Ledger
from tests.node import Node, run, tiny

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOSTILE = "</td><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> ' \" & \u202e\x1b[31m javascript:x"


class Reader(HTMLParser):
    """What a browser sees: elements with their attributes, and text."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def a_page(text: str = "All is well", level: str = "ok") -> Page:
    """Return a page in which every text is *text*."""
    model = PageModel(id=text, state="active", reason=text, tasks=(text,), here_bytes=5, total_bytes=10, last_error=text, since=NOW)
    event = PageEvent(at=NOW, kind=text, text=text, times=3, last_at=NOW)
    facts = NodeFacts(
        gpus=(Gpu(name=text, total_bytes=1 << 34, free_bytes=1),), engines={text: text}, disk_total_bytes=100, disk_free_bytes=40
    )
    return Page(
        made_at=NOW,
        summary=text,
        level=level,
        network=text,
        snapshot_version=3,
        expires_at=NOW,
        heard_at=NOW,
        lock=text,
        active_digest=text,
        node=facts,
        next_at=NOW,
        models=(model,),
        incidents=(event,),
        history=(event,),
        points=(ChartPoint(at=NOW - timedelta(days=2), active=1), ChartPoint(at=NOW - timedelta(days=1), active=3)),
    )


def shown(found: Page) -> Reader:
    return Reader(page.render(found).decode())


# -- what it is


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    seen = shown(a_page())
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not [attributes for _, attributes in seen.elements if {"src", "href", "style", "srcset"} & attributes.keys()]
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policies = [attributes["content"] for _, attributes in seen.elements if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


def test_hostile_text_is_text_everywhere() -> None:
    seen, clean = shown(a_page(HOSTILE)), shown(a_page())
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in clean.elements], "it adds no element"
    assert [[*attributes] for _, attributes in seen.elements] == [[*attributes] for _, attributes in clean.elements], "and no attribute"
    raw = page.render(a_page(HOSTILE)).decode()
    assert "<script" not in raw
    assert "\u202e" not in raw, "which would turn the text around"
    assert "\x1b" not in raw


def test_a_hostile_level_or_state_makes_no_class() -> None:
    bad = shown(a_page(level='x" onload="y'))
    assert any(attributes.get("class") == "summary error" for _, attributes in bad.elements)
    model = PageModel(id="a:v1", state='x" onload="y', reason="")
    assert "onload" not in page.render(Page(made_at=NOW, summary="", level="ok", models=(model,))).decode()


def test_long_text_is_cut() -> None:
    assert len(page.render(a_page("x" * 1_000_000))) < 100_000


def test_ten_thousand_models_make_a_page_that_a_browser_opens() -> None:
    models = tuple(PageModel(id=f"m{number}:v1", state="active", reason="up-to-date: nothing to do") for number in range(10_000))
    made = page.render(Page(made_at=NOW, summary="", level="ok", models=models))
    assert len(made) < 1_000_000
    assert b"and 9,000 more" in made


def test_what_helps_readers_who_cannot_see_it_is_there() -> None:
    seen = shown(a_page())
    assert ("html", {"lang": "en"}) in seen.elements
    assert [tag for tag, _ in seen.elements if tag == "h1"] == ["h1"]
    headed = {attributes["aria-labelledby"] for tag, attributes in seen.elements if tag == "section"}
    assert headed <= {attributes["id"] for tag, attributes in seen.elements if tag == "h2"}
    assert all(attributes.get("aria-label") for tag, attributes in seen.elements if tag == "progress")
    assert all(attributes.get("scope") for tag, attributes in seen.elements if tag == "th")
    (picture,) = [attributes for tag, attributes in seen.elements if tag == "svg"]
    assert picture["role"] == "img"
    assert "From 2026-11-18 to 2026-11-20, 2 swaps: between 1 and 3 active, now 3." in seen.text


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "paper"),
    [
        ("ink", "paper"), ("soft", "paper"), ("soft", "panel"), ("ink", "panel"), ("ok", "paper"), ("warning", "paper"), ("error", "paper"),
        ("ok", "ok-paper"), ("warning", "warning-paper"), ("error", "error-paper"), ("ink", "ok-paper"), ("ink", "warning-paper"),
        ("ink", "error-paper"),
    ],
)  # fmt: skip
def test_every_text_stands_out_from_what_is_behind_it(theme: str, ink: str, paper: str) -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if theme == "light" else dark.split("} }")[0]))
    darker, lighter = sorted((luminance(colors[ink]), luminance(colors[paper])))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5, "WCAG 2.2, 1.4.3"


# -- of a node


def written(node: Node) -> Reader:
    path = node.folder / "page.html"
    ran = node.run("status", "--page", str(path))
    assert ran.code == 0, ran
    return Reader(path.read_text())


def test_the_page_of_a_node_says_what_status_says(used: Node) -> None:
    seen, said = written(used), used.run("status", "--json").json
    assert said["summary"].replace("`", "") in seen.text
    assert "a:v1 completion" in seen.text
    assert "active" in seen.text
    assert any(attributes.get("class") == "summary ok" for _, attributes in seen.elements)
    assert "generation 1" in seen.text
    assert "svg" in seen.tags


def test_the_page_of_a_node_in_trouble_says_what_to_do(node: Node) -> None:
    node.publish(node.item("bad:v1", b"no model at all"))
    node.run("apply")
    seen = written(node)
    assert "reconcile status bad:v1 shows why" in seen.text
    assert "code" in seen.tags
    assert any(attributes.get("class") == "summary warning" for _, attributes in seen.elements)
    assert "smoke-failed" in seen.text
    (used_lock,) = [node.folder / "models.lock"]
    used_lock.write_bytes(used_lock.read_bytes() + b"#")
    seen = written(node)
    assert "lock-mismatch" in seen.text
    assert any(attributes.get("class") == "summary error" for _, attributes in seen.elements)
    assert "smoke-failed" in seen.text, "what is known without the lock is still shown"


def test_an_incident_that_a_server_wrote_is_text(used: Node) -> None:
    with Ledger.writing(used.context().layout.ledger) as ledger:
        ledger.log_incident(Incident(kind="hash-mismatch", source=f"https://user:secret@h.example.org/{HOSTILE}", detail=HOSTILE), NOW)
    seen = written(used)
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert "document.title" in seen.text
    assert "secret" not in seen.text


def test_a_page_is_replaced_as_a_whole_and_never_over_a_file_of_the_node(used: Node) -> None:
    before = (used.folder / "models.lock").read_bytes()
    assert used.run("status", "--page", str(used.folder / "models.lock")).code == 64
    assert (used.folder / "models.lock").read_bytes() == before
    written(used)
    inode = (used.folder / "page.html").stat().st_ino
    written(used)
    assert (used.folder / "page.html").stat().st_ino != inode
    assert sorted(path.name for path in used.folder.glob("*page*")) == ["page.html"]


def test_the_agent_writes_the_page_after_each_cycle(used: Node) -> None:
    used.configure('\n[agent]\npage = "public.html"\n')
    assert used.run("agent", "--once").code == 0
    assert "All is well" in Reader((used.folder / "public.html").read_text()).text


def test_a_page_that_cannot_be_written_ends_no_cycle(used: Node) -> None:
    used.configure('\n[agent]\npage = "gone/public.html"\n')
    ran = used.run("agent", "--once")
    assert ran.code == 0
    assert "the status page could not be written" in ran.out


@pytest.mark.parametrize("place", ["store/page.html", "models.lock", "store"])
def test_a_page_in_the_store_or_over_another_file_is_refused(used: Node, place: str) -> None:
    used.configure(f'\n[agent]\npage = "{place}"\n')
    ran = used.run("plan")
    assert ran.code == 1
    assert "[agent] page" in ran.err


def test_the_history_counts_backwards_from_what_is_active_now(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.run("apply")
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    node.run("apply")
    node.publish(node.item("b:v1", tiny("b")))
    node.run("apply")
    assert [point.active for point in status_page.gather(node.context()).points] == [1, 2, 1]


# -- what is partly here


def staged(node: Node, blob: str, data: bytes) -> None:
    folder = node.store / "staging" / blob.replace(":", "-") / "0abc"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(data)


def test_status_and_page_count_what_is_partly_downloaded(used: Node) -> None:
    big = os.urandom(1 << 20)
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", big, serve=False))
    listed = used.run("status", "--json").json["models"][1]
    assert (listed["here_bytes"], listed["total_bytes"]) == (0, 1 << 20)
    (blob,) = [one["digest"] for one in used.run("plan", "--json").json["blobs"]]
    staged(used, blob, big[: 1 << 19])

    listed = used.run("status", "--json").json["models"][1]

    assert listed["here_bytes"] == 1 << 19
    assert "512.0 KiB of 1.0 MiB" in used.run("status").out
    assert "512.0 KiB of 1.0 MiB" in written(used).text
    assert "512.0 KiB of it is here already" in used.run("plan").out


def test_what_lies_in_staging_under_other_names_counts_for_nothing(used: Node) -> None:
    sizes = {"sha256:" + "0" * 64: 100}
    layout = used.context().layout
    (layout.staging / "sha256-zz").mkdir(parents=True)
    (layout.staging / "file").write_bytes(b"x")
    assert observe.partial_bytes(layout, sizes) == {}
    staged(used, "sha256:" + "0" * 64, b"x" * 9000)
    assert observe.partial_bytes(layout, sizes) == {"sha256:" + "0" * 64: 100}, "never more than its size"


# -- watch


@pytest.fixture
def watching(used: Node) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "reconciler", "status", "--watch", "--every", "100ms", "--json"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would what we start
    process = subprocess.Popen(
        [*words, "--config", str(used.folder / "reconcile.toml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    yield process
    process.kill()
    process.communicate()


def test_watch_prints_a_line_when_something_changes_and_ends_with_ctrl_c(used: Node, watching: subprocess.Popen[str]) -> None:
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    lines: Iterator[dict[str, Any]] = map(json.loads, watching.stdout)
    second = next(line for line in lines if "error" not in line and line["snapshot"]["version"] > first["snapshot"]["version"])
    assert {one["id"] for one in second["models"]} == {"a:v1", "b:v1"}
    time.sleep(0.3)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 0


# -- the bill of materials


def bom(node: Node) -> dict[str, Any]:
    ran = node.run("status", "--format", "cyclonedx")
    assert ran.code == 0, ran
    found: dict[str, Any] = ran.json
    return found


def test_the_bill_of_materials_lists_what_is_here_with_its_digests(used: Node) -> None:
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    found = bom(used)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    (model,) = found["components"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "a", "v1")
    (file,) = model["components"]
    assert file["hashes"] == [{"alg": "SHA-256", "content": used.blobs()[0].name}]
    assert {"name": "reconcile:state", "value": "active"} in model["properties"]
    assert found["dependencies"] == [{"ref": "node", "dependsOn": ["a:v1"]}]
    used.run("apply")
    assert [one["bom-ref"] for one in bom(used)["components"]] == ["a:v1", "b:v1"]


def test_the_bill_of_materials_is_valid_by_the_schema_of_cyclonedx(node: Node) -> None:
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation import make_schemabased_validator

    node.publish(
        node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"), tasks=["completion", "chat"]), node.item("c:v1", b"x", state="disabled")
    )
    node.run("apply")
    validator = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    text = json.dumps(bom(node))
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"machine-learning-model"', '"model"')) is not None, "the validator does see a fault"


def test_the_serial_number_follows_from_what_is_here(used: Node) -> None:
    first, again = bom(used), bom(used)
    assert first["serialNumber"] == again["serialNumber"]
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first["serialNumber"])
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert bom(used)["serialNumber"] != first["serialNumber"]


def test_status_json_by_format_is_that_by_option(used: Node) -> None:
    assert used.run("status", "--format", "json").json["schema"] == 1
    assert run("status", "--format", "xml").code == 64


def test_no_secret_of_a_source_is_in_the_bill_of_materials(node: Node) -> None:
    data = tiny("a")
    address = f"{node.server.address}/sha256/{hashlib.sha256(data).hexdigest()}?token=hidden"
    node.publish(node.item("a:v1", data, urls=[address]))
    node.run("apply")
    assert "hidden" not in json.dumps(bom(node))


# -- in a real browser


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_an_error_and_hostile_text_does_nothing(tmp_path: Path, theme: str, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed: the page is parsed, and not opened")
    (tmp_path / "page.html").write_bytes(page.render(a_page(HOSTILE)))
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    words += [f"--window-size={width},1400", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}"]

    def opened(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)

    seen = opened("--dump-dom")
    assert ":CONSOLE" not in seen.stderr, seen.stderr
    dom = Reader(seen.stdout.partition("<!DOCTYPE html>")[2])
    (title,) = re.findall(r"<title>(.*?)</title>", seen.stdout)
    assert title.startswith("&lt;/td&gt;"), "no script has written another"
    assert not dom.tags & {"script", "img"}
    opened(f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 20_000, "something is drawn"
