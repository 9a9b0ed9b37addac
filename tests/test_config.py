"""Configs: what is read, what is refused with its place, and that nothing in them runs."""

import importlib
import os
import sys
from pathlib import Path

import detectron2.model_zoo
import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from helpers.rules import rule
from hkd_d2.config import (
    add_hkd_config,
    default_config,
    load_config,
    load_mentioned_config,
    student_config,
)
from hkd_d2.configuration.merge import read_config_file
from hkd_d2.configuration.safe_yaml import arithmetic
from hkd_d2.distillation import TERM_REGISTRY, Term
from hkd_d2.export.ship import shipped_config
from hkd_d2.modeling.teacher import load_teacher_config

ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"


@pytest.fixture
def write(tmp_path):
    """Write files of a temporary folder and return the path of the last."""

    def write_files(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name}.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_files


@pytest.mark.parametrize("path", sorted(ZOO.rglob("*.yaml")), ids=lambda p: p.stem)
def test_model_zoo_is_read_as_detectron2_reads_it(path):
    theirs = CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)
    assert read_config_file(path) == theirs


def test_a_config_of_the_zoo_merges_as_in_detectron2():
    path = ZOO / "COCO-Detection" / "retinanet_R_50_FPN_3x.yaml"
    theirs = get_cfg()
    add_hkd_config(theirs)
    theirs.merge_from_file(str(path))
    assert load_config(path) == theirs
    assert theirs.MODEL.ANCHOR_GENERATOR.SIZES[0][1] == 32 * 2 ** (1 / 3)


def test_arithmetic():
    # By Python's own evaluation.
    for text in (
        "[[x, x * 2**(1.0/3)] for x in [32, 64]]",
        "-2 ** 2",
        "(1, 2.5)",
        "[1 - 3, +4 / 8]",
    ):
        assert arithmetic(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd').read()",
        "(1).__class__",
        "[x for x in (1).__class__.__bases__]",
        "[y for x in [1]]",
        "'a' * 3",
        "[1] * 10",
        "9**9**9",
        "2**1000",
        "1 / 0",
        "(-1)**0.5",
        "[x for x in [1, 2] if x]",
        "lambda: 1",
        "(x := 1)",
        "f'{1}'",
        "True",
        "1e400",
        "[" * 400 + "]" * 400,
        "-" * 900 + "1",
        "[[[[1 for a in [1,2,3,4,5,6,7,8,9,9]] for b in [1,2,3,4,5,6,7,8,9,9]]"
        " for c in [1,2,3,4,5,6,7,8,9,9]] for d in [1,2,3,4,5,6,7,8,9,9]]",
        "1" * 1001,
        5,
    ],
)
def test_anything_but_arithmetic_is_refused(text):
    with pytest.raises(ValueError):
        arithmetic(text)


CODE = [
    "!!python/object/apply:os.mkdir [{touched}]",
    "!!python/object/new:os.mkdir [{touched}]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{touched}')\"]",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{touched}')\"]",
    "!!python/object/apply:exec [\"__import__('os').mkdir('{touched}')\"]",
    "!!python/object/apply:subprocess.check_output [[mkdir, {touched}]]",
    "!!python/name:os.mkdir",
    "!!python/module:this",
    "!!python/object:yaml.YAMLObject {{}}",
    "!!python/tuple [1, 2]",
    "!unknown 1",
]


@rule("No config runs code, neither the named file nor its bases or a teacher's")
@pytest.mark.parametrize("way", ["named", "base", "teacher", "mentioned"])
@pytest.mark.parametrize("code", CODE)
def test_no_code_runs(write, tmp_path, code, way):
    touched = tmp_path / "touched"
    text = f"SEED: 1\nOUTPUT_DIR: {code.format(touched=touched)}\n"
    path = write(evil=text, named="_BASE_: evil.yaml\n") if way == "base" else write(evil=text)
    read = {"teacher": load_teacher_config, "mentioned": load_mentioned_config}.get(
        way, load_config
    )
    with pytest.raises(ValueError, match=r"evil.yaml', line 2: .* is refused"):
        read(path)
    assert not touched.exists()
    assert "this" not in sys.modules


def test_the_unsafe_loader_would_have_run_it(tmp_path):
    """The test above can fail: Detectron2's loader makes the folder."""
    touched = tmp_path / "touched"
    yaml.unsafe_load(CODE[0].format(touched=touched))
    assert touched.exists()


BOMB = "\n".join(
    ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20))]
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("SEED:\n\t- 1\n", "line 2: there is a tab"),
        ("SEED: [1\nX: 2\n", "line 2: "),
        ("SEED: 1\nSEED: 2\n", "line 2: the key 'SEED' stands twice"),
        ("- SEED\n", "holds a list instead of keys"),
        ("SEED\n", "holds text instead of keys"),
        ("", "holds nothing instead of keys"),
        ("# a comment\n", "holds nothing instead of keys"),
        ("5\n", "holds a single value instead"),
        ("1: 2\n", "line 1: the key 1 is not text"),
        ("[1]: 2\n", "line 1: the key .* is not text"),
        ("SEED: 1\n---\nSEED: 2\n", "line 2: "),
        ("SEED: *nowhere\n", "line 1: .*undefined alias"),
        ("MODEL: &m\n  X: *m\n", "line|levels"),
        ("MODEL: !!map 3\n", "line 1: there is no mapping where one is announced"),
        ("SEED: 0x_\n", "line 1: '0x_' cannot be read"),
        ("SEED: !!bool maybe\n", "line 1: 'maybe' cannot be read"),
        ("SEED: !!float abc\n", "line 1: 'abc' cannot be read"),
        ("SEED: !!int ''\n", "line 1: '' cannot be read"),
        (f"SEED: {'9' * 5000}\n", "line 1: '9{40}' cannot be read"),
        ("X: " + "[" * 5000, "nested more deeply"),
        ("X: " + "[" * 60 + "]" * 60, "nested more deeply"),
        (b"SEED: 1\nX: \xff\n", "line 2: the byte 0xFF is not UTF-8"),
        ("SEED: 1\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"SEED: \x00\n", r"control character U\+0000"),
        (b"X: 1\n" * (2**16), "larger than 256 KiB"),
        (BOMB, "unfolds to more than 100,000 values"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", "line 3: the merge key << is refused"),
        ("SEDE: 1\n", r"^SEDE \('.*', line 1\) is no config key; did you mean SEED\?"),
        ("SOLVER:\n  BASE_LRR: 1\n", r"SOLVER.BASE_LRR \(.*, line 2\) .* mean SOLVER.BASE_LR\?"),
        ("HKD:\n  MAX_ITER: 1\n", r"HKD.MAX_ITER \(.*, line 2\) .*SOLVER.MAX_ITER"),
        ("HKD:\n  CONTRAST: {WEIGHT: 1}\n", "HKD.CONTRAST .* HKD.IMPORTS"),
        ("SOLVER: {MAX_ITER: abc}\n", r"MAX_ITER is 'abc' \(.*, line 1\); give a whole number"),
        ("SOLVER: {MAX_ITER: 1.5}\n", "MAX_ITER is 1.5 .*; give a whole number"),
        ("SOLVER: {BASE_LR: true}\n", "BASE_LR is True .*; give a number"),
        ("HKD: {TERMS: region}\n", "HKD.TERMS is 'region' .*; give a list"),
        ("HKD: {TERMS: [region, {a: 1}]}\n", "HKD.TERMS is .*, line 1.; put only text, numbers"),
        ("HKD: {DATA: {REGISTER: [[a, {b: 1}]]}}\n", "REGISTER is .*, line 1.; put only text"),
        (
            "HKD: {STUDENT: {LOSS_WEIGHTS: {x: [null]}}}\n",
            "WEIGHTS.x is .*, line 1.; put only text",
        ),
        ("HKD: {CHANNELS_LAST: 1}\n", "CHANNELS_LAST is 1 .*; give True or False"),
        ("OUTPUT_DIR: 2024\n", "OUTPUT_DIR is 2024 .*; give text, in quotes"),
        ("SEED: {A: 1}\n", "SEED is .*; give a whole number"),
        ("SOLVER: 1\n", "SOLVER is 1 .* is a group of keys; set one of them, such as SOLVER."),
        ("SOLVER:\n", "SOLVER is None .* is a group of keys"),
        ("VERSION: 3\n", "VERSION is 3, and the installed Detectron2 reads"),
        ("VERSION: 0\n", "line 1: VERSION is 0"),
        ("VERSION: true\n", "line 1: VERSION is True"),
        ("VERSION: new\n", "line 1: VERSION is 'new'"),
        ("_BASE_: 3\n", "line 1: _BASE_ is 3; name a file or a list"),
        ("_BASE_: nowhere.yaml\n", "line 1: _BASE_ names 'nowhere.yaml', and there is no file"),
        ("_BASE_: https://example.org/a.yaml\n", "line 1: _BASE_ is the address"),
        ("_BASE_: evil.yaml\n", "is its own base"),
        ("HKD: {IMPORTS: my_team}\n", "HKD.IMPORTS is 'my_team' .*; give a list of modules"),
    ],
)
def test_a_mistake_is_one_sentence(write, text, sentence):
    path = write(evil=text)
    for read in (load_config, load_mentioned_config):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
            read(path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_files(write, tmp_path):
    path = write(a="_BASE_: b.yaml\n", b="_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match="is its own base .*b.yaml -> .*a.yaml -> .*b.yaml"):
        load_config(path)
    many = {f"f{i}": f"_BASE_: [f{i - 1}.yaml, f{i - 1}.yaml]\nSEED: 1\n" for i in range(1, 30)}
    with pytest.raises(ValueError, match="more than 64 bases"):
        load_config(write(f0="SEED: 1\n", **many))
    path = write(scalar="SOLVER: 1\n", over="_BASE_: scalar.yaml\nSOLVER:\n  MAX_ITER: 2\n")
    with pytest.raises(ValueError, match="over.yaml', line 2: 'SOLVER' .*scalar.yaml', line 1"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path)  # a folder
    code = tmp_path / "lazy.py"
    code.write_text("raise SystemExit")
    with pytest.raises(ValueError, match="is Python code"):
        load_config(code)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(write):
    path = write(a="SEED: 1\n")
    os.chmod(path, 0)
    with pytest.raises(OSError, match="cannot be read .*; change its permissions"):
        load_config(path)


def test_what_is_read(write):
    text = (
        "\ufeffSEED: 3\r\nOUTPUT_DIR: 2024-01-02\r\n"
        "SOLVER: {BASE_LR: 1, STEPS: [5], GAMMA: 1e-1}\r\n"
        "HKD: {STUDENT: {LOSS_WEIGHTS: {loss_cls: 0.5}}}\r\n"
    )
    cfg = load_config(write(a=text), ["OUTPUT_DIR", "2024", "HKD.STUDENT.LOSS_WEIGHTS.x", "2"])
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (3, 1.0, 0.1)
    assert cfg.SOLVER.STEPS == (5,) and type(cfg.SOLVER.BASE_LR) is float
    assert cfg.OUTPUT_DIR == "2024"
    assert cfg.HKD.STUDENT.LOSS_WEIGHTS == {"loss_cls": 0.5, "x": 2}
    # Detectron2 reads what it can read of this in the same way.
    theirs = default_config()
    theirs.merge_from_list(["SEED", "3", "SOLVER.BASE_LR", "1.0", "SOLVER.STEPS", "(5,)"])
    assert (theirs.SEED, theirs.SOLVER.STEPS) == (cfg.SEED, cfg.SOLVER.STEPS)
    assert load_config() == default_config()


def test_bases_are_merged_in_their_order(write):
    path = write(
        a="SEED: 1\nSOLVER: {MAX_ITER: 5, BASE_LR: 0.5}\n",
        b="SEED: 2\n",
        c="_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 7}\n",
    )
    cfg = load_config(path)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (2, 7, 0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["SEED"], "The option 'SEED' has no value"),
        (["SEED", "1", "SEED=2"], "The option 'SEED=2' has no value"),
        (["SEDE", "1"], r"SEDE \(on the command line\) is no config key; did you mean SEED\?"),
        (["SEED.X", "1"], "SEED.X .* is no config key"),
        (["MODEL", "1"], "MODEL is '1' .* is a group of keys"),
        (["SEED", "x"], r"SEED is 'x' \(on the command line\); give a whole number"),
        (["SEED", "-" * 100_000 + "1"], r"^.{0,200}$"),
        (["HKD.TERMS", "[{1}]"], r"HKD.TERMS is '\[\{1\}\]' .on the command line.; put"),
        (["_BASE_", "x.yaml"], "_BASE_ .* is no config key"),
        (["HKD.IMPORTS", "x"], "HKD.IMPORTS is 'x' .*; give a list of modules"),
    ],
)
def test_options_with_mistakes(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(None, options)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Names of modules outside the package that tell when they are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before, terms = set(sys.modules), dict(TERM_REGISTRY._obj_map)

    def make(name, text=""):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield make
    TERM_REGISTRY._obj_map.clear()
    TERM_REGISTRY._obj_map.update(terms)
    for name in set(sys.modules) - before:
        del sys.modules[name]


TERM = """
from hkd_d2.distillation import TERM_REGISTRY, Term

@TERM_REGISTRY.register()
class {name}(Term):
    @classmethod
    def add_config(cls, node):
        node.WEIGHT, node.OWN = 3.0, 1
"""


def test_imports_come_before_the_keys(write, outside):
    outside("a_term", TERM.format(name="Elsewhere"))
    path = write(a="HKD: {IMPORTS: [a_term], ELSEWHERE: {OWN: 2}}\n")
    cfg = load_config(path)
    assert cfg.HKD.ELSEWHERE.OWN == 2 and cfg.HKD.ELSEWHERE.SCHEDULE.DECAY == "constant"
    assert cfg.HKD.IMPORTS == ["a_term"]


def test_imports_on_the_command_line(outside):
    outside("a_term", TERM.format(name="Elsewhere"))
    cfg = load_config(None, ["HKD.IMPORTS", "['a_term']", "HKD.ELSEWHERE.OWN", "5"])
    assert cfg.HKD.ELSEWHERE.OWN == 5


@rule("HKD.IMPORTS counts in the file that the user names and on the command line alone")
@pytest.mark.parametrize("text", ["[a_module]", "\"['a_module']\"", "!!python/tuple [a_module]"])
def test_imports_count_nowhere_else(write, outside, text):
    outside("a_module")
    evil = f"HKD:\n  IMPORTS: {text}\n"
    path = write(evil=evil)
    for read in (load_teacher_config, load_mentioned_config):
        with pytest.raises(ValueError, match="evil.yaml', line 2: "):
            read(path)
    for base in ("evil.yaml", "[evil.yaml]"):
        with pytest.raises(ValueError, match="evil.yaml', line 2: "):
            load_config(write(evil=evil, named=f"_BASE_: {base}\nHKD: {{IMPORTS: []}}\n"))
    assert "a_module" not in sys.modules
    # A dumped config has the empty list.
    load_mentioned_config(write(plain=default_config().dump()))


def test_modules_that_cannot_be_imported(outside):
    def load(name):
        return load_config(None, ["HKD.IMPORTS", str([name])])

    with pytest.raises(ImportError, match="names 'no.where', and Python finds no module 'no';"):
        load("no.where")
    with pytest.raises(ImportError, match="'needy' needs the module 'not_there'"):
        load(outside("needy", "import not_there"))
    for name in (".relative", ""):
        with pytest.raises(ImportError, match="no absolute module name"):
            load(name)
    with pytest.raises(ZeroDivisionError):  # a fault of their own keeps its traceback
        load(outside("faulty", "1 / 0"))


def test_a_term_may_not_take_another_node(outside):
    outside("taken", TERM.format(name="Data"))
    with pytest.raises(ValueError, match="The term 'Data' of taken would have HKD.DATA"):
        load_config(None, ["HKD.IMPORTS", "['taken']"])


def test_every_term_adds_its_keys():
    node = default_config().HKD
    for name, cls in TERM_REGISTRY:
        assert issubclass(cls, Term)
        own = CfgNode()
        cls.add_config(own)
        assert {*own, "SCHEDULE"} == {*node[name.upper()]} and own.WEIGHT > 0


def test_student_config():
    cfg = default_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.HKD.STUDENT.META_ARCHITECTURE = "HKDDetector", "RetinaNet"
    cfg.freeze()
    student = student_config(cfg)
    assert student.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert student_config(student) == student
    assert cfg.MODEL.META_ARCHITECTURE == "HKDDetector" and not student.is_frozen()


def test_weights_of_losses_are_numbers(student_cfg):
    student_cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    student_cfg.HKD.STUDENT.LOSS_WEIGHTS["loss_cls"] = "much"
    with pytest.raises(ValueError, match="LOSS_WEIGHTS.loss_cls is 'much'; give a number"):
        build_model(student_cfg)


def test_an_exported_config_needs_nothing_from_outside(write, outside):
    outside("a_term", TERM.format(name="Elsewhere"))
    cfg = load_config(write(a="HKD: {IMPORTS: [a_term], TERMS: [elsewhere]}\n"))
    sizes = dict(min_size=64, max_size=96, score_threshold=0.5, nms_threshold=0.5)
    shipped = shipped_config(cfg, sizes)
    # As another process sees it, in which nobody imported the term.
    del TERM_REGISTRY._obj_map["Elsewhere"]
    read = load_mentioned_config(write(shipped=shipped.dump()))
    assert read.HKD.IMPORTS == [] and "ELSEWHERE" not in read.HKD
    assert yaml.safe_load(read.dump()) == yaml.safe_load(shipped.dump())
