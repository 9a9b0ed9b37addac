"""YAML files of plain values, read without running anything that they contain.

A config may come from a stranger with the weights that it describes, so text, numbers, lists and
mappings are all that a file may hold. The one tag that is admitted is that of Detectron2's model
zoo, ``!!python/object/apply:eval``, and only for arithmetic on numbers (:func:`arithmetic`), as in
``[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]``.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

# No config is near these; what exceeds them is made to exhaust memory or time.
MAX_BYTES = 2**18
MAX_VALUES = 100_000
MAX_DEPTH = 50

EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"


class Section(dict):
    """A mapping of a YAML file.

    Attributes:
        places: for each key, where it stands: ``'FILE', line N``.
    """

    def __init__(self, content: "Section | None" = None):
        super().__init__(content or {})
        self.places: dict[str, str] = dict(content.places) if content else {}


def read_yaml(file: str | Path) -> Section:
    """Read the mapping of a YAML file.

    Args:
        file: UTF-8, with a byte order mark or without; at most 256 KiB.

    Returns:
        Mappings as :class:`Section`, lists, text, whole numbers, floats, booleans and None.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: anything else than a mapping of plain values; the sentence names file and line.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"The config file '{file}' does not exist; name an existing file.")
    text = _read_text(path)
    try:
        loader = _Loader(text, str(file))
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(_sentence(place_of(str(file), mark), error)) from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"'{file}' has the control character U+{ord_of(error.character):04X} at position "
            f"{error.position}, which YAML does not admit; remove it."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"'{file}' is nested more deeply than any config; name a config file."
        ) from error
    if not isinstance(content, Section):
        raise ValueError(
            f"'{file}' is no config: it holds {_kind(content)} instead of keys with values; name "
            "a YAML file of lines such as 'SEED: 1'."
        )
    _check_extent(content, file)
    return content


def _read_text(path: Path) -> str:
    if path.suffix == ".py":
        raise ValueError(
            f"'{path}' is Python code, which would have to be run to be read; name a YAML file."
        )
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as error:
        raise OSError(
            f"The config file '{path}' cannot be read ({error.strerror}); change its permissions "
            "or name another file."
        ) from error
    if len(raw) > MAX_BYTES:
        raise ValueError(
            f"'{path}' is larger than 256 KiB, so it is no config; name a config file."
        )
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"'{path}' is text in UTF-16; save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"'{path}', line {line}: the byte 0x{raw[error.start]:02X} is not UTF-8; save the file "
            "as UTF-8, or name a config file."
        ) from error


def place_of(file: str, mark: yaml.Mark | None) -> str:
    """``'FILE', line N``, as sentences name a place."""
    return f"'{file}'" if mark is None else f"'{file}', line {mark.line + 1}"


def ord_of(character: str | int) -> int:
    """The code point of what PyYAML reports as a character: text or a number."""
    return character if isinstance(character, int) else ord(character)


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (list, str)):
        return "a list" if isinstance(value, list) else "text"
    return "a single value"


def _sentence(place: str, error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "it is no YAML"
    if "'\\t'" in problem:
        return f"{place}: there is a tab, and YAML is indented with spaces; replace it."
    return f"{place}: {problem}; correct the YAML there."


def _check_extent(content: Section, file: str | Path) -> None:
    """Refuse what aliases (``*name``) blow up, or nest within itself."""
    stack, count = [(content, 0)], 0
    while stack:
        value, depth = stack.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(
                f"'{file}' unfolds to more than {MAX_VALUES:,} values or {MAX_DEPTH} levels; write "
                "it without aliases (*name)."
            )
        if isinstance(value, dict):
            stack += ((v, depth + 1) for v in value.values())
        elif isinstance(value, list):
            stack += ((v, depth + 1) for v in value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, narrowed to plain values."""

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self.file = file

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level > MAX_DEPTH:  # the time of PyYAML's scanner grows with its square
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def mistake(self, node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def section(self, node: yaml.Node) -> Iterator[Section]:
        if not isinstance(node, yaml.MappingNode):
            raise self.mistake(node, "there is no mapping where one is announced")
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise self.mistake(key, "the merge key << is refused, since configs have _BASE_")
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise self.mistake(key, f"the key '{key.value}' stands twice in one mapping")
                seen.add(key.value)
        section = Section()
        yield section
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise self.mistake(key_node, f"the key {key!r} is not text")
            section[key] = self.construct_object(value_node, deep=True)
            section.places[key] = place_of(self.file, key_node.start_mark)

    def scalar(self, node: yaml.ScalarNode) -> int | float | bool:
        try:
            return self.PARSERS[node.tag](self, node)
        except (ValueError, KeyError, IndexError) as error:
            raise self.mistake(node, f"'{node.value[:40]}' cannot be read") from error

    def evaluated(self, node: yaml.SequenceNode) -> int | float | list | tuple:
        try:
            (text,) = self.construct_sequence(node)
            return arithmetic(text)
        except ValueError as error:
            raise self.mistake(node, f"!!python/object/apply:eval is refused ({error})") from error

    def refused(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise self.mistake(
            node, f"the tag {tag} is refused, since a config holds plain values and runs no code"
        )

    PARSERS = {
        "tag:yaml.org,2002:bool": yaml.SafeLoader.construct_yaml_bool,
        "tag:yaml.org,2002:int": yaml.SafeLoader.construct_yaml_int,
        "tag:yaml.org,2002:float": yaml.SafeLoader.construct_yaml_float,
    }


# Dates stay text: no key has one for its value, and a folder may be named by one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq"))
}
for _tag in _Loader.PARSERS:
    _Loader.add_constructor(_tag, _Loader.scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.section)
_Loader.add_constructor(EVAL_TAG, _Loader.evaluated)
_Loader.add_constructor(None, _Loader.refused)


MAX_STEPS = 10_000
MAX_NUMBER = 1e12
MAX_EXPONENT = 64
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(text: object) -> int | float | list | tuple:
    """Value of an expression of numbers, ``+ - * / **``, lists, tuples and list comprehensions.

    No name but a comprehension's own variable is known, nothing is called, and neither numbers nor
    the number of steps can grow without bound.

    Raises:
        ValueError: any other expression.
    """
    if not isinstance(text, str) or len(text) > 1000:
        raise ValueError("its argument is one text of at most 1,000 characters")
    try:
        return _Arithmetic().value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it is no arithmetic") from error


class _Arithmetic:
    def __init__(self) -> None:
        self.steps = 0

    def value(self, node: ast.expr, names: dict) -> int | float | list | tuple:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ValueError("it takes too many steps")
        match node:
            case ast.Constant(value=int() | float() as number) if type(number) is not bool:
                return _bounded(number)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.List(elts=items):
                return [self.value(item, names) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item, names) for item in items)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return _bounded(OPERATORS[type(op)](self.number(operand, names)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return self.binary(type(op), self.number(left, names), self.number(right, names))
            case ast.ListComp(
                elt=item,
                generators=[
                    ast.comprehension(target=ast.Name(id=name), iter=over, ifs=[], is_async=0)
                ],
            ):
                values = self.value(over, names)
                if isinstance(values, (list, tuple)):
                    return [self.value(item, names | {name: v}) for v in values]
        raise ValueError(f"'{ast.unparse(node)}' is no arithmetic on numbers")

    def number(self, node: ast.expr, names: dict) -> int | float:
        value = self.value(node, names)
        if not isinstance(value, (int, float)):
            raise ValueError(f"'{ast.unparse(node)}' is no number")
        return value

    def binary(self, op: type, left: float, right: float) -> int | float:
        if op is ast.Pow and abs(right) > MAX_EXPONENT:
            raise ValueError(f"the exponent {right} is too large")
        try:
            return _bounded(OPERATORS[op](left, right))
        except ArithmeticError as error:
            raise ValueError(str(error)) from error


def _bounded(number: int | float) -> int | float:
    if isinstance(number, complex) or not abs(number) <= MAX_NUMBER:
        raise ValueError("a number in it is too large, or none")
    return number
