"""A person at the page, in a real browser: four slices are drawn, the fifth is proposed right."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.annotating import TOKEN, Served, serving
from support.fake_bundle import make_fake_bundle

from recallseg.engines.verification import mask_dice
from recallseg.runtime.reports.demo import load_slices

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver"
)
NAME = "brain"
RADIUS = 12


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[np.bool_]]]:
    """Five slices of a real MR template as PNG, and where the brain is."""
    slices = load_slices(16)
    chosen = [*slices.exemplars[5:9], slices.queries[6]]
    folder = tmp_path_factory.mktemp("slices")
    for number, one in enumerate(chosen):
        image = one.image / one.image.max() * 255
        cv2.imwrite(str(folder / f"slice-{number}.png"), image.astype(np.uint8))
    return folder, {f"slice-{n}.png": one.masks["brain"] for n, one in enumerate(chosen)}


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1400,950"):
        options.add_argument(f"--{argument}")
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(10)
    yield driver
    said = [line["message"] for line in driver.get_log("browser")]
    driver.quit()
    assert not said, said


class Person:
    """What a person does at the page."""

    def __init__(self, browser: webdriver.Chrome, served: Served) -> None:
        self.browser, self.served = browser, served
        browser.get(f"{served.url}/#token={TOKEN}")

    def find(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def wait(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 300
        while not done():
            assert time.monotonic() < end, (self.find("status").text, self.find("error").text)
            time.sleep(0.05)
        assert not self.find("error").text

    def says(self, text: str) -> None:
        self.wait(lambda: text in self.find("status").text)

    def open(self, name: str) -> None:
        found = f"//ul[@id='worklist']//button[starts-with(normalize-space(.), '{name}')]"
        self.browser.find_element(By.XPATH, found).click()
        self.wait(lambda: self.find("picture-title").text == name)

    def place(self, pixels: NDArray[Any], shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Return where pixels (x, y) of the picture are in the window."""
        box = self.find("picture").rect
        scale = min(box["width"] / shape[1], box["height"] / shape[0])
        left = box["x"] + (box["width"] - shape[1] * scale) / 2
        top = box["y"] + (box["height"] - shape[0] * scale) / 2
        return [
            (round(left + (x + 0.5) * scale), round(top + (y + 0.5) * scale)) for x, y in pixels
        ]

    def drag(self, points: list[tuple[int, int]]) -> None:
        actions = ActionBuilder(self.browser, duration=0)
        actions.pointer_action.move_to_location(*points[0]).pointer_down()
        for point in points[1:]:
            actions.pointer_action.move_to_location(*point)
        actions.pointer_action.pointer_up()
        actions.perform()

    def draw(self, mask: NDArray[np.bool_]) -> None:
        """Fill a shape with the brush, line by line, in one stroke."""
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RADIUS + 1,) * 2)
        core = cv2.erode(mask.astype(np.uint8), kernel) > 0
        lines = []
        for step, y in enumerate(range(0, mask.shape[0], RADIUS // 2)):
            xs = np.flatnonzero(core[y])
            if len(xs):
                ends = [(xs[0], y), (xs[-1], y)]
                lines += ends if step % 2 else ends[::-1]
        self.find("picture").send_keys("d")
        self.browser.execute_script(f"document.getElementById('brush').value = {RADIUS}")
        self.drag(self.place(np.array(lines), mask.shape))
        self.says(f"{NAME}: ")

    def counts(self) -> dict[str, int]:
        """Return how often the page says that the first structure was corrected, and how."""
        text = self.browser.find_element(By.CSS_SELECTOR, "#structures small").text
        return {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]{3,})", text)}

    def export(self, mark: str) -> NDArray[np.bool_]:
        """Return what the server would propose for an image of the list."""
        with httpx.Client(
            base_url=self.served.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300
        ) as client:
            draft = client.post("/api/drafts", json={"mark": mark}).json()["draft"]
            assert client.post(f"/api/drafts/{draft}/propose").json()["proposed"]
            data = client.get(f"/api/drafts/{draft}/export").content
            client.delete(f"/api/drafts/{draft}")
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) > 0


def test_four_slices_are_drawn_and_accepted_and_the_fifth_is_right(
    tmp_path: Path, browser: webdriver.Chrome, truths: tuple[Path, dict[str, NDArray[np.bool_]]]
) -> None:
    folder, masks = truths
    with serving(tmp_path, exemplars=0, images=folder) as served:
        person = Person(browser, served)
        for number in range(4):
            name = f"slice-{number}.png"
            person.open(name)
            if number == 0:
                person.says("The library is empty")
                person.find("name").send_keys(NAME, Keys.ENTER)
            else:
                person.says("Proposed")
                person.find("reset").click()
                person.says("Cleared")
            person.draw(masks[name])
            assert len(served.desk.library) == number, "nothing before it is accepted"
            person.find("picture").send_keys("a")
            person.says("Accepted")
            assert len(served.desk.library) == number + 1
        for exemplar in served.desk.library:
            _, drawn = served.desk.library.source(exemplar.key)
            assert max(mask_dice(drawn[NAME], mask) for mask in masks.values()) > 0.9
        person.open("slice-4.png")
        person.says("Proposed: brain")
        button = browser.find_element(By.CSS_SELECTOR, "#worklist [aria-current=true]")
        found = person.export(button.get_attribute("data-mark"))
        assert mask_dice(found, masks["slice-4.png"]) > 0.9
        assert "accepted" in person.find("worklist").text


def test_clicks_boxes_and_scribbles_reach_the_networks(
    tmp_path: Path, browser: webdriver.Chrome, truths: tuple[Path, dict[str, NDArray[np.bool_]]]
) -> None:
    bundle = str(make_fake_bundle(tmp_path / "bundle", correct=True).path)
    with serving(tmp_path, images=truths[0], bundle=bundle, engine="fake") as served:
        person = Person(browser, served)
        person.open("slice-0.png")
        person.says("Proposed")
        shape = truths[1]["slice-0.png"].shape
        (middle,) = person.place(np.array([(shape[1] // 2, shape[0] // 2)]), shape)
        corner = (middle[0] - 60, middle[1] - 50)
        for number, (key, points) in enumerate(
            [("c", [middle]), ("o", [corner]), ("b", [corner, middle]), ("s", [corner, middle])], 1
        ):
            person.find("picture").send_keys(key)
            person.says("Tool")
            person.drag([points[0], points[-1]])
            person.says("disc: ")
            person.wait(lambda number=number: sum(person.counts().values()) == number)
        assert person.counts() == {"click": 2, "box": 1, "scribble": 1}
        person.find("undo").click()
        person.says("Taken back: disc")
        assert person.counts()["undo"] == 1


def test_with_the_keyboard_alone(
    tmp_path: Path, browser: webdriver.Chrome, truths: tuple[Path, dict[str, NDArray[np.bool_]]]
) -> None:
    folder, _ = truths
    with serving(tmp_path, exemplars=0, images=folder) as served:
        person = Person(browser, served)
        person.wait(lambda: bool(browser.find_elements(By.CSS_SELECTOR, "#worklist button")))

        def press(*keys: str) -> None:
            ActionChains(browser).send_keys(*keys).perform()

        press("n")
        person.says("The library is empty")
        for _ in range(60):  # to the field for a new structure
            if browser.switch_to.active_element.get_attribute("id") == "name":
                break
            press(Keys.TAB)
        press("lesion", Keys.ENTER)
        assert browser.switch_to.active_element.get_attribute("id") == "picture"
        press("d", Keys.ENTER)
        person.says("lesion: ")
        press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        person.says("lesion")
        press("u")
        person.says("Taken back: lesion")
        press(Keys.ENTER)
        person.says("lesion: ")
        press("a")
        person.says("Accepted")
        assert served.desk.library.structures == ("lesion",)


def test_everything_that_can_be_used_has_a_name(
    tmp_path: Path, browser: webdriver.Chrome, truths: tuple[Path, dict[str, NDArray[np.bool_]]]
) -> None:
    with serving(tmp_path, exemplars=2, images=truths[0]) as served:
        person = Person(browser, served)
        person.open("slice-0.png")
        person.says("Proposed")
        nameless: list[str] = []

        def looked_at() -> bool:
            nameless.clear()
            try:
                for one in browser.find_elements(By.CSS_SELECTOR, "button, input, canvas, select"):
                    if one.is_displayed() and not one.accessible_name.strip():
                        nameless.append(str(one.get_attribute("outerHTML")))
            except StaleElementReferenceException:  # the worklist was drawn anew meanwhile
                return False
            return True

        person.wait(looked_at)
        assert nameless == []
        person.find("view-library").click()
        person.wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#gallery img")) == 2)
        person.find("find-doubtful").click()
        person.wait(lambda: "compared" in person.find("library-status").text)
        browser.find_element(By.CSS_SELECTOR, "#gallery [aria-label^=Retire]").click()
        person.wait(lambda: len(served.desk.library) == 1)
        person.wait(  # or it asks for pictures when the server is gone
            lambda: bool(
                browser.execute_script(
                    "const all = [...document.querySelectorAll('#gallery img')];"
                    "return all.length === 1 && all.every(one => one.complete)"
                )
            )
        )
