"""hkd analyze, and its page in a parser and in a browser."""

import base64
import io
import json
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.rules import rule
from hkd_d2.cli.dispatch import run_command
from hkd_d2.evaluation import PROTOCOLS, describe_ranges
from hkd_d2.evaluation.result_files import write_caltech

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# Ten images with a person each, all red; the first detector finds three and invents one, the second
# finds none and repeats itself.
PERSON = [100, 60, 40, 100]
GROUND_TRUTH = {
    "images": [{"id": i, "file_name": f"town_{i}.png"} for i in range(10)],
    "categories": [{"id": 1, "name": "pedestrian"}],
    "annotations": [
        {
            "id": i,
            "image_id": i,
            "category_id": 1,
            "bbox": PERSON,
            "height": 100,
            "vis_ratio": 1 - 0.02 * i,
        }
        for i in range(10)
    ],
}
GOOD = [
    {"image_id": i, "category_id": 1, "bbox": PERSON, "score": s}
    for i, s in ((0, 0.9), (1, 0.8), (2, 0.6))
] + [{"image_id": 4, "category_id": 1, "bbox": [5, 5, 30, 80], "score": 0.7}]
BAD = [{"image_id": 7, "category_id": 1, "bbox": [240, 150, 40, 100], "score": 0.5}]


@pytest.fixture(scope="module")
def main():
    return partial(run_command, "analyze")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("gt", GROUND_TRUTH), ("good", GOOD), ("bad", BAD), ("none", [])):
        Path(f"{name}.json").write_text(json.dumps(content))
    Path("images/town").mkdir(parents=True)
    pixels = np.full((200, 300, 3), 40, dtype=np.uint8)
    pixels[60:160, 100:140] = (200, 0, 0)
    for number in range(10):
        Image.fromarray(pixels).save(f"images/town/town_{number}.png")
    return tmp_path


class Page(HTMLParser):
    """Images and everything that could name something outside."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.links, self.text = [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.links += [value for key, value in attrs.items() if key in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append(attrs)

    def handle_data(self, data):
        self.text += data


def read_image(attrs):
    return Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",", 1)[1]))).convert("RGB")


@rule("The error page asks for nothing from outside")
def test_page_and_numbers(main, folder, capsys):
    arguments = ["gt.json", "first & <best>=good.json", "bad.json", "--images", "images"]
    assert main([*arguments, "--out", "new/page.html"]) == 0
    assert capsys.readouterr().out.split() == ["wrote", "new/page.html", "wrote", "new/page.json"]
    text = Path("new/page.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object"} and "url(" not in text
    assert all(link.startswith("data:") for link in page.links)
    assert all(image["alt"] for image in page.images)
    # Four figures. The first: a false positive and six misses over the operating point, FPPI 0.1;
    # the second: one false positive, ten misses.
    pictures = [read_image(image) for image in page.images]
    assert len(pictures) == 4 + 1 + 7 + 1 + 10
    assert "town_4.pngscore 0.70, height 80, IoU 0.00, background" in page.text
    assert "town_3.pngheight 100, visible 94%, IoU 0.00, no match" in page.text
    assert "first & <best>" in page.text
    assert "missing reference points: the recall of the last operating point" in page.text
    # A miss stands in the middle of its tile, red; the false positive on the grey street.
    miss, wrong = pictures[5], pictures[4]
    middle = (miss.width // 2, miss.height // 2)
    assert miss.size == (240, 320)
    assert miss.getpixel(middle)[0] > 150 > 60 > max(wrong.getpixel(middle))
    # Of two detectors the better is marked, and the second has its difference to the first.
    assert "bad - first & <best>" in page.text
    assert text.count('class="best"') > 3

    numbers = json.loads(Path("new/page.json").read_text())
    assert (numbers["setup"], numbers["curves"]) == ("All", "Reasonable")
    good = numbers["detectors"]["first & <best>"]
    # TP TP FP TP: a miss of 0.8 under FPPI 0.1, from there on 0.7
    assert good["miss_rate"]["Reasonable"] == pytest.approx(100 * (0.8**4 * 0.7**5) ** (1 / 9))
    assert good["curve"]["fppi"] == [0, 0, 0.1, 0.1]
    assert good["errors"]["operating_point"]["found"] == 3
    assert numbers["detectors"]["bad"]["errors"]["operating_point"]["found"] == 0


def test_without_images(main, folder):
    assert main(["gt.json", "good.json", "--fppi", "0.05", "--setup", "large"]) == 0
    page = Page(Path("errors.html").read_text())
    assert len(page.images) == 4
    assert "No contact sheets" in page.text and "at most 0.05 false positives" in page.text


def test_scores_that_are_no_probabilities_have_no_calibration(main, folder):
    Path("bad.json").write_text(json.dumps([BAD[0] | {"score": 7.5}]))
    assert main(["gt.json", "good.json", "bad.json"]) == 0
    assert "bad has no calibration" in Page(Path("errors.html").read_text()).text


# The same people for every protocol: named as Caltech's, with what the protocols read.
FRAMES = GROUND_TRUTH | {
    "images": [
        {"id": i, "file_name": f"set06_V000_I{i:05d}.png", "width": 300, "height": 200}
        for i in range(10)
    ],
    "annotations": [
        row | {"occlusion": row["id"] % 3, "label": "rider" if row["id"] == 9 else "pedestrian"}
        for row in GROUND_TRUTH["annotations"]
    ],
}
RULES = {
    "citypersons": "detections of an image: the first 1,000",
    "caltech": "ground truth outside x 4 to 634, y 4 to 474: ignored",
    "caltech_new": "width over height of 0.41: countable boxes, but not detections",
    "caltech_new_no_border": "protocol: caltech_new_no_border (dbEval.m of liuwei16/CSP)",
    "eurocity": "ground truth left out: all labels but pedestrian, person-group-far-away",
    "eurocity_ignore_riders": "all labels but pedestrian, person-group-far-away, rider",
    "kaist": "pedestrians of images without any detection: do not count",
}


@pytest.fixture
def frames(folder):
    """gt.json and images of FRAMES; good.json as Caltech's text files too, in good/."""
    Path("gt.json").write_text(json.dumps(FRAMES))
    write_caltech("good", GOOD, FRAMES)
    for i in range(10):
        Path(f"images/town/town_{i}.png").rename(f"images/set06_V000_I{i:05d}.png")
    return folder


@pytest.mark.parametrize("protocol", list(RULES))
def test_a_protocol_by_name(main, frames, capsys, protocol):
    """MR^-2 is that of hkd score; the page says setups, ranges and rules."""
    assert list(RULES) == [name for name in PROTOCOLS if name != "crowdhuman"]
    arguments = ["text=good", "good.json", "bad.json", "--images", "images"]
    assert main(["gt.json", *arguments, "--protocol", protocol, "--out", "page.html"]) == 0
    numbers = json.loads(Path("page.json").read_text())
    assert numbers["protocol"] == numbers["rules"]["name"] == protocol
    assert numbers["setup"].lower() == "all" and numbers["curves"].lower() == "reasonable"
    for name, file in (("text", "good"), ("good", "good.json"), ("bad", "bad.json")):
        capsys.readouterr()
        assert run_command("score", ["gt.json", file, "--protocol", protocol, "--json"]) == 0
        percent = json.loads(capsys.readouterr().out)
        assert numbers["detectors"][name]["miss_rate"] == percent
    assert numbers["detectors"]["text"]["miss_rate"] == numbers["detectors"]["good"]["miss_rate"]

    page = Page(Path("page.html").read_text())
    assert RULES[protocol] in page.text
    assert f"protocol: {protocol} ({PROTOCOLS[protocol].source})" in page.text
    table = page.text.split("MR^-2 in percent")[1].split("A setup counts")[0]
    for name, *cells in zip(
        PROTOCOLS[protocol].setups,
        *describe_ranges(PROTOCOLS[protocol].setups).values(),
        strict=True,
    ):
        assert "".join([name, *cells]) in table


def test_ground_truth_without_visible_shares(main, frames):
    rows = [{k: v for k, v in row.items() if k != "vis_ratio"} for row in FRAMES["annotations"]]
    Path("gt.json").write_text(json.dumps(FRAMES | {"annotations": rows}))
    arguments = ["gt.json", "good.json", "--images", "images", "--protocol", "eurocity"]
    assert main(arguments) == 0
    page = Page(Path("errors.html").read_text())
    assert "The ground truth has no visible share." in page.text
    assert "height 100, IoU 0.00, no match" in page.text and "visible 100%" not in page.text
    assert len(page.images) == 3 + 1 + 6  # the rider is no pedestrian
    assert (
        json.loads(Path("errors.json").read_text())["detectors"]["good"]["errors"]["by_visibility"]
        == []
    )


def test_counts_that_hang_on_the_detector(main, frames):
    """KAIST's script leaves out who is in an image without a detection: four images, and one.

    It also takes the match with the annotation of id 0 for a false positive, the first one.
    """
    assert main(["gt.json", "good.json", "bad.json", "--protocol", "kaist"]) == 0
    text = Page(Path("errors.html").read_text()).text
    assert "All>= 200 to 24 / 1" in text and "100 to 1504 / 13 (75.0%)1 (100.0%)+25.0" in text


@pytest.mark.parametrize(("rule", "missing"), [("official", 0.7), ("matlab", 1)])
def test_missing_points_by_name(main, folder, rule, missing):
    """FP TP TP FP TP: the four reference points under FPPI 0.1 lie before the curve."""
    Path("late.json").write_text(json.dumps([BAD[0] | {"score": 0.95}, *GOOD]))
    assert main(["gt.json", "late.json", "--missing-point", rule]) == 0
    numbers = json.loads(Path("errors.json").read_text())
    assert numbers["rules"]["missing_point"] == rule
    # Said of the detector that lacks points, on the page.
    text = Page(Path("errors.html").read_text()).text
    assert "late:" in text and "Reasonable lacks 4" in text and f"the rule '{rule}'" in text
    main(["gt.json", "good.json"])
    assert "Reasonable lacks" not in Page(Path("errors.html").read_text()).text
    expected = 100 * (missing**4 * 0.8**2 * 0.7**3) ** (1 / 9)
    assert numbers["detectors"]["late"]["miss_rate"]["Reasonable"] == pytest.approx(expected)


def test_an_image_without_a_name(main, folder, capsys):
    unnamed = [{k: v for k, v in i.items() if k != "file_name"} for i in GROUND_TRUTH["images"]]
    Path("unnamed.json").write_text(json.dumps(GROUND_TRUTH | {"images": unnamed}))
    assert main(["unnamed.json", "good.json", "--images", "images"]) == 2
    assert "of 'unnamed.json' has neither file_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gt.json", "nowhere.json"], "nowhere.json does not exist"),
        (["gt.json", "none.json"], "none.json: There is no detection of pedestrians"),
        (["gt.json", "good.json", "x=stray.json"], "stray.json: detection 0 lies in image 99"),
        (["gt.json", "good.json", "good=bad.json"], "Two detection files are named 'good'"),
        (["gt.json", "=good.json"], "=good.json: give a detection file as NAME=FILE"),
        (["gt.json", "good.json", "--setup", "Most"], "setup 'Most' is unknown"),
        (["gt.json", "good.json", "--curves", "Most"], "setup 'Most' is unknown"),
        (["gt.json", "good.json", "--setup", "heavy"], "The setup counts no pedestrian"),
        (["gt.json", "good.json", "--images", "nowhere"], "nowhere is no folder"),
        (["gt.json", "good.json", "--images", "empty"], "empty/town_4.png does not exist"),
        (["gt.json", "good.json", "--images", "broken"], "town_4.png' cannot be read"),
        (["gt.json", "good.json", "--fppi", "0"], "fppi is 0"),
        (["gt.json", "good.json", "--out", "page.txt"], "let its name end in .html"),
        (["gt.json", "good.json", "--out", "gt.html"], "gt.json would be overwritten"),
        (["gt.json", "good.json", "--protocol", "crowdhuman"], "crowdhuman has no setups"),
        (["gt.json", "good.json", "--protocol", "kaist"], "has no 'occlusion'"),
        (["gt.json", "images", "--protocol", "caltech"], "give names as set06_V000_I00029"),
        (["gt.json", "good.json", "--protocol", "kaist", "--setup", "heavy"], "'heavy' is unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(main, folder, capsys, arguments, message):
    Path("stray.json").write_text(json.dumps([GOOD[0] | {"image_id": 99}]))
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("broken/town_4.png").write_text("no image")
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("hkd analyze: ") and said.count("\n") == 1
    assert message in said


# Runs before the page's own policy, which forbids scripts, and counts what the page does.
PROBE = """<script>
const outside = [];
document.addEventListener("securitypolicyviolation", e => outside.push(e.blockedURI));
addEventListener("load", () => {
  const images = [...document.images];
  for (const entry of performance.getEntriesByType("resource")) outside.push(entry.name);
  document.body.textContent = "PROBE" + JSON.stringify({
    images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    outside: outside.filter(name => !name.startsWith("data:")),
    dark: getComputedStyle(document.body).backgroundColor,
  }) + "END";
});
</script>"""


def browse(page: str, folder, *flags):
    Path(folder, "probed.html").write_text(page.replace("<head>", "<head>" + PROBE, 1))
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}/profile",
            "--virtual-time-budget=5000",
            *flags,
            "--dump-dom",
            f"file://{folder}/probed.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "PROBE{" in done.stdout, done.stderr
    return json.loads(done.stdout.split("<body>")[1].split("PROBE")[1].split("END")[0])


@rule("The error page asks for nothing from outside")
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_loads_every_image_and_nothing_from_outside(main, folder):
    assert main(["gt.json", "good.json", "bad.json", "--images", "images"]) == 0
    page = Path("errors.html").read_text()
    seen = browse(page, folder)
    assert seen["images"] == seen["loaded"] == 4 + 1 + 7 + 1 + 10
    assert seen["outside"] == [] and seen["dark"] == "rgb(255, 255, 255)"
    dark = browse(page, folder, "--blink-settings=preferredColorScheme=0")
    assert dark["dark"] == "rgb(22, 25, 29)"
    # The probe itself can fail.
    broken = page.replace("</main>", '<img src="data:image/png;base64,AA"></main>')
    broken = broken.replace("</main>", '<img src="http://localhost:9/outside.png"></main>')
    seen = browse(broken, folder)
    assert seen["loaded"] == seen["images"] - 2
    assert any("localhost" in name for name in seen["outside"])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_loads_the_page_of_another_protocol(main, frames):
    arguments = ["gt.json", "good", "bad.json", "--images", "images", "--protocol", "caltech"]
    assert main(arguments) == 0
    seen = browse(Path("errors.html").read_text(), frames)
    assert seen["images"] == seen["loaded"] == 4 + 1 + 7 + 1 + 10
    assert seen["outside"] == []
