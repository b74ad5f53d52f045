"""The playground in a real Chromium, against a real service.

Screenshots go to the folder that IRONCLIP_TEST_ARTEFACTS names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import (
    ROOT,
    ServiceProcess,
    free_port,
    launch_service,
    make_key,
    picture,
    served,
    write_keys,
)
from tests.service.gateway import PREFIX, gateway
from tests.service.playground_page import (
    COUNT_EVENTS,
    GIVE_FILE,
    NARROW,
    VIEW,
    WIDE,
    Page,
    attack,
    axe,
    classified,
    too_wide,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
sync_api.expect.set_options(timeout=20_000)  # the page answers at once; a busy machine does not

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

SAMPLE = ROOT / "ironclip" / "demo" / "samples" / "guitar.png"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """The service itself, with the encoders that ship with it."""
    with served(tmp_path_factory.mktemp("playground"), encoders="demo=demo,demo-robust=demo-robust") as process:
        yield process


@pytest.fixture(scope="module")
def http(service: ServiceProcess) -> Iterator[httpx.Client]:
    """An HTTP client of the service, which has the page's own routes."""
    with httpx.Client(base_url=service.url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def probing(service: ServiceProcess) -> str:
    """The URL of a service that can be asked for attacks."""
    return service.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Open the playground of a service; at the end nothing may have gone wrong in the browser."""
    pages, faults = [], []

    def start(url: str, size: tuple[int, int] = WIDE, scheme: str = "light", view: str = VIEW) -> Page:
        width, height = size
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        # An answer of 4xx is written to the console by the browser itself; what is refused by policy is a fault.
        page.on(
            "console", lambda m: faults.append(m.text) if m.type == "error" and "status of 4" not in m.text else None
        )
        page.add_init_script(COUNT_EVENTS)
        page.goto(f"{url}/{view}")
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert not faults


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where what people are to look at is kept."""
    folder = Path(os.environ.get("IRONCLIP_TEST_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def screenshot(artefacts: Path) -> Callable[[Page, str], None]:
    """Keep a picture of the page for people to look at."""

    def take(page: Page, name: str) -> None:
        page.screenshot(path=artefacts / f"playground-{name}.png", full_page=True)

    return take


def test_the_page_is_served_with_a_policy_and_an_etag(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert 'href="docs"' in page.text
    assert http.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    for name in re.findall(r"playground/[\w.-]+", page.text):
        asset = http.get(f"/{name}")
        assert asset.status_code == 200
        assert asset.headers["cache-control"] == "no-cache"
    assert http.get("/playground/index.html").status_code == 404
    assert http.get("/playground/..%2Findex.html").status_code == 404


def test_every_module_of_the_page_is_served(http: httpx.Client) -> None:
    folder = ROOT / "service" / "playground"
    for file in folder.iterdir():
        if file.name != "index.html":
            assert http.get(f"/playground/{file.name}").content == file.read_bytes(), file.name


def test_samples_are_listed_with_what_their_licences_ask_for(http: httpx.Client) -> None:
    samples = http.get("/samples").json()["samples"]
    assert len(samples) == 12
    for sample in samples:
        file = http.get(sample["url"])
        assert file.headers["content-type"].startswith("image/")
        assert file.content == (SAMPLE.parent / sample["url"].rpartition("/")[2]).read_bytes()
        assert "copyright" in sample["credit"]
        assert sample["licence"] in ("Apache-2.0", "CC-BY-4.0")
        assert http.get(sample["url"], headers={"if-none-match": file.headers["etag"]}).status_code == 304
    missing = http.get("/samples/CREDITS.md")
    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")


def test_a_sample_is_classified_and_nothing_leaves_the_origin(probing: str, open_page: Callable[..., Page]) -> None:
    asked = []
    page = open_page("about:blank", view="")
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{probing}/")
    classified(page, "carrot")
    sync_api.expect(page.locator("#credit")).to_contain_text("Noto Emoji, copyright Google LLC, Apache-2.0")
    page.locator("input[value=penguin]").check()
    classified(page, "penguin")
    attack(page)
    assert len(asked) > 20
    assert all(url.startswith((f"{probing}/", "data:", f"blob:{probing}/")) for url in asked)


def test_a_picture_is_dropped_chosen_and_pasted(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing, view="#labels=guitar,carrot,penguin&encoders=demo,demo-robust")
    classified(page, "carrot")
    data = list(SAMPLE.read_bytes())
    page.evaluate(GIVE_FILE, [data, "DragEvent", "drop"])
    classified(page, "guitar")
    sync_api.expect(page.locator("#credit")).to_have_text("mine.png: your own")
    sync_api.expect(page.locator("input[name=sample]:checked")).to_have_count(0)
    page.set_input_files("#file", SAMPLE.with_name("penguin.png"))
    classified(page, "penguin")
    page.evaluate(GIVE_FILE, [data, "ClipboardEvent", "paste"])
    classified(page, "guitar")


def test_a_view_is_kept_in_the_address(probing: str, open_page: Callable[..., Page]) -> None:
    httpx.put(f"{probing}/label-sets/weather", json={"labels": ["umbrella", "sun", "rainbow"]}).raise_for_status()
    page = open_page(probing, view="#sample=rocket&labels=rocket,umbrella&encoders=demo-robust&eps=12&effort=standard")
    classified(page, "rocket", encoders=1)
    assert page.locator(".card").count() == 1
    assert page.locator("#max-eps-shown").inner_text() == "12/255"
    page.locator("#labels").fill("umbrella\nrocket\ncarrot, octopus")
    sync_api.expect(page.locator(".bars li")).to_have_count(4)
    page.locator("input[value=umbrella]").check()
    page.locator("#label-set").select_option("weather")
    classified(page, "umbrella", encoders=1)
    sync_api.expect(page.locator("#labels")).to_be_hidden()
    other = open_page(probing, view=page.evaluate("location.hash"))
    classified(other, "umbrella", encoders=1)
    assert other.locator("#label-set").input_value() == "weather"
    assert other.locator("#truth").input_value() == "umbrella"
    assert other.locator("#effort").input_value() == "standard"


def test_it_works_below_a_path_prefix(service: ServiceProcess, open_page: Callable[..., Page]) -> None:
    with gateway(service.url, free_port()) as url:
        asked = []
        page = open_page("about:blank", view="")
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}{PREFIX}/{VIEW}")
        classified(page, "carrot")
        attack(page)
        sync_api.expect(page.locator(".verdict").first).to_contain_text("Fooled")
        assert any("/events" in address for address in asked)
        assert all(address.startswith((f"{url}{PREFIX}/", "data:", f"blob:{url}/")) for address in asked)


def test_a_label_that_holds_markup_stays_text(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing)
    classified(page, "carrot")
    page.locator("#labels").fill('<img src=x onerror="document.title=1">')
    classified(page, "<img src=x")
    assert page.title() == "Ironclip playground"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_axe_finds_nothing(
    probing: str, open_page: Callable[..., Page], screenshot: Callable[[Page, str], None], scheme: str, artefacts: Path
) -> None:
    page = open_page(probing, scheme=scheme, view="")
    classified(page, "carrot")
    assert axe(page) == []
    screenshot(page, f"{scheme}-before")
    began = time.monotonic()
    attack(page)
    # How long both attacks take together, as the page opens; on a busy machine it says little, so nothing is asserted.
    took = {"both": round(time.monotonic() - began, 1), "each": page.locator(".cost").all_inner_texts()}
    (artefacts / f"playground-seconds-{scheme}.json").write_text(json.dumps(took, indent=1), encoding="utf-8")
    # Both are fooled within 16/255, the robust one later; /classify itself says so of both pictures.
    sync_api.expect(page.locator(".bars.attacked")).to_have_count(2)
    screenshot(page, f"{scheme}-after")
    for summary in page.locator("summary").all():
        summary.click()
    for size in (WIDE, NARROW):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        assert too_wide(page) == [], size
        assert axe(page) == [], size
    screenshot(page, f"{scheme}-after-{NARROW[0]}")


def test_every_control_is_reached_by_tab_and_shows_it(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing)
    classified(page, "carrot")
    attack(page)
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, ringed = page.evaluate("""() => {
          const at = document.activeElement;
          const ring = (e) => getComputedStyle(e).outlineStyle !== "none";
          const name = at.id || `${at.name || at.tagName}:${at.value ?? at.textContent}`;
          if (at === document.body) return ["", true];
          return [name, Boolean(ring(at) || ring(at.parentElement))];
        }""")
        reached.add(name)
        assert ringed, name
    wanted = {"theme", "file", "label-set", "labels", "truth", "defence", "effort", "max-eps", "attack"}
    wanted |= {"sample:carrot", "encoder:demo", "encoder:demo-robust", "SUMMARY:Numbers"}
    assert wanted <= reached, wanted - reached
    assert any(name.startswith("A:") for name in reached)


def test_the_theme_is_switched_and_remembered(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator("#theme").click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    page.locator("#theme").click()
    assert page.evaluate(paper) == light


def test_the_curve_redraws_with_each_event(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing)
    classified(page, "carrot")
    attack(page)
    seen = page.evaluate("window.seen")
    drawn = [one for one in seen if one["type"] in ("point", "progress", "done")]
    assert len(drawn) >= 6
    assert all(one["drawn"] >= 1 for one in drawn)
    points = [one for one in seen if one["type"] == "point"]
    assert len({one["points"] for one in points}) >= 2  # it grew
    assert len({one["markup"] for one in points}) >= len(points) // 2  # and looked different
    # A radius that is announced has no score yet: nothing is drawn of it, least of all on the axis.
    floor = page.locator(".curve").first.evaluate("e => e.querySelector('.axis').getAttribute('y1')")
    circles = [circle for one in seen for circle in re.findall(r"<circle[^>]*>", one["markup"] or "")]
    assert circles
    assert not [circle for circle in circles if f'cy="{floor}"' in circle]
    for card in page.locator(".card").all():
        assert card.get_attribute("data-state") == "done"
        assert card.locator(".curve .point").count() >= 2
        sync_api.expect(card.locator(".verdict")).to_have_text(re.compile(r"^(Fooled at|Held up to) [\d.]+/255"))
        sync_api.expect(card.locator(".cost")).to_contain_text(
            re.compile(r"gradients.*not a certificate", re.IGNORECASE)
        )
        for image in card.locator("figure:not(.empty) img").all():
            assert image.evaluate("i => i.naturalWidth") > 0
    assert "demo-robust: " in page.locator("#status").inner_text()
    # Both curves have the same axes.
    ticks = [card.locator(".curve .tick").all_text_contents() for card in page.locator(".card").all()]
    assert ticks[0] == ticks[1]
    assert ticks[0][-1] == "8"


def test_the_service_itself_says_what_the_adversarial_picture_is(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing)
    classified(page, "carrot")
    attack(page)
    card = page.locator(".card").first
    sync_api.expect(card.locator(".bars-key")).to_contain_text("as /classify answers it")
    assert card.locator(".bars .number.after").count() == card.locator(".bars li").count()
    page.locator("#labels").fill("carrot, rocket")  # another decision: what was found no longer stands
    sync_api.expect(card.locator(".bars .number.after")).to_have_count(0)
    sync_api.expect(card.locator(".verdict")).to_have_text("Not attacked yet")


def test_the_verdict_in_plain_words(service: ServiceProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(service.url)
    point = {"eps": 2, "broken": True, "label": "ear of corn"}
    clean = {"label": "carrot", "correct": True}
    done = {"state": "done", "status": "complete", "maxEps": 16, "clean": clean}
    cases = [
        (done | {"points": [point], "robustTo": 0, "brokenAt": 2}, "Fooled at 2/255: says “ear of corn”"),
        (
            done | {"points": [point], "robustTo": 1.5, "brokenAt": 2},
            "Fooled at 2/255: says “ear of corn”; held up to 1.5/255",
        ),
        (done | {"points": [], "robustTo": 16, "brokenAt": None}, "Held up to 16/255"),
        (
            done | {"points": [], "robustTo": 3, "brokenAt": None, "status": "budget_exhausted"},
            "Held up to 3/255 so far",
        ),
        (
            done | {"points": [], "brokenAt": 0, "clean": {"label": "rocket", "correct": False}},
            "Wrong without any attack: says “rocket”",
        ),
        (done | {"points": [], "robustTo": 0, "brokenAt": None, "state": "running"}, "Searching"),
    ]
    for run, wanted in cases:
        said = page.evaluate("async (run) => (await import('./playground/words.js')).verdict(run)", run)
        assert said == wanted


def test_what_is_not_decided_is_neither_held_nor_zero(service: ServiceProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(service.url)
    classified(page, "carrot")
    sync_api.expect(page.locator(".key")).to_contain_text("not decided")
    point = {"gradients": 0, "steps": 0}
    points = [
        point | {"eps": 1, "broken": False, "state": "held", "label": "rocket", "score": 0.1, "score_of_label": 0.8},
        point | {"eps": 2, "broken": None, "state": "unknown", "label": "rocket", "score": 0.4, "score_of_label": 0.5},
        point | {"eps": 3, "broken": None, "state": "unknown", "score_of_label": None},
        point | {"eps": 4, "broken": True, "state": "broken", "label": "rocket", "score": 0.9, "score_of_label": 0.05},
        point | {"eps": 5, "broken": None, "state": "running", "score_of_label": None},
    ]
    page.evaluate(
        """async (points) => {
          const { Card } = await import("./playground/card.js");
          const { models } = await import("./playground/api.js");
          const card = new Card((await models()).models[0], () => []);
          card.element.id = "tried";
          document.querySelector("#cards").replaceChildren(card.element);
          card.reset(8);
          card.receive("started", { clean: { label: "carrot", score: 0.9 }, label: "carrot" });
          for (const point of points) card.receive("point", point);
        }""",
        points,
    )
    card = page.locator("#tried")
    marks = card.locator(".curve .point")
    drawn = marks.evaluate_all("all => all.map((one) => one.getAttribute('class').split(' ')[1])")
    assert drawn == ["held", "held", "open", "broken"]  # the picture as it is, and those with a score
    sync_api.expect(marks.nth(2).locator("title")).to_have_text(re.compile(r"^2/255: 50\.0.%, not decided$"))
    path = card.locator(".curve .line").get_attribute("d")
    assert path is not None
    assert path.count("L") == 3
    assert "(3 not decided)" in (card.locator(".curve").get_attribute("aria-label") or "")
    card.locator("summary").click()
    rows = [row.locator("td").all_inner_texts() for row in card.locator("tbody tr").all()]
    assert [row[1] for row in rows] == ["rocket", "not decided", "not decided", "rocket", "not decided"]
    assert rows[2][2:4] == rows[4][2:4] == ["–", "–"]


def test_cancel_ends_the_attack(probing: str, open_page: Callable[..., Page]) -> None:
    page = open_page(probing, view=f"{VIEW}&effort=thorough")
    classified(page, "carrot")
    page.locator("#attack").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#cancel")).to_be_focused()
    sync_api.expect(page.locator(".card").first.locator("tbody tr").first).to_be_attached()
    with page.expect_request(lambda request: request.method == "DELETE") as cancelling:
        page.keyboard.press("Enter")
    assert re.search(r"/probes/[^/]+$", cancelling.value.url)
    sync_api.expect(page.locator("#attack")).to_be_focused()
    sync_api.expect(page.locator("#status")).to_have_text("Cancelled.")
    for verdict in page.locator(".verdict").all():
        sync_api.expect(verdict).to_contain_text("Cancelled")
    page.locator("#effort").select_option("quick")
    attack(page)  # and it can be attacked again
    sync_api.expect(page.locator(".card").first.locator(".verdict")).to_contain_text("/255")


def test_an_error_of_the_service_is_shown(probing: str, open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page(probing)
    classified(page, "carrot")
    page.locator("#truth").fill("not a label")
    page.locator("#truth").blur()
    attack(page)
    sync_api.expect(page.locator(".card .verdict.fault").first).to_contain_text("label")
    sync_api.expect(page.locator("#status")).to_contain_text("demo: ")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture(1)[:60])
    page.set_input_files("#file", broken)
    sync_api.expect(page.locator(".card .fault").first).to_contain_text(re.compile("PNG|image", re.IGNORECASE))
    assert page.locator(".bars li").count() == 0
    page.locator("#labels").fill("")
    sync_api.expect(page.locator("#status")).to_have_text("Write at least one label.")


def test_a_service_with_keys_asks_for_one(tiny_artifact: Path, tmp_path: Path, open_page: Callable[..., Page]) -> None:
    made = {"whole": make_key("whole1", "acme", "infer", "probe"), "half": make_key("half1", "acme", "infer")}
    keys = write_keys(tmp_path / "keys.toml", made)
    settings = {"encoders": f"tiny={tiny_artifact}", "keys_file": tmp_path / "keys.toml", "dtype": "float32"}
    locked = launch_service(tmp_path, **settings)
    try:
        locked.wait_ready()
        page = open_page(locked.url, view="#sample=carrot&labels=carrot,rocket&eps=4")
        dialog, entry = page.locator("#key-dialog"), page.locator("#key")
        sync_api.expect(dialog).to_be_visible()
        sync_api.expect(entry).to_be_focused()
        assert axe(page) == []
        for wrong in ("hunter2", "ick_whole1_" + "0" * 64):
            entry.fill(wrong)
            entry.press("Enter")
            sync_api.expect(dialog).to_be_visible()
        sync_api.expect(page.locator("#key-why")).to_contain_text("not known")
        entry.fill(f" {keys['half']} ")
        entry.press("Enter")
        classified(page, encoders=1)
        sync_api.expect(dialog).to_be_hidden()
        attack(page)
        sync_api.expect(page.locator(".card .fault").first).to_contain_text("scope probe")
        page.evaluate("sessionStorage.clear()")
        page.reload()
        entry.fill(keys["whole"])
        entry.press("Enter")
        classified(page, encoders=1)
        page.reload()  # the tab remembers it
        classified(page, encoders=1)
        attack(page)
        sync_api.expect(page.locator("#status")).to_contain_text("/255")
        assert page.locator(".curve").first.get_attribute("data-points") != "0"
        assert keys["whole"] not in page.content() + page.url
        assert page.evaluate("JSON.stringify(localStorage)").find("ick_") == -1
    finally:
        locked.stop()


def test_with_a_key_a_broken_stream_is_taken_up_and_a_lost_probe_cancelled(
    tiny_artifact: Path, tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"whole": make_key("whole1", "acme", "infer", "probe")})
    settings = {"encoders": f"tiny={tiny_artifact}", "keys_file": tmp_path / "keys.toml", "dtype": "float32"}
    locked = launch_service(tmp_path, **settings)
    try:
        locked.wait_ready()
        page = open_page(locked.url, view="#sample=carrot&labels=carrot,rocket&eps=4")
        page.locator("#key").fill(keys["whole"])
        page.locator("#key").press("Enter")
        classified(page, encoders=1)
        asked: list[str | None] = []
        first = 'id: 0\nevent: started\ndata: {"clean": {}, "label": "carrot"}\n\nid: 1\nevent: prog'

        def broken(route: Any) -> None:
            asked.append(route.request.headers.get("last-event-id"))
            if len(asked) == 1:
                route.fulfill(status=200, content_type="text/event-stream", body=first)
            elif len(asked) == 2:
                route.continue_()
            else:
                route.fulfill(status=200, content_type="text/event-stream", body=": cut off\n\n")

        page.route("**/probes/*/events", broken)
        attack(page)
        assert asked == [None, "0"]
        sync_api.expect(page.locator("#status")).to_contain_text("/255")
        page.locator("#effort").select_option("thorough")
        page.locator("#max-eps").fill("32")
        with page.expect_request(lambda request: request.method == "DELETE") as cancelling:
            attack(page)
        assert re.search(r"/probes/[^/]+$", cancelling.value.url)
        assert len(asked) > 4
        sync_api.expect(page.locator(".card .fault").first).to_contain_text("Attack again")
    finally:
        locked.stop()


def test_a_service_without_probing_says_so(tiny_artifact: Path, tmp_path: Path, open_page: Callable[..., Page]) -> None:
    with served(tmp_path, encoders=f"tiny={tiny_artifact}", probes=False, dtype="float32") as bare:
        page = open_page(bare.url, view="#sample=carrot&labels=carrot,rocket")
        classified(page, encoders=1)
        attack(page)
        sync_api.expect(page.locator(".card .fault").first).to_have_text("This service has probing switched off.")
